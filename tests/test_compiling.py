"""A compiled function is the eager one, or is not compiled, with a reason."""

from __future__ import annotations

import os
import random
import shutil
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import linear
import numpy as np
import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import JitTrace_ELBO, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import ppl_vae as pv
from ppl_vae import coin
from ppl_vae.batches import Batches
from ppl_vae.compiling import Compiled, compiled, ordering, recorded, recording
from ppl_vae.evidence import importance_sampling
from ppl_vae.objectives import IWAE, VIMCO, AnalyticKL, BetaELBO, DReG, FreeBits, StickingTheLanding
from ppl_vae.training import fit
from ppl_vae.training.adam import Update
from ppl_vae.training.steps import Trained
from ppl_vae.vae import VAE

NUM_DATA, DATA_DIM, LATENT_DIM, BATCH = 53, 7, 2, 11
OPTIONS: dict[str, Any] = {"epochs": 3, "batch_size": BATCH, "learning_rate": 1e-2, "progress": False}

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")))),
    reason="there is no C++ compiler",
)


@pytest.fixture
def x() -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.rand(NUM_DATA, DATA_DIM, generator=g).round()


def small_vae(**networks: Any) -> VAE:
    torch.manual_seed(3)
    return VAE((DATA_DIM,), LATENT_DIM, **{"encoder": nn.Linear(7, 4), "decoder": nn.Linear(2, 7)} | networks)


# ---------------------------------------------------------------------------------------------------------------
# The function itself.


