"""Likelihoods, priors and posteriors: they integrate to one, keep their shapes, and refuse what they cannot score."""

from __future__ import annotations

from math import log, pi, sqrt
from typing import Any

import pyro
import pytest
import torch
from torch.nn.functional import softplus

from ppl_vae.likelihoods import ROUNDING_SCALE, Bernoulli, Gaussian, bits_per_dim
from ppl_vae.posteriors import DiagonalNormal, Point
from ppl_vae.priors import Flat, StandardNormal

LIKELIHOODS = {
    "bernoulli": Bernoulli,
    "gaussian, fixed": lambda: Gaussian(0.3),
    "gaussian, learned": Gaussian,
    "gaussian, per pixel": lambda: Gaussian(per_pixel=True),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("data_shape", [(7,), (5, 7), (3, 5, 7)])
@pytest.mark.parametrize("batch", [(), (2,), (11, 2)])
def test_shapes_of_the_contract(name: str, data_shape: tuple[int, ...], batch: tuple[int, ...]) -> None:
    likelihood = LIKELIHOODS[name]()
    features = torch.randn(*batch, likelihood.num_parameters * data_shape[0], *data_shape[1:])
    p = likelihood(features, event_dim=len(data_shape))
    assert p.event_shape == data_shape
    assert p.batch_shape == batch
    x = p.sample((13,))
    assert x.shape == (13, *batch, *data_shape)
    assert p.log_prob(x).shape == (13, *batch)
    assert p.mean.shape == (*batch, *data_shape)


@pytest.mark.parametrize("logit", [-60.0, -15.0, -1e-4, 0.0, 0.3, 60.0])
def test_bernoulli_is_a_distribution_at_every_logit(logit: float) -> None:
    eta = torch.tensor([logit], requires_grad=True)
    p = Bernoulli()(eta)
    outcomes = torch.tensor([[0.0], [1.0]])
    assert p.log_prob(outcomes).exp().sum().item() == pytest.approx(1, abs=1e-6)
    exact = torch.stack([-softplus(eta.double()), -softplus(-eta.double())])[:, 0]
    torch.testing.assert_close(p.log_prob(outcomes).double(), exact.detach(), rtol=1e-5, atol=1e-6, check_dtype=False)
    (gradient,) = torch.autograd.grad(p.log_prob(outcomes).sum(), eta)
    assert gradient.isfinite().all()


def test_an_impossible_pixel_costs_its_logit() -> None:
    """Not 15.9 nats, where probabilities clamped in float32 end."""
    assert Bernoulli()(torch.tensor([60.0])).log_prob(torch.tensor([0.0])).item() == pytest.approx(-60)


@pytest.mark.parametrize("bad", [0.5, -1.0, 2.0, 1e-3, float("nan")])
def test_bernoulli_refuses_all_but_0_and_1_and_names_the_remedies(bad: float) -> None:
    x = torch.ones(5, 3)
    x[4, 1] = bad
    with pytest.raises(ValueError, match=r"data in \{0, 1\}") as caught:
        Bernoulli()(torch.zeros(5, 3)).log_prob(x)
    for remedy in ("data.binarize", "static_binarization", "DynamicBinarization", "likelihoods.Gaussian"):
        assert remedy in str(caught.value)


def test_bernoulli_survives_plates() -> None:
    """Pyro expands distributions; the expanded one still refuses."""
    p = Bernoulli()(torch.zeros(3)).expand([2, 5])
    assert p.log_prob(torch.ones(3)).shape == (2, 5)
    with pytest.raises(ValueError, match="scores data in"):
        p.log_prob(torch.full((3,), 0.5))
    with pyro.plate("data", 5):
        x = pyro.sample("x", Bernoulli()(torch.zeros(3)))
    assert x.shape == (5, 3)


GRID = torch.linspace(-40, 40, 400_001, dtype=torch.float64)


@pytest.mark.parametrize("name", ["gaussian, fixed", "gaussian, learned", "gaussian, per pixel"])
def test_gaussians_integrate_to_one(name: str) -> None:
    likelihood = LIKELIHOODS[name]().double()
    features = torch.tensor([0.7, -1.0][: likelihood.num_parameters], dtype=torch.float64)
    density = likelihood(features).log_prob(GRID.unsqueeze(-1)).exp()
    assert torch.trapezoid(density, GRID).item() == pytest.approx(1, abs=1e-6)


def test_gaussian_log_density_by_hand() -> None:
    x, mu = torch.randn(5, 7), torch.randn(5, 7)
    by_hand = -0.5 * (log(2 * pi * 0.3**2) + ((x - mu) / 0.3) ** 2).sum(-1)
    torch.testing.assert_close(Gaussian(0.3)(mu).log_prob(x), by_hand)


def test_per_pixel_locations_come_first_along_the_first_data_dimension() -> None:
    features = torch.cat([torch.full((2, 3, 5, 7), 4.0), torch.zeros(2, 3, 5, 7)], dim=1)
    p = Gaussian(per_pixel=True)(features, event_dim=3)
    assert (p.mean == 4).all()
    torch.testing.assert_close(p.stddev, torch.full((2, 3, 5, 7), ROUNDING_SCALE + log(2)))


def test_scales_have_a_floor() -> None:
    assert pytest.approx(1 / (256 * sqrt(12))) == ROUNDING_SCALE
    p = Gaussian(per_pixel=True, floor=0.05)(torch.tensor([0.0, -1e6]))
    assert p.stddev.item() == pytest.approx(0.05)
    learned = Gaussian(floor=0.05)
    assert learned.raw_scale is not None
    torch.nn.init.constant_(learned.raw_scale, -1e6)
    p = learned(torch.zeros(3))
    torch.testing.assert_close(p.stddev, torch.full((3,), 0.05))
    assert p.log_prob(torch.ones(3)).isfinite()


def test_the_learned_scale_learns_the_residual() -> None:
    likelihood = Gaussian()
    x = 0.2 * torch.randn(1000, 7)
    optimizer = torch.optim.Adam(likelihood.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        (-likelihood(torch.zeros(7)).log_prob(x).mean()).backward()
        optimizer.step()
    assert likelihood(torch.zeros(7)).stddev[0].item() == pytest.approx(x.square().mean().sqrt().item(), rel=1e-2)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"scale": 0.0}, "must be positive and finite; got 0.0"),
        ({"scale": -1.0}, "must be positive and finite"),
        ({"scale": float("nan")}, "must be positive and finite"),
        ({"scale": 1.0, "per_pixel": True}, "either a fixed scale or a scale per pixel"),
        ({"floor": 0.0}, "floor is the smallest standard deviation"),
    ],
)
def test_bad_gaussians_are_refused(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Gaussian(**arguments)


def test_measures_and_bits() -> None:
    assert Bernoulli().measure.levels == 2
    assert Gaussian().measure.levels is None
    assert Bernoulli().measure != Gaussian().measure
    bits = bits_per_dim(torch.tensor([-64 * log(2), -32 * log(2)]), Bernoulli(), num_dims=64)
    torch.testing.assert_close(bits, torch.tensor([1.0, 0.5]))
    with pytest.raises(ValueError, match=r"Gaussian gives a density on the line; bits per dimension are defined for"):
        bits_per_dim(torch.tensor(-1.0), Gaussian(), num_dims=64)


# Priors and posteriors.


def test_standard_normal() -> None:
    z = torch.randn(5, 3)
    torch.testing.assert_close(StandardNormal(3)().log_prob(z), -0.5 * (z.square() + log(2 * pi)).sum(-1))
    assert StandardNormal(3).double()().sample((2,)).dtype == torch.float64
    assert not StandardNormal(3).state_dict()


def test_diagonal_normal() -> None:
    q = DiagonalNormal(floor=0.01)
    assert q.num_features(3) == 6
    features = torch.randn(2, 5, 6)
    p = q(features)
    assert p.batch_shape == (2, 5)
    assert p.event_shape == (3,)
    torch.testing.assert_close(p.mean, features[..., :3])
    torch.testing.assert_close(p.stddev, 0.01 + softplus(features[..., 3:]))
    assert p.has_rsample
    assert (q(torch.full((6,), -1e6)).stddev == 0.01).all()
    assert q(torch.full((6,), 1e6)).stddev.isfinite().all()
    with pytest.raises(ValueError, match="cannot be negative"):
        DiagonalNormal(floor=-1.0)


def test_flat_and_point_have_no_say() -> None:
    z = torch.randn(5, 3)
    assert (Flat(3)().log_prob(z) == 0).all()
    assert (Flat(3)().expand([5]).log_prob(z) == 0).all()
    for draw in (lambda: Flat(3)().sample(), lambda: pyro.sample("z", Flat(3)().expand([2]))):
        with pytest.raises(NotImplementedError, match="Fit a VAE instead"):
            draw()
    q = Point()(z)
    assert torch.equal(q.sample(), z)
    assert (q.log_prob(z) == 0).all()
    assert Point().num_features(3) == 3


@pytest.mark.parametrize("bad", [0, -1, 2.5, None])
@pytest.mark.parametrize("prior", [StandardNormal, Flat])
def test_bad_latent_dims_are_refused(prior: Any, bad: Any) -> None:
    with pytest.raises(ValueError, match="latent_dim must be an integer of at least 1; got"):
        prior(bad)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_samples_have_the_moments_of_the_formula(name: str) -> None:
    likelihood = LIKELIHOODS[name]()
    p = likelihood(torch.randn(likelihood.num_parameters * 7))
    samples = p.sample((20_000,))
    for found, known in ((samples, p.mean), ((samples - p.mean).square(), p.variance)):
        standard_error = found.std(0) / len(samples) ** 0.5
        assert ((found.mean(0) - known).abs() < 4.5 * standard_error + 1e-6).all()  # 1e-6: float32
