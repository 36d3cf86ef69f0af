"""Operations in other words are the same function: of every way to sum the bits of a datum, and of nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from ppl_vae.compiling import Recording, recorded, rewriting

Summed = Callable[[Tensor, Tensor], Tensor]
BITS = torch.ops.aten.binary_cross_entropy_with_logits.default


def bits(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return 7 * torch.randn(shape, dtype=dtype), torch.randint(2, shape).to(dtype)


def with_gradient(summed: Summed) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    def function(logits: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits.detach().requires_grad_()
        total = summed(logits, x)
        (gradient,) = torch.autograd.grad(total.square().sum(), logits)
        return total.detach(), gradient

    return function


def of(summed: Summed, inputs: tuple[Tensor, ...]) -> tuple[Recording, bool]:
    """The graph, and whether it takes the logarithm of each bit."""
    recording = recorded(with_gradient(summed), inputs)
    return recording, bool(recording.graph.graph.find_nodes(op="call_function", target=BITS))


def distance(recording: Recording, summed: Summed, inputs: tuple[Tensor, ...]) -> float:
    found = recording.graph(*inputs, *recording.lifted)
    expected = with_gradient(summed)(*inputs)
    return max(float((f - e).abs().max() / e.abs().max()) for f, e in zip(found, expected, strict=True))


WAYS: dict[str, tuple[Summed, tuple[int, ...]]] = {
    "a Bernoulli": (lambda logits, x: dist.Bernoulli(logits=logits).to_event(1).log_prob(x), (5, 37)),
    "of samples": (lambda logits, x: dist.Bernoulli(logits=logits).to_event(1).log_prob(x[0]), (3, 5, 37)),
    "of images": (lambda logits, x: dist.Bernoulli(logits=logits).to_event(2).log_prob(x), (5, 7, 11)),
    "of probabilities": (lambda eta, x: dist.Bernoulli(eta.sigmoid()).to_event(1).log_prob(x), (5, 37)),
    "by hand": (lambda logits, x: cross_entropy(logits, x, reduction="none").sum(-1), (5, 37)),
    "by hand, from the front": (lambda logits, x: -cross_entropy(logits, x, reduction="none").sum(1), (5, 37)),
    "negated twice": (lambda logits, x: cross_entropy(logits, x, reduction="none").neg().neg().sum(-1), (5, 37)),
    "fewer than are multiplied": (lambda logits, x: dist.Bernoulli(logits=logits).to_event(1).log_prob(x), (5, 11)),
}


@pytest.mark.parametrize("way", WAYS)
def test_bits_are_summed_together(way: str) -> None:
    summed, shape = WAYS[way]
    inputs = bits(*shape)
    recording, one_by_one = of(summed, inputs)
    assert not one_by_one
    other = tuple(part.flip(0) for part in inputs)
    assert distance(recording, summed, other) < 1e-12


@pytest.mark.parametrize("way", ["a Bernoulli", "by hand"])
def test_data_that_the_function_reaches_by_itself(way: str) -> None:
    summed, shape = WAYS[way]
    logits, x = bits(*shape)

    def of_logits(logits: Tensor, _: Tensor) -> Tensor:
        return summed(logits, x)

    recording, one_by_one = of(of_logits, (logits, x.flip(0)))
    assert not one_by_one
    assert distance(recording, of_logits, (logits.flip(0), x)) < 1e-12


LEFT: dict[str, Summed] = {
    "over the data": lambda logits, x: cross_entropy(logits, x, reduction="none").sum(0),
    "dimension kept": lambda logits, x: cross_entropy(logits, x, reduction="none").sum(-1, keepdim=True),
    "both dimensions": lambda logits, x: cross_entropy(logits, x, reduction="none").sum((0, 1)),
    "reduced by itself": lambda logits, x: cross_entropy(logits, x, reduction="sum"),
    "weighted": lambda logits, x: cross_entropy(logits, x, weight=x + 0.5, reduction="none").sum(-1),
    "used twice": lambda logits, x: (lambda each: each.sum(-1) + each.amax(-1))(
        cross_entropy(logits, x, reduction="none")
    ),
    "a part of it": lambda logits, x: cross_entropy(logits, x, reduction="none")[:, ::2].sum(-1),
}


@pytest.mark.parametrize("way", LEFT)
def test_what_is_not_a_sum_of_the_bits_of_a_datum_is_left(way: str) -> None:
    inputs = bits(5, 37)
    recording, one_by_one = of(LEFT[way], inputs)
    assert one_by_one
    assert distance(recording, LEFT[way], tuple(part.flip(0) for part in inputs)) < 1e-12


def test_numbers_of_few_digits_are_left() -> None:
    assert of(WAYS["by hand"][0], bits(5, 37, dtype=torch.bfloat16))[1]


def test_single_precision_is_as_good_as_one_by_one() -> None:
    summed, _ = WAYS["a Bernoulli"]
    logits, x = bits(5, 784, dtype=torch.float32)
    recording, _ = of(summed, (logits, x))
    found, _ = recording.graph(logits, x)
    torch.testing.assert_close(found.double(), summed(logits.double(), x.double()), rtol=1e-6, atol=0)


def forgets_the_sign(logits: Tensor, x: Tensor, *, shape: torch.Size, sign: int) -> Tensor:
    return rewriting.log_prob_of_bits(logits.reshape(shape), x.reshape(shape))


def forgets_the_shape(logits: Tensor, x: Tensor, *, shape: torch.Size, sign: int) -> Tensor:
    return (sign * rewriting.log_prob_of_bits(logits, x)).reshape(*shape[:-1], -1)[..., 0]


@pytest.mark.parametrize(("mutant", "way"), [(forgets_the_sign, "by hand"), (forgets_the_shape, "of images")])
def test_mutants_are_caught(mutant: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewriting, "_score", mutant)
    summed, shape = WAYS[way]
    inputs = bits(*shape)
    assert not distance(of(summed, inputs)[0], summed, inputs) < 1e-3