@needs_compiler
def test_it_is_the_function_of_its_inputs_and_of_what_it_reaches() -> None:
    weight, bias = nn.Parameter(torch.randn(3, 5)), torch.randn(5)

    def function(x: Tensor) -> tuple[Tensor, ...]:
        noise = torch.randn(len(x), 5)
        loss = ((x @ weight + bias) * noise + F.dropout(noise, 0.3)).tanh().sum() - weight[:, :1].sum()
        return (loss.detach(), *torch.autograd.grad(loss, [weight]))

    def same() -> None:
        state = torch.get_rng_state()
        found = fast(x)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        assert found is not None
        for one, other in zip(found, function(x), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert torch.equal(torch.get_rng_state(), after)

    x = torch.randn(11, 3)
    fast = Compiled(function, what="it")
    before = torch.get_rng_state()
    first = fast(x)
    same()
    second = fast(x)
    assert first is not None
    assert second is not None
    assert not torch.equal(first[0], second[0])
    torch.set_rng_state(before)
    assert torch.equal(fast(x)[0], first[0])  # type: ignore[index]
    with torch.no_grad():
        weight += 1.0
    bias[2] = 7.0
    same()
    weight.data = torch.randn(3, 5)
    same()


@needs_compiler
def test_every_output_has_memory_of_its_own() -> None:
    """A gradient may be the transpose of another, or one number over and over; who gets it writes to it."""
    one, other, third = (nn.Parameter(torch.randn(shape)) for shape in ((3, 5), (5, 3), (7,)))

    def function(x: Tensor) -> tuple[Tensor, ...]:
        loss = (x @ (one + other.T)).square().sum() + third.sum()
        return (x, third, *torch.autograd.grad(loss, [one, other, third]))

    x = torch.randn(11, 3)
    found = Compiled(function, what="it")(x)
    assert found is not None
    expected = [tensor.clone() for tensor in function(x)]
    for place, tensor in enumerate(found):
        tensor.mul_(0.0)
        for later, right in zip(found[place + 1 :], expected[place + 1 :], strict=True):
            torch.testing.assert_close(later, right)
    assert x.norm() > 0
    assert third.norm() > 0


def writing() -> tuple[Callable[[Tensor], tuple[Tensor, ...]], list[Tensor]]:
    """A function that writes to its state, what it writes being known before the old value is last looked at."""
    weight, count = torch.linspace(-1.0, 1.0, 15).reshape(3, 5), torch.zeros(())

    def function(x: Tensor) -> tuple[Tensor, ...]:
        new = 0.5 * weight + x.mean()
        seen = (x @ weight.T).relu()
        weight.copy_(new)
        count.add_(1.0)
        return (seen, count * weight)

    return function, [weight, count]


@needs_compiler
def test_what_it_writes_to_its_state_is_written_once_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    function, state = writing()
    eager, expected = writing()
    fast = Compiled(function, what="it", state=lambda: state)
    for step in range(3):
        x = torch.full((7, 5), 1.0 + step)
        found = fast(x)
        assert found is not None
        for one, other in zip((*found, *state), (*eager(x), *expected), strict=True):
            torch.testing.assert_close(one, other)
    monkeypatch.setattr(ordering, "_readers", lambda node: node.users)  # a mutant that forgets who reads a view
    monkeypatch.setattr(ordering.WritesEarly, "uuid", lambda self: None)
    monkeypatch.setattr(compiled, "_PROGRAMS", OrderedDict())
    with pytest.warns(UserWarning, match="gives other numbers than the program"):
        assert Compiled(function, what="it", state=lambda: state)(x) is None
    for one, other in zip(state, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_state_is_what_was_named_and_nothing_else(graphs_as_recorded: list[Any]) -> None:
    function, (weight, count) = writing()
    with pytest.warns(UserWarning, match="changes a tensor that it did not make"):
        assert Compiled(function, what="it", state=lambda: [weight])(torch.ones(7, 5)) is None
    assert torch.equal(weight, writing()[1][0])
    assert count == 0


def test_shapes_that_keep_coming_are_compiled_and_more_than_a_few_are_not(graphs_as_recorded: list[Any]) -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        return (x.sum(),)

    fast = Compiled(function, what="the sum")
    assert fast(torch.ones(3)) is not None
    for _ in range(compiled.PATIENCE - 1):
        assert fast(torch.ones(2)) is None
    assert fast(torch.ones(2)) == [2.0] or fast(torch.ones(2)) == (2.0,)
    assert len(graphs_as_recorded) == 2
    for length in range(4, 2 + compiled.MOST_SHAPES):
        assert fast(torch.ones(length)) is None
    with pytest.warns(UserWarning, match="The sum is not compiled, because its arguments come in more than 8 shapes"):
        assert fast(torch.ones(100)) is None
    assert fast(torch.ones(3)) is None


PARAMETER = nn.Parameter(torch.tensor([0.3, -0.2]))
CONSTANT = torch.tensor([0.3, -0.2])


class Counting:
    def __init__(self, number: float | None = None) -> None:
        self.number = number

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.number is not None:
            self.number += 1.0
        return (x * torch.tensor(self.number or 1.0),)


REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "if": (lambda x: (x if x.sum() > 0 else -x,), r"reads the value of a tensor \(bool\) in "),
    "item": (lambda x: (x if x.sum().item() > 0 else -x,), r"reads the value of a tensor \(bool\) in "),
    "item of integers": (lambda x: (x * x.argmax().item(),), r"reads the value of a tensor \(local_scalar_dense\) in "),
    "float": (lambda x: (x * float(PARAMETER[0]),), r"reads the value of a tensor \(float\) in "),
    "format": (lambda x: (x * float(f"{x.sum():.3f}"),), "reads the value of a tensor"),
    "round": (lambda x: (x * round(x.sum().item(), 2),), r"recording it failed \(TypeError: .*__round__"),
    "int": (lambda x: (x * int(x.sum()),), r"reads the value of a tensor \(int\) in "),
    "index": (lambda x: (x.new_ones(3)[x.long().sum() * 0 :],), r"reads the value of a tensor"),
    "numpy": (lambda x: (torch.from_numpy(np.exp(x.numpy())),), r"reads the value of a tensor \(numpy\) in "),
    "asarray": (lambda x: (torch.from_numpy(np.asarray(x) + 1),), r"reads the value of a tensor \((array|numpy)\) in "),
    "list": (lambda x: (torch.tensor(x.tolist()),), r"reads the value of a tensor \(tolist\) in "),
    "in": (lambda x: (x * (1.0 in x),), r"reads the value of a tensor \(contains\) in "),
    "all close": (lambda x: (x * torch.allclose(x, x + 1),), r"reads the value of a tensor"),
    "equal": (lambda x: (x * torch.equal(x, x),), r"reads the value of a tensor \(equal\) in "),
    "mask": (lambda x: (x[x > 0].sum(),), r"shape of a tensor in it depends on values \(index\)"),
    "nonzero": (lambda x: (x * len(x.nonzero()),), r"shape of a tensor in it depends on values \(nonzero\)"),
    "unique": (lambda x: (x.unique().sum(),), "shape of a tensor in it depends on values"),
    "random": (lambda x: (x * random.random(),), "does not do the same in every run"),
    "numpy's random": (lambda x: (x * np.random.rand(),), "does not do the same in every run"),  # noqa: NPY002
    "random tensor": (lambda x: (x * torch.tensor(random.random()),), "numbers that are not torch's"),
    "array of random": (lambda x: (x * torch.from_numpy(np.random.rand(2)),), "numbers that are not torch's"),  # noqa: NPY002
    "a count": (Counting(1.0), "numbers that are not torch's"),
    "a tensor of outside": (lambda x: (CONSTANT.add_(1.0) * x,), "changes a tensor that it did not make"),
    "an input": (lambda x: (x[:1].mul_(2.0),), "changes a tensor that it did not make"),
    "a view": (lambda x: (CONSTANT.view(2, 1).mul_(2.0).sum() * x,), "changes a tensor that it did not make"),
    "statistics": (
        lambda x: (F.batch_norm(x.expand(3, 2), CONSTANT, CONSTANT.abs(), training=True),),
        "changes a tensor that it did not make, as a batch normalisation",
    ),
    "a seed": (lambda x: (torch.manual_seed(1) and x + torch.randn(2),), "gives other numbers than the program"),
    "no tensors": (lambda x: (x.missing,), r"recording it failed \(AttributeError: .*missing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_graph_would_get_wrong_is_refused_with_one_warning(name: str, graphs_as_recorded: list[Any]) -> None:
    function, reason = REFUSED[name]
    x, constant = torch.tensor([1.0, 2.0]), CONSTANT.clone()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    fast = Compiled(function, what="the function")
    with pytest.warns(  # noqa: PT031
        UserWarning, match=f"^The function is not compiled, because .*({reason}).* It runs eager"
    ) as said:
        assert fast(x) is None
        assert fast(x) is None
    assert len(said) == 1
    assert torch.equal(x, torch.tensor([1.0, 2.0]))
    assert torch.equal(CONSTANT, constant)
    assert name == "a seed" or torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]  # noqa: NPY002


def test_what_is_written_to_tensors_of_the_function_s_own_is_recorded(graphs_as_recorded: list[Any]) -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        made, constant, found = torch.zeros(2, 2), torch.tensor([1.0, 2.0]), []
        made[0] = x
        made.view(-1)[3] += 1.0
        constant += x
        made[:, x > 1.5] = 5.0
        for row in made.split(1):
            found.append(row.mul_(2.0))
        return (made, constant, *found, x.sum().item() + x.max().item())

    x = torch.tensor([1.0, 2.0])
    found = Compiled(function, what="it")(x)
    assert found is not None
    for one, other in zip(found, function(x), strict=True):
        torch.testing.assert_close(one, torch.as_tensor(other))


@pytest.mark.parametrize("mutant", ["no verification", "no comparison"])
def test_verification_and_comparison_are_what_catches_it(
    mutant: str, monkeypatch: pytest.MonkeyPatch, graphs_as_recorded: list[Any]
) -> None:
    if mutant == "no verification":
        monkeypatch.setattr(compiled, "verify", lambda *_: None)
        monkeypatch.setattr(compiled, "_close", lambda *_: True)
        names = ["random", "random tensor", "a count"]
    else:
        monkeypatch.setattr(compiled, "_close", lambda *_: True)
        names = ["a seed"]
    for name in names:
        assert Compiled(REFUSED[name][0], what="it")(torch.tensor([1.0, 2.0])) is not None


def test_random_numbers_that_are_not_set_back_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch, graphs_as_recorded: list[Any]
) -> None:
    monkeypatch.setattr(compiled, "set_back", lambda *_: nullcontext())
    with pytest.warns(UserWarning, match="gives other numbers than the program"):
        assert Compiled(lambda x: (x + torch.randn(2),), what="it")(torch.ones(2)) is None


def test_parameters_are_taken_by_identity_and_not_by_value(
    monkeypatch: pytest.MonkeyPatch, graphs_as_recorded: list[Any]
) -> None:
    weight = nn.Parameter(torch.tensor([2.0, 3.0]))
    fast = Compiled(lambda x: (x * weight,), what="it")
    x = torch.ones(2)
    fast(x)
    (lifted,) = recorded(lambda x: (x * weight,), (x,)).lifted
    assert lifted is weight
    original = recording._lift
    monkeypatch.setattr(recording, "_lift", lambda graph: [tensor.clone() for tensor in original(graph)])
    wrong = Compiled(lambda x: (x * weight,), what="it")
    wrong(x)
    with torch.no_grad():
        weight += 1.0
    assert torch.equal(fast(x)[0], weight)  # type: ignore[index]
    assert not torch.equal(wrong(x)[0], weight)  # type: ignore[index]


def test_an_edited_function_is_another_one(graphs_as_recorded: list[Any]) -> None:
    """Of the same name, and with the same graph as far as one can see: what is known must not be taken for it."""
    cell: dict[str, Any] = {"torch": torch, "random": random, "weight": torch.tensor([2.0, 3.0])}
    x = torch.ones(2)
    for source, expected in (
        ("def function(x): return (x * weight,)", [2.0, 3.0]),
        ("def function(x): return (x * weight + 1.0,)", [3.0, 4.0]),
        ("def function(x): return (x * weight + 1.00000012,)", [3.0, 4.0]),
        ("other = weight + 5.0\ndef function(x): return (x * other,)", [7.0, 8.0]),
        ("def function(x): return (x * weight.double(),)", [2.0, 3.0]),
    ):
        exec(source, cell)
        (found,) = Compiled(cell["function"], what="it")(x)  # type: ignore[misc]
        torch.testing.assert_close(found, torch.tensor(expected).to(found))
    assert len(graphs_as_recorded) == 4  # the fourth is the first at other numbers
    exec("def function(x): return (x * torch.tensor([random.random(), 1.0]),)", cell)
    with pytest.warns(UserWarning, match="numbers that are not torch's"):
        assert Compiled(cell["function"], what="it")(x) is None
    exec("weight = torch.tensor([9.0, 9.0])", cell)
    exec("def function(x): return (x * weight,)", cell)
    assert Compiled(cell["function"], what="it")(x)[0].tolist() == [9.0, 9.0]  # type: ignore[index]


def test_what_was_verified_is_recorded_once_and_what_looks_like_it_is_not_trusted(
    monkeypatch: pytest.MonkeyPatch, graphs_as_recorded: list[Any]
) -> None:
    recordings: list[Any] = []
    original = recording._record
    monkeypatch.setattr(recording, "_record", lambda *args: (recordings.append(args), original(*args))[1])
    weight, number, x = torch.tensor([2.0, 3.0]), 0.5, torch.ones(2)

    def function(x: Tensor) -> tuple[Tensor, ...]:
        return (x * weight * torch.tensor(number),)

    def count(function: Callable[..., Any] = function) -> int:
        recordings.clear()
        (found,) = Compiled(function, what="it", programs=[function])(x)  # type: ignore[misc]
        assert found.tolist() == (weight * number).tolist()
        return len(recordings)

    assert [count(), count()] == [2, 1]
    weight = torch.tensor([2.0, 3.0])  # another tensor, which may be made anew in every run
    assert [count(), count()] == [2, 1]
    number = 0.25
    assert [count(), count()] == [2, 1]
    with pytest.warns(UserWarning, match="numbers that are not torch's"):
        assert Compiled(lambda x: (x * weight * torch.tensor(random.random()),), what="it")(x) is None

    def edited(x: Tensor) -> tuple[Tensor, ...]:
        return (x * weight * torch.tensor(number if random.random() < 2 else 3.0),)  # the graph has remained

    assert [count(edited), count(edited)] == [2, 1]


def test_default_types_are_part_of_a_program(graphs_as_recorded: list[Any]) -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        return (x / 3,)

    x = torch.tensor([1, 2])
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        (found,) = Compiled(function, what="it")(x)  # type: ignore[misc]
        torch.testing.assert_close(found, function(x)[0])
    torch.set_default_dtype(torch.float32)
    assert len(graphs_as_recorded) == 2


def test_gradients_that_vanish_are_no_reason(graphs_as_recorded: list[Any]) -> None:
    """They are what rounding leaves of large numbers, and another order of adding leaves something else."""

    def noisy(outputs: tuple[Tensor, ...]) -> list[Tensor]:
        return [outputs[0], outputs[1] + 1e-5 * torch.randn(2)]

    outputs = torch.tensor(300.0), 1e-6 * torch.ones(2)
    assert compiled._close(tuple(noisy(outputs)), outputs, compiled.TOLERANCE)
    assert not compiled._close((outputs[0] * 1.01, outputs[1]), outputs, compiled.TOLERANCE)
    assert not compiled._close((outputs[0], outputs[1] + 1e-2), outputs, compiled.TOLERANCE)


@needs_compiler
@pytest.mark.parametrize("threads", [2])
def test_the_number_of_threads_does_not_change_what_it_is(threads: int) -> None:
    weight = torch.randn(7, 7)

    def function(x: Tensor) -> tuple[Tensor, ...]:
        return ((x @ weight).tanh().sum(0) + torch.randn(7),)

    fast, x = Compiled(function, what="it"), torch.randn(20_011, 7)
    before = torch.get_num_threads()
    found = []
    try:
        for number in (before, threads, before):
            torch.set_num_threads(number)
            torch.manual_seed(1)
            found.append(fast(x))
            for _ in range(compiled.PATIENCE if found[-1] is None else 0):
                torch.manual_seed(1)
                found[-1] = fast(x)
    finally:
        torch.set_num_threads(before)
    assert found[0] is not None
    assert torch.equal(found[0][0], found[2][0])
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-3)


