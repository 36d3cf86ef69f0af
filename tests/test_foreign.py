"""Pairs that this project did not write: `fit` trains all of them, compiled or with a reason why not; and log p(x)."""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict
from typing import Any

import foreign
import pyro
import pytest
import torch
from foreign import Foreign
from torch import Tensor, nn
from torch.utils.data import DataLoader

import ppl_vae as pv
from ppl_vae.compiling import compiled

DRAWS = 7
# Why a step of these is not compiled; all others are.
REASONS = {
    "supervised": r"it reads the value of a tensor \(bool\) in compute_expectation \(util.py, line \d+\)",
    "unsupervised": r"it reads the value of a tensor \(bool\) in compute_expectation \(util.py, line \d+\)",
    "supervised_now_and_then": r"it reads the value of a tensor \(bool\) in compute_expectation \(util.py, line \d+\)",
    "cvae": r"the shape of a tensor in it depends on values \(index\)",
    "deep_markov_packed": r"a batch holds other things than tensors",
}


@pytest.fixture
def run_as_recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Runs graphs without the compiler, which takes up to a minute for each, and lists them."""
    graphs: list[Any] = []

    def kept(graph: Any, *_: Any, **__: Any) -> Any:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch._inductor, "compile", kept)
    monkeypatch.setattr(compiled, "_PROGRAMS", OrderedDict())
    return graphs


def losses(pair: Foreign) -> Tensor:
    """The loss per datum of all data at once, or of the batches that the pair brings, with new noise each time."""
    batches = list(pair.data[0]) if isinstance(pair.data[0], DataLoader) else [pair.data]
    count = sum(len(batch[0]) for batch in batches)
    with torch.no_grad():
        totals = [sum(pair.objective.loss(pair.model, pair.guide, *b) for b in batches) for _ in range(DRAWS)]
    return torch.tensor(totals, dtype=torch.float64) / count


def lowered(before: Tensor, after: Tensor) -> bool:
    """Whether the mean of the losses fell by more than noise can do."""
    return bool(before.mean() - after.mean() > 4.5 * ((before.var() + after.var()) / DRAWS).sqrt())


def weights(pair: Foreign) -> dict[str, Tensor]:
    """A copy of all parameters, by name."""
    owners: Any = [getattr(program, "__self__", program) for program in (pair.model, pair.guide)]
    parameters = [item for owner in owners if isinstance(owner, nn.Module) for item in owner.named_parameters()]
    return {name: parameter.detach().clone() for name, parameter in parameters}


def fit(
    pair: Foreign, *, epochs: int = 30, learning_rate: float = 0.03, **options: Any
) -> tuple[pv.History, list[str]]:
    """The history, and what was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = pv.fit(
            pair.model,
            pair.guide,
            *pair.data,
            objective=pair.objective,
            epochs=epochs,
            batch_size=pair.batch_size,
            learning_rate=learning_rate,
            progress=False,
            **options,
        )
    return history, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("name", foreign.PAIRS)
def test_it_trains_and_names_what_takes_no_part_in_the_loss(name: str) -> None:
    pair = foreign.PAIRS[name]()
    losses_before, weights_before = losses(pair), weights(pair)
    history, said = fit(pair)
    assert torch.tensor(history.loss).isfinite().all()
    assert lowered(losses_before, losses(pair))
    unmoved = [n for n, weight in weights(pair).items() if torch.equal(weight, weights_before[n])]
    assert unmoved == [n for n in weights_before if n.startswith(pair.without_gradient)]
    if unmoved:
        (sentence,) = said
        assert sentence.startswith("These parameters received no gradient")
        assert all(n in sentence for n in unmoved)
    else:
        assert said == []


def as_gradient_descent(name: str, *, compile: bool) -> tuple[list[float], Tensor, list[str]]:
    """Losses, changes of all weights and warnings of training by steps in proportion to the gradient.

    That is what Adam does for a large eps; otherwise a gradient of 0 up to rounding would decide on a full step.
    """
    pyro.clear_param_store()
    pyro.set_rng_seed(20)
    pair = foreign.PAIRS[name]()
    losses(pair)  # creates what is created lazily
    before = weights(pair)
    history, said = fit(pair, epochs=2, learning_rate=1.0, eps=100.0, compile=compile)
    return history.loss, torch.cat([(w - before[n]).flatten() for n, w in weights(pair).items()]), said


