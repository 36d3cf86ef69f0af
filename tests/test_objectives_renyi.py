"""Pyro's `RenyiELBO(alpha=0)` beside ours, in every arrangement where it is, and is not, a bound for each datum."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO
from torch import Tensor

from ppl_vae.objectives import IWAE, VIMCO

NUM_DATA, NUM_PARTICLES, NUM_ALL = 11, 5, 220


@pytest.fixture
def x() -> Tensor:
    return torch.linspace(-2.0, 2.0, NUM_DATA, dtype=torch.float64)


def prior(x: Tensor) -> dist.Distribution:
    return dist.Normal(torch.zeros_like(x), 1.0)


def q(x: Tensor) -> dist.Distribution:
    return dist.Normal(0.1 * x, 1.4)


def log_weights(x: Tensor, seed: int = 1) -> Tensor:
    """By hand at the draws that Pyro takes on a seed, `(NUM_PARTICLES, NUM_DATA)`."""
    torch.manual_seed(seed)
    z = 0.1 * x + 1.4 * torch.randn(NUM_PARTICLES, NUM_DATA, dtype=torch.float64)
    return prior(x).log_prob(z) + dist.Normal(z, 1.0).log_prob(x) - q(x).log_prob(z)


def bound(log_w: Tensor) -> Tensor:
    return log_w.logsumexp(0) - log(NUM_PARTICLES)


def of_pyro(model: Any, guide: Any, x: Tensor, **options: Any) -> float:
    torch.manual_seed(1)
    options = {"vectorize_particles": True, "max_plate_nesting": 1} | options
    return -RenyiELBO(alpha=0.0, num_particles=NUM_PARTICLES, **options).loss(model, guide, x)


def programs(plate: Callable[[Tensor], Any]) -> tuple[Any, Any]:
    def model(x: Tensor) -> None:
        with plate(x):
            z = pyro.sample("z", prior(x))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with plate(x):
            pyro.sample("z", q(x))

    return model, guide


def of_the_batch(x: Tensor) -> Any:
    return pyro.plate("data", len(x))


def of_all(x: Tensor) -> Any:
    return pyro.plate("data", NUM_ALL, subsample=torch.arange(len(x)))


def test_one_plate_around_everything_is_right_in_both(x: Tensor) -> None:
    pair = programs(of_the_batch)
    assert of_pyro(*pair, x) == pytest.approx(bound(log_weights(x)).sum().item(), abs=1e-9)
    torch.manual_seed(1)
    torch.randn(NUM_DATA, dtype=torch.float64)  # our guide's own run takes these
    z = 0.1 * x + 1.4 * torch.randn(NUM_PARTICLES, NUM_DATA, dtype=torch.float64)
    log_w = prior(x).log_prob(z) + dist.Normal(z, 1.0).log_prob(x) - q(x).log_prob(z)
    torch.manual_seed(1)
    assert -IWAE(num_particles=NUM_PARTICLES).loss(*pair, x) == pytest.approx(bound(log_w).sum().item(), abs=1e-9)


def test_a_site_outside_of_the_plate(x: Tensor) -> None:
    """Pyro: one weight for the whole batch. Ours: refused."""
    inner, guide = programs(of_the_batch)

    def model(x: Tensor) -> None:
        pyro.sample("shared", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0).double())
        inner(x)

    shared = dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.0)).item()
    joint = bound(log_weights(x).sum(1)).item() + shared
    assert of_pyro(model, guide, x) == pytest.approx(joint, abs=1e-6)
    with pytest.raises(ValueError, match="'shared' of the model is outside the plate 'data'"):
        IWAE(num_particles=NUM_PARTICLES).loss(model, guide, x)


def test_two_plates_of_different_names(x: Tensor) -> None:
    """Pyro: one weight for the whole batch. Ours: refused."""

    def model(x: Tensor) -> None:
        with pyro.plate("latents", len(x)):
            z = pyro.sample("z", prior(x))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("latents", len(x)):
            pyro.sample("z", q(x))

    assert of_pyro(model, guide, x) == pytest.approx(bound(log_weights(x).sum(1)).item(), abs=1e-9)
    with pytest.raises(ValueError, match="'z' of the model is outside the plate 'data'"):
        IWAE(num_particles=NUM_PARTICLES).loss(model, guide, x)


def test_a_sequential_plate(x: Tensor) -> None:
    """Pyro: one weight for the whole batch. Ours: refused."""

    def model(x: Tensor) -> None:
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z_{i}", prior(x[i]))
            pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[i])

    def guide(x: Tensor) -> None:
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"z_{i}", q(x[i]))

    found = of_pyro(model, guide, x, vectorize_particles=False, max_plate_nesting=0)
    torch.manual_seed(1)
    noise = torch.stack(
        [torch.stack([torch.randn((), dtype=torch.float64) for _ in range(NUM_DATA)]) for _ in range(NUM_PARTICLES)]
    )
    z = 0.1 * x + 1.4 * noise
    log_w = prior(x).log_prob(z) + dist.Normal(z, 1.0).log_prob(x) - q(x).log_prob(z)
    assert found == pytest.approx(bound(log_w.sum(1)).item(), abs=1e-9)
    with pytest.raises(ValueError, match=r"'z_0' of the model is in the sequential plate 'data'"):
        IWAE(num_particles=NUM_PARTICLES).loss(model, guide, x)


def test_a_subsampled_plate(x: Tensor) -> None:
    """Pyro: weights to the power N / B, which is no bound. Ours: N / B times the bound of the batch."""
    scale = NUM_ALL / NUM_DATA
    log_w = log_weights(x)
    assert of_pyro(*programs(of_all), x) == pytest.approx(bound(scale * log_w).sum().item(), abs=1e-8)
    exact = dist.Normal(0.0, 2**0.5).log_prob(x).sum() * scale
    assert bound(scale * log_w).sum() > exact  # above the truth
    plain, sub = (IWAE(num_particles=NUM_PARTICLES) for _ in range(2))
    torch.manual_seed(2)
    one = plain.terms(*programs(of_the_batch), x)
    torch.manual_seed(2)
    many = sub.terms(*programs(of_all), x)
    torch.testing.assert_close(many.bound, one.bound)
    torch.testing.assert_close(many.loss, scale * one.loss)
    assert -many.loss < exact


def test_a_scale_around_both_programs(x: Tensor) -> None:
    """Pyro: weights to the power 1 / N, which is the ELBO again. Ours: refused."""
    pair = [poutine.scale(program, 1 / NUM_DATA) for program in programs(of_the_batch)]
    log_w = log_weights(x)
    found = of_pyro(*pair, x) * NUM_DATA
    assert found == pytest.approx(NUM_DATA * bound(log_w / NUM_DATA).sum().item(), abs=1e-8)
    with pytest.raises(ValueError, match=r"'z' of the model is scaled by 0\.09091"):
        IWAE(num_particles=NUM_PARTICLES).loss(*pair, x)


def test_a_guide_without_rsample(x: Tensor) -> None:
    """Pyro: the guide has no gradient at all. Ours: refused by IWAE, and trained by VIMCO."""
    logit = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full_like(x, 0.3)))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=logit))

    RenyiELBO(alpha=0.0, num_particles=NUM_PARTICLES, vectorize_particles=True, max_plate_nesting=1).loss_and_grads(
        model, guide, x
    )
    assert logit.grad is None or logit.grad == 0
    with pytest.raises(ValueError, match="Use VIMCO"):
        IWAE(num_particles=NUM_PARTICLES).loss(model, guide, x)
    VIMCO(num_particles=NUM_PARTICLES).loss_and_grads(model, guide, x)
    assert logit.grad is not None
    assert logit.grad != 0


def test_as_a_module(x: Tensor) -> None:
    """Pyro: cannot. Ours: can."""
    pair = programs(of_the_batch)
    with pytest.raises(AttributeError, match="differentiable_loss"):
        RenyiELBO(alpha=0.0, num_particles=NUM_PARTICLES)(*pair)(x)
    assert IWAE(num_particles=NUM_PARTICLES)(*pair)(x).isfinite()
    # And more particles of Pyro's ELBO are no importance weights: their mean is outside of the logarithm.
    torch.manual_seed(1)
    elbo = -Trace_ELBO(num_particles=NUM_PARTICLES, vectorize_particles=True, max_plate_nesting=1).loss(*pair, x)
    assert elbo == pytest.approx(log_weights(x).mean(0).sum().item(), abs=1e-9)


def test_what_pyros_wrong_ones_tend_to(x: Tensor) -> None:
    """One weight for the batch, and a scale of 1 / N: towards the ELBO. A scale of N / B: beyond log p(x)."""
    log_w = torch.stack([log_weights(x, seed) for seed in range(301)], 1)  # particles, replicates, data
    elbo, right = log_w.mean(0).sum(-1).mean(), bound(log_w).sum(-1).mean()
    joint = bound(log_w.sum(-1)).mean()
    lowered = (NUM_DATA * bound(log_w / NUM_DATA)).sum(-1).mean()
    raised = (bound(20 * log_w) / 20).sum(-1).mean()
    exact = dist.Normal(0.0, 2**0.5).log_prob(x).sum()
    assert elbo < lowered < (elbo + right) / 2
    assert elbo < joint < right - 1
    assert right < exact < raised