def test_without_a_compiler_it_runs_eagerly(x: Tensor) -> None:
    options: dict[str, Any] = {"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}
    with torch._inductor.config.patch(options):
        check_eager(small_vae, (x,), "the compiler refused it", epochs=1)


# ---------------------------------------------------------------------------------------------------------------
# Training.


class Spying(Trained):
    """Keeps what there was, for a look afterwards."""

    seen: list[Trained] = []  # noqa: RUF012

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        Spying.seen.append(self)


def trained(make: Callable[[], Any], data: tuple[Any, ...], **options: Any) -> SimpleNamespace:
    """What becomes of a pair that is made anew, and of the random state."""
    pyro.clear_param_store()
    torch.manual_seed(3)
    random.seed(3)
    pair = make()
    options["objective"] = options.get("objective", Trace_ELBO)()
    history = fit(pair.model, pair.guide, *data, seed=None, **(OPTIONS | options))
    modules = [value for value in vars(pair).values() if isinstance(value, nn.Module)]
    modules += [pair] if isinstance(pair, nn.Module) else []
    state = {f"{i} {name}": value for i, m in enumerate(modules) for name, value in m.state_dict().items()}
    state |= {name: pyro.param(name).detach() for name in pyro.get_param_store().keys()}  # noqa: SIM118
    random_state = torch.get_rng_state(), random.getstate()
    return SimpleNamespace(history=history, state=state, random_state=random_state)


def check_same(one: Any, other: Any, tolerance: float) -> None:
    for field in ("loss", "bound", "validation"):
        expected = getattr(other.history, field)
        assert getattr(one.history, field) == pytest.approx(expected, rel=tolerance, abs=tolerance)
    assert list(one.state) == list(other.state)
    for name, value in one.state.items():
        torch.testing.assert_close(value, other.state[name], rtol=tolerance, atol=10 * tolerance)
    assert torch.equal(one.random_state[0], other.random_state[0])
    assert one.random_state[1] == other.random_state[1]


def check_compiled(make: Callable[[], Any], data: tuple[Any, ...], *, tolerance: float = 1e-9, **options: Any) -> None:
    """That it is compiled, without a word, and comes to the same."""
    one = trained(make, data, compile=True, **options)
    check_same(one, trained(make, data, compile=False, **options), tolerance)


def check_eager(
    make: Callable[[], Any], data: tuple[Any, ...], reason: str, *, tolerance: float = 0.0, **options: Any
) -> None:
    """That it runs eagerly, with one warning, and comes to the same: to the last bit, if it always did."""
    sentence = f"^The training step is not compiled, because .*({reason}).* It runs eagerly, to the same results"
    with pytest.warns(UserWarning, match=sentence) as said:
        one = trained(make, data, compile=True, **options)
    assert sum("is not compiled" in str(warning.message) for warning in said) == 1
    check_same(one, trained(make, data, compile=False, **options), tolerance)


def learned(form: str) -> Any:
    """The linear-Gaussian pair in that form, with an encoder to be trained, in float64."""
    lg, encoder = pairs.linear_gaussian(), nn.Linear(7, 6).double()

    def q(x: Tensor) -> dist.Distribution:
        pyro.module("encoder", encoder)
        loc, log_scale = encoder(x).chunk(2, -1)
        return dist.Normal(loc, log_scale.exp()).to_event(1)

    model, guide = pairs.FORMS[form](lg, q)
    return SimpleNamespace(model=model, guide=guide)


@pytest.mark.parametrize("form", pairs.FORMS)
def test_every_form_of_a_pair(form: str, graphs_as_recorded: list[Any]) -> None:
    x = pairs.simulated(pairs.linear_gaussian())
    objective = (lambda: DReG(num_particles=2)) if form.startswith(("as_m", "with_pix", "with_sub")) else Trace_ELBO
    check_compiled(lambda: learned(form), (x,), objective=objective)
    assert len(graphs_as_recorded) == 1


OBJECTIVES: dict[str, Callable[[], Any]] = {
    "several at once": lambda: Trace_ELBO(num_particles=3, vectorize_particles=True),
    "several in turn": lambda: Trace_ELBO(num_particles=2),
    "mean field": TraceMeanField_ELBO,
    "iwae": lambda: IWAE(num_particles=3),
    "stl": StickingTheLanding,
    "vimco": lambda: VIMCO(num_particles=3),
    "warm-up": lambda: BetaELBO(lambda t: 1.0 + t * t),
    "from nothing": lambda: BetaELBO(lambda t: min(1.0, t)),
    "analytic": AnalyticKL,
    "free bits": lambda: FreeBits(0.3),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective(name: str, x: Tensor, graphs_as_recorded: list[Any]) -> None:
    """A schedule is followed step by step, of the objective and of the learning rate; with a shorter last batch."""
    options: dict[str, Any] = {"validation": x[:13], "learning_rate": lambda t: 1e-2 * 0.1**t}
    check_compiled(small_vae, (x,), objective=OBJECTIVES[name], tolerance=1e-5, **options)
    assert len(graphs_as_recorded) == 1


def test_a_schedule_that_stands_still_would_be_noticed(
    x: Tensor, graphs_as_recorded: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BetaELBO, "at", lambda self, pair, args, *numbers: self._terms(pair, args))
    with pytest.raises(AssertionError):
        check_compiled(small_vae, (x,), objective=lambda: BetaELBO(lambda t: 1.0 + t * t), tolerance=1e-5)


class Flipping:
    """A Bernoulli latent, with a guide to be trained by its score."""

    def __init__(self) -> None:
        self.encoder, self.decoder = nn.Linear(7, 3).double(), nn.Linear(3, 7).double()

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((3,), 0.3).double()).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=self.encoder(x)).to_event(1))


