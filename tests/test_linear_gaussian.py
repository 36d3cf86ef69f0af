"""The oracle itself, against torch's own multivariate normal and against quadrature."""

from __future__ import annotations

from typing import Any

import pairs
import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence

from ppl_vae.linear_gaussian import LinearGaussian


@pytest.fixture(params=["one noise", "a noise for each dimension"])
def lg(request: Any) -> LinearGaussian:
    base = pairs.linear_gaussian()
    noise = 0.6 if request.param == "one noise" else torch.linspace(0.3, 1.2, pairs.DATA_DIM, dtype=torch.float64)
    return LinearGaussian(base.w, base.mean, noise)


def marginal(lg: LinearGaussian) -> MultivariateNormal:
    return MultivariateNormal(lg.mean, lg.w @ lg.w.T + torch.diag(lg.noise**2))


def test_log_px_is_the_marginal_normal(lg: LinearGaussian) -> None:
    x = pairs.simulated(lg)
    torch.testing.assert_close(lg.log_px(x), marginal(lg).log_prob(x), rtol=0, atol=1e-10)
    assert lg.log_px(x.reshape(1, pairs.NUM_DATA, -1)).shape == (1, pairs.NUM_DATA)


def test_the_posterior_is_bayes_rule(lg: LinearGaussian) -> None:
    """log p(z) + log p(x given z) − log p(x) at any z."""
    x = pairs.simulated(lg)
    z = torch.randn(5, pairs.NUM_DATA, pairs.LATENT_DIM, dtype=torch.float64)
    joint = pairs.prior(lg).log_prob(z) + pairs.conditional(lg, z).to_event(1).log_prob(x)
    torch.testing.assert_close(lg.posterior(x).log_prob(z), joint - lg.log_px(x), rtol=0, atol=1e-10)


def test_the_model_simulates_its_marginal(lg: LinearGaussian) -> None:
    x = lg.model(num_data=50_000)
    error = (x.var(0) / len(x)).sqrt()
    assert ((x.mean(0) - lg.mean).abs() < 4.5 * error).all()
    p = marginal(lg)
    products = (x - lg.mean).unsqueeze(2) * (x - lg.mean).unsqueeze(1)
    assert ((products.mean(0) - p.covariance_matrix).abs() < 4.5 * products.std(0) / len(x) ** 0.5).all()


def test_the_perturbed_guide_is_off_by_what_it_says(lg: LinearGaussian) -> None:
    x = pairs.simulated(lg)
    guide = lg.perturbed_guide(shift=0.7, spread=1.3)
    q, best = guide.q(x).base_dist, lg.precision.diagonal().rsqrt()
    torch.testing.assert_close(q.loc - lg.posterior(x).mean, (0.7 * best).expand_as(q.loc))
    torch.testing.assert_close(q.scale.expand_as(q.loc), (1.3 * best).expand_as(q.loc))
    as_full = MultivariateNormal(q.loc, torch.diag_embed(q.scale.expand_as(q.loc) ** 2))
    torch.testing.assert_close(guide.elbo(x), lg.log_px(x) - kl_divergence(as_full, lg.posterior(x)))


def test_the_gap_of_the_best_diagonal_has_its_closed_form(lg: LinearGaussian) -> None:
    x = pairs.simulated(lg)
    gap = lg.log_px(x) - lg.perturbed_guide(shift=0.0, spread=1.0).elbo(x)
    known = 0.5 * (lg.precision.diagonal().log().sum() - torch.logdet(lg.precision))
    torch.testing.assert_close(gap, known.expand(pairs.NUM_DATA), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((torch.zeros(3), 0.0, 1.0), "w must be a floating-point matrix"),
        ((torch.zeros(3, 2, dtype=torch.int64), 0.0, 1.0), "w must be a floating-point matrix"),
        ((torch.zeros(3, 2), 0.0, 0.0), "noise is a standard deviation and must be positive; got 0"),
        ((torch.zeros(3, 2), 0.0, torch.tensor([1.0, -1.0, 1.0])), "must be positive; got -1"),
    ],
)
def test_bad_arguments_are_refused(arguments: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        LinearGaussian(*arguments)
