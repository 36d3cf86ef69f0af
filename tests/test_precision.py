"""Products by the faster library: as exact as ever, and for the time that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

import ppl_vae as pv
from ppl_vae import precision


@pytest.fixture
def set_back() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


def test_a_product_inside_is_exact() -> None:
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(131, 401, generator=g), torch.randn(401, 53, generator=g)
    exact = a.double() @ b.double()
    with precision.fast_and_exact():
        found = a @ b
    assert (found.double() - exact).norm() < 1e-6 * exact.norm()
    # bfloat16 and TF32, which the same words may mean elsewhere, are not
    for dtype_bits in (7, 10):
        rounded = [torch.round(t * 2.0 ** (dtype_bits)) / 2.0 ** (dtype_bits) for t in (a, b)]
        assert (rounded[0].double() @ rounded[1].double() - exact).norm() > 1e-5 * exact.norm()


@pytest.mark.usefixtures("set_back")
@pytest.mark.parametrize("exact", [True, False])
def test_the_setting_is_restored_whatever_happens(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_is_exact", lambda: exact)
    with pytest.raises(ZeroDivisionError), precision.fast_and_exact():  # noqa: PT012
        assert torch.get_float32_matmul_precision() == ("medium" if exact else "highest")
        with precision.fast_and_exact():
            assert torch.get_float32_matmul_precision() == ("medium" if exact else "highest")
        assert torch.get_float32_matmul_precision() == ("medium" if exact else "highest")
        _ = 1 / 0
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.usefixtures("set_back")
@pytest.mark.parametrize("setting", ["high", "medium"])
def test_what_the_user_has_set_stays(setting: str) -> None:
    torch.set_float32_matmul_precision(setting)
    with precision.fast_and_exact():
        assert torch.get_float32_matmul_precision() == setting
    assert torch.get_float32_matmul_precision() == setting


def test_a_processor_that_rounds_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    product = torch.Tensor.__matmul__
    monkeypatch.setattr(
        torch.Tensor, "__matmul__", lambda a, b: product(a, b) * (1 + 1e-3 * (a.dtype == torch.float32))
    )
    assert not precision._is_exact.__wrapped__()
    monkeypatch.undo()
    assert torch.get_float32_matmul_precision() == "highest"


# ---------------------------------------------------------------------------------------------------------------
# Fewer digits, where torch.autocast asks for them.


@pytest.fixture
def x() -> Tensor:
    return torch.bernoulli(torch.full((61, 7), 0.3))


def small_vae() -> pv.VAE:
    return pv.VAE((7,), 2, encoder=nn.Linear(7, 4), decoder=nn.Linear(2, 7))


def in_bfloat16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


class Regression(nn.Module):
    """Without latents, so that rounding is all that can make a difference."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 7))

    def model(self, x: Tensor) -> None:
        pyro.module("layers", self.layers)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(self.layers(x), 0.5).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pass


def trained(
    x: Tensor, around: Callable[[], Any] = nullcontext, epochs: int = 101, **options: Any
) -> tuple[nn.Module, pv.History]:
    torch.manual_seed(2)
    pyro.clear_param_store()
    pair = Regression()
    with around():
        history = pv.fit(pair.model, pair.guide, x, epochs=epochs, learning_rate=1e-2, progress=False, **options)
    return pair, history


def distance(one: nn.Module, other: nn.Module) -> float:
    """Of the weights, as a share of what training has changed."""
    torch.manual_seed(2)
    untrained = Regression()
    a, b, start = (nn.utils.parameters_to_vector(pair.parameters()).detach() for pair in (one, other, untrained))
    return float((a - b).norm() / (a - start).norm())


def test_training_inside_of_autocast_trains_and_says_so(x: Tensor) -> None:
    whole, history = trained(x)
    rounded, history_rounded = trained(x, in_bfloat16)
    assert history.rounded_to is None
    assert history_rounded.rounded_to == "bfloat16"
    assert "bfloat16" not in repr(history)
    assert repr(history_rounded).endswith("nats per datum, in bfloat16)")
    assert 0 < distance(whole, rounded) < 0.05
    assert {p.dtype for p in rounded.parameters()} == {torch.float32}


