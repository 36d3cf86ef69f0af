"""Samples of every likelihood have the mean and the variance of the formula, and lie where they can be scored."""

from __future__ import annotations

from collections.abc import Callable
from math import log

import pytest
import torch
from torch import Tensor

from ppl_vae import likelihoods as lh

# Features `(cases, num_parameters)`, extremes included.
LOGITS = torch.tensor([-100.0, -60.0, -3.0, -0.59, -1e-7, 0.0, 0.61, 2.0, 60.0]).unsqueeze(-1)
SPREAD = torch.tensor([[0.0, -60.0], [0.5, -2.0], [0.3, 1.0], [-0.2, 0.0], [1.0, -60.0], [60.0, 0.0]])
LOG_MEANS = torch.tensor([-60.0, -3.0, 0.0, 2.0, log(1e6)])
CASES: dict[str, tuple[Callable[[], lh.Likelihood], Tensor]] = {
    "Bernoulli": (lh.Bernoulli, LOGITS),
    "ContinuousBernoulli": (lh.ContinuousBernoulli, LOGITS),
    "Beta": (lh.Beta, torch.tensor([[-3.0, 0.0], [0.0, 0.0], [-5.0, -5.0], [60.0, 1.0], [1e4, 1e4]])),
    "Gaussian": (lambda: lh.Gaussian(per_pixel=True, floor=3e-4), SPREAD),
    "Laplace": (lambda: lh.Laplace(per_pixel=True, floor=3e-4), SPREAD),
    "Logistic": (lambda: lh.Logistic(per_pixel=True, floor=3e-4), SPREAD),
    "StudentT": (lambda: lh.StudentT(30.0, per_pixel=True, floor=3e-4), SPREAD),
    "DiscretisedGaussian": (lambda: lh.DiscretisedGaussian(per_pixel=True), SPREAD),
    "DiscretisedLogistic": (lambda: lh.DiscretisedLogistic(per_pixel=True), SPREAD),
    "Binned(Laplace)": (lambda: lh.Binned(lh.Laplace(per_pixel=True), 17), SPREAD),
    "Binned(ContinuousBernoulli)": (lambda: lh.Binned(lh.ContinuousBernoulli(), 17), LOGITS),
    "LogisticMixture": (lambda: lh.LogisticMixture(3), torch.randn(5, 9, generator=torch.Generator().manual_seed(1))),
    "Categorical": (lambda: lh.Categorical(3), torch.tensor([[0.0, 0.0, 0.0], [60.0, -60.0, 0.0], [1.0, 2.0, -1.0]])),
    "Binomial": (lh.Binomial, LOGITS),
    "Poisson": (lh.Poisson, LOG_MEANS.unsqueeze(-1)),
    "NegativeBinomial": (
        lambda: lh.NegativeBinomial(per_pixel=True),
        torch.stack([LOG_MEANS, torch.tensor([0.0, 1.0, -1.0, 20.0, log(1e6)])], dim=-1),
    ),
    "ZeroInflatedNegativeBinomial": (
        lambda: lh.ZeroInflatedNegativeBinomial(2.0),
        torch.stack([LOG_MEANS, torch.tensor([0.0, -60.0, 60.0, 0.5, -1.0])], dim=-1),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_samples_have_the_moments_of_the_formula(name: str) -> None:
    make, features = CASES[name]
    p = make()(features).base_dist
    samples = p.sample((20_000,))
    p.log_prob(samples)  # raises for samples outside the support
    samples = samples.double()
    for found, known in ((samples, p.mean), ((samples - p.mean).square(), p.variance)):
        standard_error = found.std(0) / len(samples) ** 0.5
        rounding = 1e-6 + 2e-6 * samples.abs().amax(0)  # of float32
        assert ((found.mean(0) - known).abs() < 4.5 * standard_error + rounding).all()


@pytest.mark.parametrize("name", ["ContinuousBernoulli", "Gaussian", "Laplace", "Logistic", "StudentT", "Beta"])
def test_densities_can_be_sampled_with_a_gradient(name: str) -> None:
    make, features = CASES[name]
    features = features.clone().requires_grad_()
    p = make()(features)
    assert p.has_rsample
    (gradient,) = torch.autograd.grad(p.rsample((1000,)).sum(), features)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["DiscretisedGaussian", "DiscretisedLogistic", "Binned(ContinuousBernoulli)"])
def test_the_mean_of_bins_has_a_gradient(name: str) -> None:
    """By finite differences, in float64."""
    make, features = CASES[name]
    likelihood, f = make().double(), features[1:4].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda f: likelihood(f).mean, f)


@pytest.mark.parametrize("name", ["DiscretisedGaussian", "LogisticMixture", "Binomial", "Categorical"])
def test_the_moments_of_levels_are_sums_over_levels(name: str) -> None:
    make, features = CASES[name]
    likelihood = make()
    assert likelihood.measure.levels is not None
    p = likelihood(features).base_dist
    x = torch.arange(float(likelihood.measure.levels)).reshape(-1, 1, 1)
    mass = p.log_prob(x).double().exp()
    torch.testing.assert_close(p.mean.double(), (mass * x).sum(0), rtol=1e-5, atol=1e-5)
    variance = (mass * (x - p.mean.double()).square()).sum(0)
    torch.testing.assert_close(p.variance.double(), variance, rtol=1e-4, atol=1e-4)


def test_a_students_t_may_have_no_moments() -> None:
    assert lh.StudentT(1.0)(torch.zeros(3)).mean.isnan().all()
    assert lh.StudentT(1.0)(torch.zeros(3)).variance.isnan().all()
    assert lh.StudentT(2.0)(torch.zeros(3)).variance.isinf().all()


def test_samples_of_a_mixture_of_colours() -> None:
    """Their frequencies are their probabilities; the mean is exact for red, and near for green and blue."""
    likelihood = lh.LogisticMixture(2, levels=3, rgb=True)
    p = likelihood(torch.randn(5, likelihood.num_parameters * 3, 1, 1), event_dim=3)
    colours = torch.cartesian_prod(*[torch.arange(3.0)] * 3).reshape(-1, 1, 3, 1, 1)
    samples = p.sample((20_000,))
    frequency = torch.stack([(samples == colour).all(-3).double().mean(0)[:, 0, 0] for colour in colours])
    known = p.log_prob(colours).double().exp()
    error = (known * (1 - known) / 20_000).sqrt()
    assert ((frequency - known).abs() < 4.5 * error + 1e-3 * known).all()
    exact = (known[..., None, None, None] * colours).sum(0)
    torch.testing.assert_close(p.mean[:, 0].double(), exact[:, 0], rtol=1e-5, atol=1e-5)
    with pytest.raises(NotImplementedError, match="no closed form"):
        _ = p.variance
    bytes_ = lh.LogisticMixture(3, rgb=True)
    p = bytes_(0.3 * torch.randn(bytes_.num_parameters * 3, 2, 2), event_dim=3)
    assert ((p.mean - p.sample((20_000,)).mean(0)).abs() < 8).all()