class Classes:
    """A discrete latent to be summed out."""

    def __init__(self) -> None:
        self.decoder = nn.Embedding(5, 7).double()

    @config_enumerate
    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(5).double()))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(k)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pass


@pytest.mark.parametrize("objective", [Trace_ELBO, lambda: VIMCO(num_particles=3)], ids=["score", "vimco"])
def test_a_discrete_latent(objective: Any, x: Tensor, graphs_as_recorded: list[Any]) -> None:
    check_compiled(Flipping, (x.double(),), objective=objective)
    assert len(graphs_as_recorded) == 1


def test_a_discrete_latent_that_is_summed_out(x: Tensor, graphs_as_recorded: list[Any]) -> None:
    reason = r"reads the value of a tensor \(bool\) in compute_expectation"
    check_eager(Classes, (x.double(),), reason, objective=TraceEnum_ELBO)


def programs(make: Callable[[], tuple[nn.Module, Any]]) -> Any:
    model, pair = small_vae(), make()
    return SimpleNamespace(model=pair[0], guide=pair[1], vae=model)


def of_auto_normal() -> Any:
    model = learned("as_functions").model
    return SimpleNamespace(model=model, guide=AutoNormal(model))


@pytest.mark.parametrize(
    ("make", "batch_size"),
    [(of_auto_normal, 11), (lambda: coin, BATCH), (lambda: linear.hierarchical()[0], BATCH)],
    ids=["autoguide", "pyro.param", "hierarchical"],
)
def test_parameters_wherever_they_are(make: Any, batch_size: int, graphs_as_recorded: list[Any]) -> None:
    x = pairs.simulated(pairs.linear_gaussian())
    check_compiled(make, (x.gt(0).float()[:, 0] if make() is coin else x,), batch_size=batch_size, epochs=4)
    assert len(graphs_as_recorded) == 1


