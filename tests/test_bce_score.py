"""Grey values under the Bernoulli formula: refused as data of a Bernoulli, and a score that is no log-probability."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import ppl_vae as pv
from ppl_vae.likelihoods import Bernoulli, ContinuousBernoulli, bce_score

NAMES = ("static_binarization", "dynamic_binarization", "ContinuousBernoulli", "bce_score")
POINTS, WEIGHTS = np.polynomial.legendre.leggauss(40)
U, U_WEIGHTS = torch.from_numpy((POINTS + 1) / 2), torch.from_numpy(WEIGHTS / 2)


def all_bits(num_dims: int) -> Tensor:
    return torch.cartesian_prod(*[torch.arange(2.0).double()] * num_dims)


@pytest.mark.parametrize(
    "use",
    [
        lambda vae, x: pv.fit(vae.model, vae.guide, x, epochs=1, batch_size=5, progress=False),
        lambda vae, x: pv.importance_sampling(vae.model, vae.guide, x, num_samples=5),
        lambda vae, x: pv.annealed_importance_sampling(vae.model, vae.guide, x, num_temperatures=3),
        lambda vae, x: pv.log_weights(vae.model, vae.guide, x, num_samples=5),
        lambda vae, x: vae.decode(torch.zeros(11, 2)).log_prob(x),
    ],
)
def test_grey_values_are_refused_and_the_four_ways_out_are_named(use: Callable[[pv.VAE, Tensor], Any]) -> None:
    x = torch.ones(11, 7)
    x[-1, 3] = 0.25
    with pytest.raises(ValueError, match=r"A Bernoulli likelihood scores data in \{0, 1\}; got values from") as caught:
        use(pv.VAE(7, 2), x)
    for name in NAMES:
        assert name in str(caught.value)
    for name in NAMES[2:]:
        assert hasattr(pv.likelihoods, name)
    for name in NAMES[:2]:
        assert hasattr(pv.data.Data, name)


def test_on_bits_it_is_the_bernoullis_log_probability() -> None:
    logits, x = torch.randn(5, 1, 3, 2, 7), torch.randint(2, (11, 3, 2, 7)).float()
    score = bce_score(logits, x, event_dim=3)
    assert score.shape == (5, 11)
    torch.testing.assert_close(score, Bernoulli()(logits, event_dim=3).log_prob(x))


@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_it_is_the_mean_log_probability_of_drawn_bits(scale: float) -> None:
    """By enumeration of all bits b, drawn with probability x."""
    x, logits, b = torch.rand(11, 3).double(), scale * torch.randn(11, 3).double(), all_bits(3).unsqueeze(1)
    drawn = torch.distributions.Bernoulli(x).log_prob(b).sum(-1).exp()
    expected = (drawn * Bernoulli()(logits).log_prob(b)).sum(0)
    torch.testing.assert_close(bce_score(logits, x), expected)


def test_it_lacks_the_constant_of_the_continuous_bernoulli() -> None:
    """At least log 2 for each dimension, log 2 at a logit of 0."""
    x, logits = torch.rand(11, 7).double(), 20 * torch.randn(11, 7).double()
    constant = ContinuousBernoulli()(logits).log_prob(x) - bce_score(logits, x)
    assert (constant > 7 * np.log(2)).all()
    flat = torch.zeros(11, 7).double()
    torch.testing.assert_close(ContinuousBernoulli()(flat).log_prob(x), bce_score(flat, x) + 7 * np.log(2))
    again = ContinuousBernoulli()(logits).log_prob(torch.full_like(x, 0.5)) - bce_score(logits, torch.full_like(x, 0.5))
    torch.testing.assert_close(constant, again)  # it depends on the logits, not on x


def test_a_mixture_of_it_is_subnormalised_and_bounds_the_score_of_drawn_bits() -> None:
    """F(x) = log Σ p(z) exp(score): mass at most 2^−D over the square, and F(x) ≤ E_b log P(b)."""
    weights, logits = torch.tensor([0.2, 0.3, 0.5]).double(), 3 * torch.randn(3, 2).double()

    def marginal(x: Tensor) -> Tensor:
        return (weights.log().unsqueeze(-1) + bce_score(logits.unsqueeze(1), x)).logsumexp(0)

    x, area = torch.cartesian_prod(U, U), torch.outer(U_WEIGHTS, U_WEIGHTS).flatten()
    mass = (marginal(x).exp() * area).sum().item()
    assert 0.01 < mass <= 0.25
    densities = ContinuousBernoulli()(logits.unsqueeze(1)).log_prob(x)
    assert ((weights.log().unsqueeze(-1) + densities).logsumexp(0).exp() * area).sum().item() == pytest.approx(1)
    b = all_bits(2)
    drawn = torch.distributions.Bernoulli(x.unsqueeze(1)).log_prob(b).sum(-1).exp()
    slack = drawn @ marginal(b) - marginal(x)
    assert (slack > 0).all()
    assert slack.max() > 0.1
    torch.testing.assert_close(marginal(b).exp().sum(), torch.tensor(1.0).double())


def test_gradients_are_finite_at_the_extremes() -> None:
    logits = torch.tensor([-100.0, -60, 0, 60, 100]).requires_grad_()
    (gradient,) = torch.autograd.grad(bce_score(logits, torch.full((5,), 0.3)), logits)
    torch.testing.assert_close(gradient, 0.3 - logits.detach().sigmoid())


@pytest.mark.parametrize("bad", [-0.1, 1.1, float("nan")])
def test_values_outside_the_interval_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=r"A cross-entropy takes values in \[0, 1\]; got .* Divide levels"):
        bce_score(torch.zeros(2), torch.tensor([0.5, bad]))


def test_a_program_can_be_trained_on_it() -> None:
    """As a factor in a model function; the loss is that of the network's own cross-entropy and KL."""
    decoder, x = nn.Linear(2, 7), torch.rand(11, 7)

    def prior() -> Any:
        return dist.Normal(torch.zeros(2), 1.0).to_event(1)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            pyro.factor("score", bce_score(decoder(pyro.sample("z", prior())), x))

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", prior())

    history = pv.fit(model, guide, x, epochs=60, learning_rate=0.05, batch_size=11, progress=False)
    assert history.loss[-1] < history.loss[0] - 0.1
    with torch.no_grad():
        z = torch.randn(4000, 1, 2)
        by_hand = -torch.nn.functional.binary_cross_entropy_with_logits(
            decoder(z).expand(4000, 11, 7), x.expand(4000, 11, 7), reduction="none"
        ).sum(-1)
    log_weights = pv.log_weights(model, guide, x, num_samples=4000)
    error = (by_hand.var(0) / 4000 + log_weights.var(0) / 4000).sqrt()
    assert ((log_weights.mean(0) - by_hand.mean(0)).abs() < 4.5 * error).all()
