"""The sum over bits that `Bernoulli` takes by products, against the sum of single log-probabilities; and mutants."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from math import inf, nan

import pyro
import pyro.distributions as dist
import pytest
import torch
from mpmath import mp, mpf
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from ppl_vae.likelihoods import Bernoulli, binary

SIZES = [1, 7, 16, 17, 64, 101, 784]  # none, some, or all of the numbers are multiplied


def bits(*shape: int, dtype: torch.dtype = torch.float64, scale: float = 5.0) -> tuple[Tensor, Tensor]:
    return scale * torch.randn(shape, dtype=dtype), torch.randint(2, shape).to(dtype)


def plain(logits: Tensor, x: Tensor) -> Tensor:
    """Σ log p of the bits one by one, in float64."""
    return dist.Bernoulli(logits=logits.double(), validate_args=False).log_prob(x.double()).sum(-1)


def values_and_gradients(score: Callable[[Tensor, Tensor], Tensor], logits: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    logits, x = logits.clone().requires_grad_(), x.clone().requires_grad_()
    total = unvalidated(logits, x)
    weights = torch.linspace(-1, 2, total.numel(), dtype=total.dtype).reshape(total.shape)
    return total.detach(), *torch.autograd.grad((weights * total).sum(), (logits, x))


def found(logits: Tensor, x: Tensor) -> Tensor:
    return Bernoulli()(logits).log_prob(x)


def unvalidated(logits: Tensor, x: Tensor) -> Tensor:
    return binary._Bernoulli(logits=logits, validate_args=False).to_event(1).log_prob(x)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [0.0, 0.1, 5.0, 300.0])
def test_the_sum_is_the_plain_one(size: int, scale: float) -> None:
    """To rounding in float64, and to 1e-6 in float32: values, and gradients of the logits and of the data."""
    exact = bits(5, size, scale=scale)
    for ours, truth in zip(values_and_gradients(unvalidated, *exact), values_and_gradients(plain, *exact), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
    single = tuple(t.float() for t in exact)
    for ours, truth in zip(
        values_and_gradients(unvalidated, *single), values_and_gradients(plain, *single), strict=True
    ):
        torch.testing.assert_close(ours.double(), truth.double(), rtol=1e-6, atol=1e-6)


def sum_of_mpmath(logits: Tensor, x: Tensor) -> float:
    terms = [(-1 if bit else 1) * mpf(eta) for eta, bit in zip(logits.tolist(), x.tolist(), strict=True)]
    return float(-sum(mp.log1p(mp.exp(term)) for term in terms))


def test_the_sum_is_that_of_mpmath() -> None:
    for size in (7, 101):
        for scale in (0.1, 5.0, 300.0):
            logits, x = bits(size, scale=scale)
            exact = sum_of_mpmath(logits, x)
            assert found(logits, x).item() == pytest.approx(exact, rel=1e-12)
            assert found(logits.float(), x.float()).item() == pytest.approx(exact, rel=1e-6)


def test_derivatives_of_both_orders() -> None:
    logits, x = bits(5, 19)
    leaves = logits.clone().requires_grad_(), x.clone().requires_grad_()
    assert torch.autograd.gradcheck(unvalidated, leaves)
    assert torch.autograd.gradgradcheck(unvalidated, leaves)
    slope = x - logits.sigmoid()
    bend = -torch.diag_embed(logits.sigmoid() * (1 - logits.sigmoid()))
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(unvalidated))(logits, x), slope)
    torch.testing.assert_close(torch.func.vmap(unvalidated, (0, None))(logits, x[0]), unvalidated(logits, x[0]))
    torch.testing.assert_close(torch.func.vmap(unvalidated, (None, 0))(logits[0], x), unvalidated(logits[0], x))
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacrev(unvalidated))(logits[0], x[0]), bend[0])


def test_the_program_is_recorded_with_its_gradient() -> None:
    """The graph of another batch gives that batch's values: nothing of the first was read."""

    def step(logits: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        score = unvalidated(logits, x)
        return score, *torch.autograd.grad(score.sum(), logits)

    def leaf(logits: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return logits.requires_grad_(), x

    graph = make_fx(step)(*leaf(*bits(5, 37)))
    other = leaf(*bits(5, 37, scale=50.0))
    for recorded, eager in zip(graph(*other), step(*other), strict=True):
        torch.testing.assert_close(recorded, eager, rtol=1e-12, atol=0)


def test_the_sum_compiles_to_one_graph() -> None:
    """Gradient included; `fullgraph` refuses any step back into Python."""
    compiled = torch.compile(lambda logits, x: binary._summed(logits, x, 1), fullgraph=True, backend="eager")
    batch = bits(5, 37)
    with pyro.validation_enabled():  # which torch.compile turns off, everywhere, and leaves off
        found = values_and_gradients(compiled, *batch)
    for ours, eager in zip(found, values_and_gradients(unvalidated, *batch), strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-12, atol=0)


@pytest.mark.parametrize("logit", [inf, -inf, 1e38, -1e38, 300.0, -300.0, 0.0, nan])
@pytest.mark.parametrize("bit", [0.0, 1.0])
@pytest.mark.parametrize("size", [3, 19])
def test_extreme_logits(logit: float, bit: float, size: int) -> None:
    """As the bits one by one; an impossible bit at an infinite logit has −∞, where those may have no value."""
    logits, x = torch.zeros(size), torch.zeros(size)
    logits[1], x[1] = logit, bit
    total = unvalidated(logits, x)
    assert total.item() == pytest.approx(plain(logits, x).item(), rel=1e-6, nan_ok=True) or (
        total == -inf and (logit, bit) == (-inf, 1.0)
    )
    (gradient,) = torch.autograd.grad(unvalidated(logits.requires_grad_(), x), logits)
    torch.testing.assert_close(gradient, x - logits.detach().sigmoid(), equal_nan=True)


def test_nan_in_the_data_stays() -> None:
    logits, x = bits(3, 19)
    x[1, 4] = nan
    assert unvalidated(logits, x).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("of_logits", "of_data"), [((11, 1, 3, 5), (7, 3, 5)), ((3, 5), (7, 3, 5)), ((7, 3, 5), (3, 5)), ((3, 5), (3, 5))]
)
def test_data_and_logits_broadcast(of_logits: tuple[int, ...], of_data: tuple[int, ...]) -> None:
    logits, x = bits(*of_logits)[0], bits(*of_data)[1]
    p = Bernoulli()(logits, event_dim=2)
    one_by_one = p.base_dist.log_prob(x).sum((-2, -1))
    torch.testing.assert_close(p.log_prob(x), one_by_one, rtol=1e-12, atol=0)
    logits.requires_grad_()
    gradients = [
        torch.autograd.grad(score, logits)[0]
        for score in (
            Bernoulli()(logits, event_dim=2).log_prob(x).sum(),
            Bernoulli()(logits, event_dim=2).base_dist.log_prob(x).sum(),
        )
    ]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_copies_and_reshapes_keep_the_sum() -> None:
    logits, x = bits(5, 3, 7)
    p = Bernoulli()(logits, event_dim=2)
    for q in (copy.deepcopy(p), pickle.loads(pickle.dumps(p)), p.expand((5,)), p.to_event(1).to_event(-1)):
        assert type(q) is type(p)
        assert torch.equal(q.log_prob(x), p.log_prob(x))
    assert type(p.to_event(1)) is type(p)
    assert p.to_event().event_shape == (5, 3, 7)
    torch.testing.assert_close(p.to_event(1).log_prob(x), p.log_prob(x).sum())
    assert type(p.to_event(-2)) is type(p.base_dist)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_single(dtype: torch.dtype) -> None:
    """As 784 bits of even odds, 543 nats, would not be in half precision: there the products end at 65504."""
    logits, x = torch.zeros(784, dtype=dtype), torch.ones(784, dtype=dtype)
    assert found(logits, x).item() == pytest.approx(-784 * torch.tensor(2.0).log().item(), rel=1e-6)
    (gradient,) = torch.autograd.grad(found(logits.requires_grad_(), x), logits)
    assert (gradient == 0.5).all()
    assert gradient.dtype == dtype


# Mutants.


def exp_of_the_logit(logits: Tensor, x: Tensor) -> Tensor:
    """The factors 1 + e^η, whose product overflows."""
    return (x * logits).sum(-1) - (1 + logits.exp()).unflatten(-1, (16, -1)).prod(-2).log().sum(-1)


def without_the_positive_part(logits: Tensor, x: Tensor) -> Tensor:
    return (x * logits).sum(-1) - (1 + (-logits.abs()).exp()).unflatten(-1, (16, -1)).prod(-2).log().sum(-1)


def without_the_rest(logits: Tensor, x: Tensor) -> Tensor:
    whole = logits.shape[-1] // 16 * 16
    return binary._Score.apply(logits[..., :whole], x[..., :whole])


@pytest.mark.parametrize(
    ("mutant", "size"), [(exp_of_the_logit, 16), (without_the_positive_part, 16), (without_the_rest, 19)]
)
def test_mutants_are_caught(mutant: Callable[[Tensor, Tensor], Tensor], size: int) -> None:
    logits, x = bits(5, size, dtype=torch.float32, scale=60.0)
    wrong = (mutant(logits, x).double() - plain(logits, x)).abs() / plain(logits, x).abs()
    assert not wrong.max() < 1e-3