class Around:
    """A small VAE with something around its model."""

    def __init__(self, around: Callable[[Any, Tensor], Any]) -> None:
        self.vae, self.around, self.number = small_vae(), around, 0.0

    def model(self, x: Tensor, *others: Any) -> None:
        scale = self.around(self, x)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            logits = pyro.module("decoder", self.vae.model.decoder)(z) * scale
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x: Tensor, *others: Any) -> None:
        pyro.module("encoder", self.vae.guide.encoder)
        self.vae.guide(x)


def _of_branch(self: Any, x: Tensor) -> Any:
    return 2.0 if x.mean() > 0.5 else 1.0


STEPS: dict[str, tuple[Callable[[], Any], str, dict[str, Any]]] = {
    "if": (lambda: Around(_of_branch), r"reads the value of a tensor \(bool\) in ", {}),
    "float": (lambda: Around(lambda self, x: 1 + float(x.mean())), r"reads the value of a tensor \(float\) in ", {}),
    "numpy": (
        lambda: Around(lambda self, x: x.numpy().mean().item()),
        r"reads the value of a tensor \(numpy\) in ",
        {},
    ),
    "mask": (lambda: Around(lambda self, x: 1 + x[x > 0].mean()), "depends on values", {}),
    "random": (lambda: Around(lambda self, x: random.random()), "does not do the same in every run", {}),
    "seed": (lambda: Around(lambda self, x: torch.manual_seed(5) and torch.rand(())), "gives other numbers", {}),
    "batch normalisation": (
        lambda: small_vae(encoder=nn.Sequential(nn.Linear(7, 4), nn.BatchNorm1d(4))),
        "as a batch normalisation in training mode does",
        {},
    ),
    "batch normalisation, weighted": (
        lambda: small_vae(encoder=nn.Sequential(nn.Linear(7, 4), nn.BatchNorm1d(4))),
        "as a batch normalisation in training mode does",
        {"objective": AnalyticKL},
    ),
    "recorded": (
        small_vae,
        "JitTrace_ELBO records the programs itself",
        {"objective": lambda: JitTrace_ELBO(ignore_jit_warnings=True)},
    ),
    "renyi": (
        small_vae,
        "RenyiELBO computes its gradient itself",
        {"objective": lambda: RenyiELBO(num_particles=2, vectorize_particles=True)},
    ),
    "in parts": (
        small_vae,
        "max_particles_at_once has particles computed again",
        {"objective": lambda: IWAE(num_particles=3, max_particles_at_once=2)},
    ),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.*:FutureWarning")
@pytest.mark.parametrize("name", STEPS)
def test_what_is_not_compiled_is_trained_as_ever(name: str, x: Tensor, graphs_as_recorded: list[Any]) -> None:
    make, reason, options = STEPS[name]
    check_eager(make, (x[:44],), reason, **options)


def test_a_count_in_the_program_is_found_out(x: Tensor, graphs_as_recorded: list[Any]) -> None:
    def counted(self: Any, x: Tensor) -> float:
        self.number += 1.0
        return self.number

    pair = Around(counted)
    with pytest.warns(UserWarning, match="does not do the same in every run"):
        fit(pair.model, pair.guide, x, compile=True, **OPTIONS)


def test_batches_of_many_lengths_and_of_other_things_than_tensors(x: Tensor, graphs_as_recorded: list[Any]) -> None:
    ends = np.cumsum(range(3, 13))
    rows = [list(range(start, end)) for start, end in zip([0, *ends], ends, strict=False)]
    long = torch.cat([x, x])
    make = lambda: DataLoader(long, batch_sampler=rows)  # type: ignore[arg-type] # noqa: E731
    check_eager(small_vae, (make(),), "arguments come in more than 8 shapes", epochs=1, tolerance=1e-6)
    named = DataLoader([(row, "a name") for row in x], batch_size=BATCH)  # type: ignore[arg-type]
    check_eager(lambda: Around(lambda self, x: 1.0), (named,), "a batch holds other things than tensors", epochs=1)


def test_semi_supervised_learning_is_compiled_or_trained_as_ever(x: Tensor, graphs_as_recorded: list[Any]) -> None:
    label = torch.arange(NUM_DATA) % 6 - 1
    make = lambda: pv.M2(7, 5, 2, hidden_dims=(5,))  # noqa: E731
    check_eager(make, (x, label), "reads the value of a tensor", objective=lambda: pv.SemiSupervisedELBO(3.0))


def test_a_dropout_is_on_and_new_in_every_step(x: Tensor, graphs_as_recorded: list[Any]) -> None:
    make = lambda: small_vae(encoder=nn.Sequential(nn.Dropout(0.5), nn.Linear(7, 4)))  # noqa: E731
    check_compiled(make, (x,), tolerance=1e-5)
    pair = make()
    batches = Batches((x,), NUM_DATA)
    step = Trained(pair.model, pair.guide, AnalyticKL(), batches, compile=True)
    step.set_learning_rate(0.0)
    losses = [step.step(next(batches.ordered()), "here")[0] for _ in range(4)]
    assert len(set(losses)) == 4
    assert step.graph is not None
    assert step.graph.compiled.cause is None


@needs_compiler
def test_two_parameters_in_one_memory_are_updated_one_after_the_other(x: Tensor) -> None:
    def make() -> Any:
        pair = Around(lambda self, x: 1.0 + pyro.module("again", pair.again)[0].square().mean())  # type: ignore[has-type]
        pair.again = nn.ParameterList([nn.Parameter(pair.vae.model.decoder.bias.data)])
        return pair

    check_compiled(make, (x,), tolerance=1e-5)


def test_a_second_way_to_a_parameter_is_a_reason(x: Tensor, graphs_as_recorded: list[Any]) -> None:
    """A graph would be free to read it after the parameter has been updated."""

    def make() -> Any:
        pair = Around(lambda self, x: 1.0 + pair.alias.square().mean())  # type: ignore[has-type]
        pair.alias = pair.vae.model.decoder.weight.detach()
        return pair

    check_eager(make, (x,), "it writes to memory that it reaches in two ways")


def test_parameters_that_take_part_only_in_long_batches(x: Tensor, graphs_as_recorded: list[Any]) -> None:
    def make() -> Any:
        pair = Around(lambda self, x: pair.scale[0] if len(x) == BATCH else pair.scale[1])  # type: ignore[has-type]
        pair.vae.model.scale = pair.scale = nn.ParameterList([nn.Parameter(torch.ones(())) for _ in range(2)])
        inner = pair.model
        pair.model = lambda x: (pyro.module("scale", pair.scale), inner(x))[1]  # type: ignore[method-assign]
        return pair

    def run(compile: bool) -> Any:
        with pytest.warns(UserWarning, match="received no gradient in the first step"):
            return trained(make, (x,), compile=compile, epochs=6)

    compiled.PATIENCE, patience = 2, compiled.PATIENCE
    try:
        check_same(run(True), run(False), 1e-5)
    finally:
        compiled.PATIENCE = patience
    assert len(graphs_as_recorded) == 2


def test_a_gradient_in_another_order_of_memory_is_put_in_that_of_its_parameter(graphs_as_recorded: list[Any]) -> None:
    """A fused Adam goes through both as they lie in memory."""

    class Tied:
        def __init__(self) -> None:
            self.one, self.other = nn.Linear(3, 5).double(), nn.Linear(5, 3).double()

        def model(self, x: Tensor) -> None:
            pyro.module("one", self.one)
            pyro.module("other", self.other)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))
                loc = z @ (self.one.weight.T + self.other.weight) + self.one.bias + self.other.bias.sum()
                pyro.sample("x", dist.Normal(loc, 1.0).to_event(1), obs=x[:, :5])

        def guide(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                loc = pyro.param("loc", torch.zeros(3).double())
                pyro.sample("z", dist.Normal(loc, 0.5).to_event(1))

    x = pairs.simulated(pairs.linear_gaussian())
    check_compiled(Tied, (x,), epochs=5)
    check_compiled(Tied, (x,), epochs=5, clip_norm=1e-2)


@pytest.mark.parametrize("compile", [False, True])
def test_a_run_goes_on_where_it_stopped_compiled_or_not(
    compile: bool, x: Tensor, tmp_path: Path, graphs_as_recorded: list[Any]
) -> None:
    """From a checkpoint of the other kind, and of the same."""
    data, tail = (x[:33],), {"validation": x[33:40]}
    whole = trained(small_vae, data, compile=compile, objective=lambda: VIMCO(num_particles=2), **tail, epochs=4)
    for first in (False, True):
        options = tail | {"checkpoint": tmp_path / f"{first}", "objective": lambda: VIMCO(num_particles=2)}
        trained(small_vae, data, compile=first, **options, epochs=2)
        resumed = trained(small_vae, data, compile=compile, resume=True, **options, epochs=4)
        check_same(resumed, whole, 0.0 if first == compile else 1e-5)


def test_adam_counts_the_steps_that_are_not_in_the_graph(
    monkeypatch: pytest.MonkeyPatch, graphs_as_recorded: list[Any]
) -> None:
    """Every epoch ends with a short batch, which has no graph; the mutant does not count it."""
    check_compiled(lambda: learned("as_modules"), (pairs.simulated(pairs.linear_gaussian()),), batch_size=5)
    monkeypatch.setattr(Update, "done_without", lambda self: None)
    with pytest.raises(AssertionError):
        check_compiled(lambda: learned("as_modules"), (pairs.simulated(pairs.linear_gaussian()),), batch_size=5)


def failing(make: Callable[[], Any], x: Tensor, **options: Any) -> list[str]:
    """What is said, compiled and not."""
    said = []
    for compile in (False, True):
        with pytest.raises((ValueError, RuntimeError)) as caught:
            trained(make, (x,), compile=compile, **options)
        said.append(str(caught.value))
    return said


def test_what_goes_wrong_is_said_as_ever(x: Tensor, graphs_as_recorded: list[Any]) -> None:
    grey = x.clone()
    grey[30] = 0.5
    one, other = failing(small_vae, grey)
    assert one == other
    assert "A Bernoulli likelihood scores data in {0, 1}" in one
    one, other = failing(small_vae, x, learning_rate=lambda t: torch.inf if t > 0.5 else 1e-3)
    assert one == other
    assert "no longer finite in epoch 2, batch" in one

    def make() -> Any:
        return Around(lambda self, x: (pyro.module("decoder", self.vae.model.decoder).bias[0] * 0.0 + 0.0).sqrt() + 1)

    one, other = failing(make, x)
    assert one == other
    assert "The gradient of" in one


def test_a_cell_that_was_edited_is_trained_as_it_is(x: Tensor, graphs_as_recorded: list[Any]) -> None:
    """Functions of the same names; a constant, a network by a global name, and the functions changed in turn."""
    cell: dict[str, Any] = {"pyro": pyro, "dist": dist, "torch": torch, "temperature": 1.0}
    source = """
def model(x):
    pyro.module("decoder", decoder)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=temperature * decoder(z)).to_event(1), obs=x)

def guide(x):
    pyro.module("encoder", encoder)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(encoder(x), 0.5).to_event(1))
"""
    edits: list[Callable[[], Any]] = [
        lambda: exec(source, cell),
        lambda: cell.update(temperature=0.5),
        lambda: cell.update(decoder=nn.Sequential(cell["decoder"], nn.Softplus())),
        lambda: exec(source.replace("encoder(x), 0.5", "encoder(x), 0.3"), cell),
        lambda: exec(source.replace("temperature *", "temperature +"), cell),
        lambda: exec(source, cell),
    ]
    cell["encoder"], cell["decoder"] = nn.Linear(7, 2), nn.Linear(2, 7)
    losses = set()
    for edit in edits:
        edit()
        found = []
        for compile in (True, False):
            pyro.clear_param_store()
            torch.manual_seed(4)
            for network in (cell["encoder"], cell["decoder"]):
                for layer in network.modules():
                    if isinstance(layer, nn.Linear):
                        layer.reset_parameters()
            found.append(fit(cell["model"], cell["guide"], x, compile=compile, **OPTIONS).loss)
        assert found[0] == pytest.approx(found[1], rel=1e-5)
        losses.add(found[1][-1])
    assert len(losses) == len(edits) - 1  # the last undoes


@needs_compiler
def test_by_the_compiler_the_gradient_is_that_of_an_eager_step(x: Tensor) -> None:
    """In float32 to 1e-5, step by step, with a dropout, clipping, a schedule, and a shorter last batch."""
    make = lambda: small_vae(encoder=nn.Sequential(nn.Linear(7, 4), nn.Dropout(0.3)))  # noqa: E731
    options: dict[str, Any] = {"objective": lambda: BetaELBO(lambda t: 1.0 + t), "clip_norm": 3.0}
    check_compiled(make, (x,), tolerance=1e-5, **options)


@needs_compiler
def test_by_the_compiler_what_is_rounded_is_rounded_where_an_eager_run_is() -> None:
    """Left to itself it keeps all digits between two operations, which is 3e-3 from an eager run here."""
    torch.manual_seed(5)
    x, weights = torch.randn(131, 37), [torch.randn(37, 37) / 6 for _ in range(4)]

    def function(x: Tensor) -> tuple[Tensor, ...]:
        for weight in weights:
            x = (x @ weight).tanh() * 1.1 + x
        return (x,)

    with torch.autocast("cpu", torch.bfloat16):
        found, (expected,) = Compiled(function, what="it")(x), function(x)
    assert found is not None
    assert (found[0] - expected).norm() < 1e-4 * expected.norm()


@needs_compiler
def test_what_the_compiler_draws_in_another_way_is_refused() -> None:
    """It makes a Bernoulli's number of a uniform one in float32, whatever is asked for."""
    x = torch.full((5,), 0.4, dtype=torch.float64)
    with pytest.warns(UserWarning, match="other numbers than the program, .* a Bernoulli's in float64"):
        assert Compiled(lambda x: (torch.bernoulli(x),), what="it")(x) is None


# ---------------------------------------------------------------------------------------------------------------
# Evaluation.


def scored(pair: Any, x: Tensor, compile: bool, **options: Any) -> Tensor:
    found = importance_sampling(pair.model, pair.guide, x, compile=compile, **options)
    return torch.stack([found.log_px, found.standard_error, found.elbo, found.ess])


@pytest.mark.parametrize("num_samples", [3, 1031])
def test_evidence_is_that_of_an_eager_run(num_samples: int, x: Tensor, graphs_as_recorded: list[Any]) -> None:
    """Over several blocks, of which the last is not full; the first run on each datum is eager, for validation."""
    vae = small_vae()
    state = torch.get_rng_state()
    found = scored(vae, x, True, num_samples=num_samples, max_rows=97)
    assert torch.equal(torch.get_rng_state(), state)
    expected = scored(vae, x, False, num_samples=num_samples, max_rows=97)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert len(graphs_as_recorded) >= 1


@needs_compiler
def test_by_the_compiler_evidence_is_that_of_an_eager_run(x: Tensor) -> None:
    vae = small_vae()
    found, again = (scored(vae, x, True, num_samples=101, max_rows=700) for _ in range(2))
    assert torch.equal(found, again)
    torch.testing.assert_close(found, scored(vae, x, False, num_samples=101, max_rows=700), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, scored(vae, x, True, num_samples=101, max_rows=700, seed=1))


def test_what_is_not_compiled_is_scored_as_ever(x: Tensor, graphs_as_recorded: list[Any]) -> None:
    def peeping(x: Tensor) -> None:
        if x.sum() > -1:
            vae.guide(x)

    vae, around = small_vae(), Around(_of_branch)
    cases = [
        (around, r"Scoring is not compiled, because .* \(bool\) in _of_branch", {}),
        (
            SimpleNamespace(model=vae.model, guide=peeping),
            r"Drawing is not compiled, because .* \(bool\) in peeping",
            {},
        ),
        (vae, "Scoring is not compiled, because .* is fitted to each block", {"proposal": pv.proposals.Defensive()}),
    ]
    for pair, sentence, options in cases:
        with pytest.warns(UserWarning, match=sentence) as said:
            found = scored(pair, x[:13], True, num_samples=1031, max_rows=97, **options)
        assert len(said) == 1
        assert torch.equal(found, scored(pair, x[:13], False, num_samples=1031, max_rows=97, **options))


def test_grey_pixels_are_refused_in_whatever_block(graphs_as_recorded: list[Any]) -> None:
    x = torch.ones(300, 7)
    x[-1, 1] = 0.5
    vae = small_vae()
    with pytest.raises(ValueError, match=r"A Bernoulli likelihood scores data in \{0, 1\}"):
        scored(vae, x, True, num_samples=101)


def test_weights_that_change_in_place_are_seen(x: Tensor, graphs_as_recorded: list[Any]) -> None:
    vae, found = small_vae(), []
    for _ in range(2):
        found.append(scored(vae, x, True, num_samples=101, max_rows=97))
        torch.testing.assert_close(found[-1], scored(vae, x, False, num_samples=101, max_rows=97), rtol=1e-4, atol=1e-5)
        vae.load_state_dict({name: 0.5 * value for name, value in vae.state_dict().items()})
    assert not torch.allclose(*found)
    assert len(graphs_as_recorded) == 2