def check_alike(name: str) -> None:
    """Compiled as eager to rounding, or the very same with one warning more that says why."""
    eager_loss, eager, said_eagerly = as_gradient_descent(name, compile=False)
    loss, moved, said = as_gradient_descent(name, compile=True)
    if name in REASONS:
        (warning,) = (sentence for sentence in said if sentence not in said_eagerly)
        assert re.search(f"The training step is not compiled, because {REASONS[name]}", warning)
        assert len(said) == 1 + len(said_eagerly)
        assert loss == eager_loss
        assert torch.equal(moved, eager)
    else:
        assert said == said_eagerly
        assert loss == pytest.approx(eager_loss, rel=1e-5)
        assert (moved - eager).norm() < 1e-5 * eager.norm()


@pytest.mark.parametrize("name", foreign.PAIRS)
def test_a_graph_of_it_trains_as_it_does_or_the_reason_is_said(name: str, run_as_recorded: list[Any]) -> None:
    check_alike(name)
    assert len(run_as_recorded) == (name not in REASONS)


def test_compiled_it_trains_as_it_does() -> None:
    check_alike("vae")


def test_without_training_no_loss_falls_by_more_than_noise() -> None:
    for make in foreign.PAIRS.values():
        pair = make()
        before = losses(pair)
        fit(pair, epochs=2, learning_rate=1e-9)
        assert not lowered(before, losses(pair))


def test_weights_that_all_data_share_are_trained_by_batches_only_where_the_plate_says_how_many_there_are() -> None:
    with pytest.raises(ValueError, match="All data share the latent 'sigma', and each of 3 batches"):
        fit(foreign.regression(batch_size=foreign.BATCH_SIZE))
    pair = foreign.regression(batch_size=foreign.BATCH_SIZE, num_data=foreign.NUM_DATA)
    before = losses(pair)
    fit(pair)
    assert lowered(before, losses(pair))


def test_log_px_sums_over_the_classes_of_the_semi_supervised_pair() -> None:
    pair = foreign.unsupervised()
    x, num_classes = pair.data[0], foreign.NUM_CLASSES
    labels = torch.eye(num_classes).unsqueeze(1).expand(-1, len(x), -1)
    each = [pv.importance_sampling(pair.model, pair.guide, x, y, num_samples=1000) for y in labels]
    whole = pv.importance_sampling(pair.model, pair.guide, x, num_samples=1000)
    error = torch.stack([e.standard_error for e in [*each, whole]]).square().sum(0).sqrt()
    log_px = torch.stack([e.log_px for e in each]).logsumexp(0)
    assert ((whole.log_px - log_px).abs() < 4.5 * error).all()


@pytest.mark.parametrize(
    ("name", "eager_parts"),
    [
        ("vae", []),
        ("supervised", []),
        ("unsupervised", ["Drawing"]),
        ("cvae", ["Drawing", "Scoring"]),
        ("deep_markov", []),
    ],
)
def test_graphs_give_the_log_px_of_the_same_seed(name: str, eager_parts: list[str], run_as_recorded: list[Any]) -> None:
    pair = foreign.PAIRS[name]()
    eager = pv.importance_sampling(pair.model, pair.guide, *pair.data, num_samples=13)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = pv.importance_sampling(pair.model, pair.guide, *pair.data, num_samples=13, compile=True)
    torch.testing.assert_close(found.log_px, eager.log_px, rtol=1e-5, atol=0)
    assert len(run_as_recorded) == 2 - len(eager_parts)
    for warning, part in zip(caught, eager_parts, strict=True):
        assert re.search(f"{part} is not compiled, because .* (value of a|shape of a) tensor", str(warning.message))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("regression", "Site 'sigma' of the model is outside the plate 'data'"),
        ("deep_markov_packed", r"is scaled by 0.3 \(`poutine.scale`\)"),
    ],
)
def test_where_there_is_no_log_px_the_reason_is_said(name: str, sentence: str) -> None:
    pair = foreign.PAIRS[name]()
    data = next(iter(pair.data[0])) if isinstance(pair.data[0], DataLoader) else pair.data
    pair.guide(*data)
    with pytest.raises(ValueError, match=sentence):
        pv.importance_sampling(pair.model, pair.guide, *data, num_samples=3)