def test_weights_that_were_rounded_once_and_for_all_would_be_noticed(
    x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = trained(x)
    monkeypatch.setattr(precision, "_rounded_anew", nullcontext)
    assert not distance(whole, trained(x, in_bfloat16)[0]) < 0.05


def test_nothing_rounded_before_or_inside_is_left_behind(x: Tensor) -> None:
    vae = small_vae()
    with in_bfloat16():
        before = vae.decoder(torch.ones(3, 2))
        pv.fit(vae.model, vae.guide, x, epochs=3, learning_rate=0.3, progress=False)
        after = vae.decoder(torch.ones(3, 2))
        assert torch.is_autocast_cache_enabled()
    with in_bfloat16():
        expected = vae.decoder(torch.ones(3, 2))
    assert torch.equal(after, expected)
    assert not torch.equal(before, after)


RESULTS: dict[str, Callable[..., Any]] = {
    "importance": partial(pv.importance_sampling, num_samples=101),
    "annealing": partial(pv.annealed_importance_sampling, num_chains=3, num_temperatures=5),
    "bounds": partial(pv.bounds, estimators=[partial(pv.importance_sampling, num_samples=101)], num_mode_checks=0),
    "modes": partial(pv.mode_check, num_data=3, num_chains=3, num_temperatures=5),
    "gaps": partial(pv.inference_gaps, num_steps=5, num_samples=11),
    "diagnosis": partial(pv.diagnose, num_samples=11),
    "grid": lambda model, guide, x: pv.grid_integration(model, guide, x[:1]),
    "sandwich": lambda model, guide, x: pv.sandwich(model, guide, num_data=3, num_chains=3, num_temperatures=5),
}


@pytest.mark.parametrize("name", RESULTS)
def test_every_result_says_that_it_is_rounded(name: str, x: Tensor) -> None:
    vae = small_vae()
    found = RESULTS[name](vae.model, vae.guide, x[:3])
    assert found.rounded_to is None
    assert not any("autocast" in warning for warning in found.warnings())
    with in_bfloat16():
        found = RESULTS[name](vae.model, vae.guide, x[:3])
    assert found.rounded_to == "bfloat16"
    (said,) = (warning for warning in found.warnings() if "autocast" in warning)
    assert said.startswith("Numbers inside of the programs were rounded to bfloat16, by torch.autocast")
    assert said in str(found)


class RoundsByItself(nn.Module):
    """Linear, in autocast that it enters itself; what it gives has float32's type again."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        with in_bfloat16():
            return self.layer(x).float()


def test_a_program_that_rounds_by_itself_says_so_too(x: Tensor) -> None:
    vae = pv.VAE((7,), 2, encoder=nn.Linear(7, 4), decoder=RoundsByItself(nn.Linear(2, 7)))
    for name, evaluate in RESULTS.items():
        assert evaluate(vae.model, vae.guide, x[:3]).rounded_to == "bfloat16", name
    assert pv.fit(vae.model, vae.guide, x, epochs=1, progress=False).rounded_to == "bfloat16"


def test_weights_of_fewer_digits_are_seen_and_data_of_fewer_are_exact(x: Tensor) -> None:
    class Half(nn.Module):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.layer = layer.to(torch.float16)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.half()).float()

    of_weights = pv.VAE((7,), 2, encoder=Half(nn.Linear(7, 4)), decoder=nn.Linear(2, 7))
    assert pv.importance_sampling(of_weights.model, of_weights.guide, x).rounded_to == "float16"

    vae = small_vae()

    def model(x: Tensor) -> Any:
        return vae.model(x.flatten(1).float())

    def guide(x: Tensor) -> Any:
        return vae.guide(x.flatten(1).float())

    assert pv.importance_sampling(model, guide, x.half()).rounded_to is None


def test_nothing_is_said_to_be_rounded_that_is_not() -> None:
    """Autocast leaves float64 alone."""
    lg = pv.LinearGaussian(torch.tensor([[1.0], [2.0]]).double(), mean=0.0, noise=1.0)
    data = lg.model(num_data=3)
    with in_bfloat16():
        found = pv.importance_sampling(lg.model, lg.guide, data)
    assert found.rounded_to is None
    assert (found.log_px - lg.log_px(data)).abs().max() < 1e-9


def test_a_run_that_was_rounded_for_a_while_was_rounded(x: Tensor, tmp_path: Path) -> None:
    vae = small_vae()
    run = partial(pv.fit, vae.model, vae.guide, x, checkpoint=tmp_path / "run", progress=False)
    run(epochs=1)
    with in_bfloat16():
        assert run(epochs=2, resume=True).rounded_to == "bfloat16"
    assert run(epochs=3, resume=True).rounded_to == "bfloat16"


def test_a_processor_is_judged_outside_of_autocast() -> None:
    exact = precision._is_exact.__wrapped__()
    with in_bfloat16():
        assert precision._is_exact.__wrapped__() == exact


def test_what_is_rounded_is_compiled_too(x: Tensor, graphs_as_recorded: list[Any]) -> None:
    """A graph for each precision, and rounded where an eager run is."""
    for around in (nullcontext, in_bfloat16):
        compiled, history = trained(x, around, objective=Trace_ELBO(), compile=True, epochs=5)
        eager, expected = trained(x, around, objective=Trace_ELBO(), epochs=5)
        assert distance(eager, compiled) < 1e-5
        assert history.rounded_to == expected.rounded_to
    vae, found = small_vae(), {}
    for compile in (True, False):
        with in_bfloat16():
            found[compile] = pv.importance_sampling(vae.model, vae.guide, x, num_samples=101, compile=compile)
    torch.testing.assert_close(found[True].log_px, found[False].log_px, rtol=1e-6, atol=0)
    assert len(graphs_as_recorded) == 4


def test_one_function_in_two_precisions_is_two_graphs(graphs_as_recorded: list[Any]) -> None:
    weight = torch.randn(7, 3)
    product = pv.compiling.Compiled(lambda x: (x @ weight,), what="the product")
    x = torch.randn(5, 7)
    whole = product(x)
    with in_bfloat16():
        for _ in range(pv.compiling.compiled.PATIENCE):
            found = product(x)
    assert whole is not None
    assert found is not None
    assert (whole[0].dtype, found[0].dtype) == (torch.float32, torch.bfloat16)
    again = product(x)
    assert again is not None
    assert torch.equal(again[0], whole[0])
    assert len(graphs_as_recorded) == 2
