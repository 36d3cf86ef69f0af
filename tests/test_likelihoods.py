"""Likelihoods: the contract of shapes, what each refuses and in which words, the scale, and use in programs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from math import log, pi, sqrt
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import ppl_vae as pv
from ppl_vae import likelihoods as lh
from ppl_vae.likelihoods import ROUNDING_SCALE, Bernoulli, Gaussian

LIKELIHOODS: dict[str, Callable[[], lh.Likelihood]] = {
    "bernoulli": lh.Bernoulli,
    "continuous bernoulli": lh.ContinuousBernoulli,
    "beta": lh.Beta,
    "gaussian, fixed": lambda: lh.Gaussian(0.3),
    "gaussian, learned": lh.Gaussian,
    "gaussian, per pixel": lambda: lh.Gaussian(per_pixel=True),
    "laplace": lh.Laplace,
    "logistic, per pixel": lambda: lh.Logistic(per_pixel=True),
    "student": lambda: lh.StudentT(30.0),
    "student, per pixel": lambda: lh.StudentT(30.0, per_pixel=True),
    "discretised gaussian": lh.DiscretisedGaussian,
    "discretised logistic, per pixel": lambda: lh.DiscretisedLogistic(17, per_pixel=True),
    "binned laplace": lambda: lh.Binned(lh.Laplace(), 17),
    "binned continuous bernoulli": lambda: lh.Binned(lh.ContinuousBernoulli(), 17),
    "mixture": lambda: lh.LogisticMixture(3, levels=17),
    "mixture of colours": lambda: lh.LogisticMixture(3, levels=17, rgb=True),
    "categorical": lambda: lh.Categorical(17),
    "binomial": lh.Binomial,
    "poisson": lh.Poisson,
    "negative binomial": lh.NegativeBinomial,
    "negative binomial, per pixel": lambda: lh.NegativeBinomial(per_pixel=True),
    "zero-inflated": lambda: lh.ZeroInflatedNegativeBinomial(2.0),
    "zero-inflated, per dimension": lambda: lh.ZeroInflatedNegativeBinomial(shape=7),
}
SHAPES = [(7,), (5, 7), (3, 5, 7)]
EVERY_SHAPE = [(name, shape) for name in LIKELIHOODS for shape in SHAPES if name != "mixture of colours"]
EVERY_SHAPE += [("mixture of colours", (3, 5, 7))]


def features_for(likelihood: lh.Likelihood, data_shape: tuple[int, ...], *batch: int) -> Tensor:
    return torch.randn(*batch, likelihood.num_parameters * data_shape[0], *data_shape[1:])


@pytest.mark.parametrize(("name", "data_shape"), EVERY_SHAPE)
@pytest.mark.parametrize("batch", [(), (2,), (11, 2)])
def test_shapes_of_the_contract(name: str, data_shape: tuple[int, ...], batch: tuple[int, ...]) -> None:
    likelihood = LIKELIHOODS[name]()
    p = likelihood(features_for(likelihood, data_shape, *batch), event_dim=len(data_shape))
    assert p.event_shape == data_shape
    assert p.batch_shape == batch
    x = p.sample((13,))
    assert x.shape == (13, *batch, *data_shape)
    assert x.dtype == torch.float32
    log_prob = p.log_prob(x)
    assert log_prob.shape == (13, *batch)
    assert log_prob.dtype == torch.float32
    assert log_prob.isfinite().all()
    assert p.mean.shape == (*batch, *data_shape)
    assert likelihood.inputs(x).shape == x.shape
    wide = p.expand((5, *batch))
    assert wide.batch_shape == (5, *batch)
    torch.testing.assert_close(wide.log_prob(x.unsqueeze(1)), log_prob.unsqueeze(1).expand(13, 5, *batch))
    assert wide.sample((2,)).shape == (2, 5, *batch, *data_shape)


@pytest.mark.parametrize(("name", "data_shape"), EVERY_SHAPE)
def test_parameters_are_stacked_along_the_first_data_dimension(name: str, data_shape: tuple[int, ...]) -> None:
    """One number of the data depends on its own parameters, and nowhere on others' (but on the channels before)."""
    likelihood = LIKELIHOODS[name]()
    features = features_for(likelihood, data_shape).unflatten(0, (likelihood.num_parameters, -1))
    last = (-1,) * len(data_shape)
    means = []
    for start, end in ((0.1, 0.3), (0.9, 0.2)):
        features[(slice(None), *last)] = torch.linspace(start, end, likelihood.num_parameters)
        means.append(likelihood(features.flatten(0, 1), event_dim=len(data_shape)).mean.clone())
    changed = means[0] != means[1]
    assert changed[last]
    channels = [0, 1, 2] if name == "mixture of colours" else [-1]
    changed[(channels, *last[1:])] = False
    assert not changed.any()


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_double_precision_is_kept(name: str) -> None:
    likelihood = LIKELIHOODS[name]().double()
    p = likelihood(features_for(likelihood, (3, 5, 7)).double(), event_dim=3)
    x = p.sample()
    assert x.dtype == p.log_prob(x).dtype == p.mean.dtype == torch.float64


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_features_of_a_wrong_count_are_refused(name: str) -> None:
    likelihood = LIKELIHOODS[name]()
    if likelihood.num_parameters > 1:
        with pytest.raises(ValueError, match=rf"takes {likelihood.num_parameters} numbers per data dimension, stacked"):
            likelihood(torch.zeros(likelihood.num_parameters * 3 + 1, 5, 7), event_dim=3)


def test_an_impossible_pixel_costs_its_logit() -> None:
    """Not 15.9 nats, where probabilities clamped in float32 end."""
    assert Bernoulli()(torch.tensor([60.0])).log_prob(torch.tensor([0.0])).item() == pytest.approx(-60)


@pytest.mark.parametrize("bad", [0.5, -1.0, 2.0, 1e-3, float("nan")])
def test_bernoulli_refuses_all_but_0_and_1_and_names_the_remedies(bad: float) -> None:
    x = torch.ones(5, 3)
    x[4, 1] = bad
    with pytest.raises(ValueError, match=r"data in \{0, 1\}") as caught:
        Bernoulli()(torch.zeros(5, 3)).log_prob(x)
    for remedy in ("data.binarize", "static_binarization", "dynamic_binarization", "ContinuousBernoulli", "bce_score"):
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
        ({"floor": 0.0}, "floor is the smallest scale"),
    ],
)
def test_bad_gaussians_are_refused(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Gaussian(**arguments)


# The scale.

ON_THE_LINE: dict[str, Any] = {
    "gaussian": lh.Gaussian,
    "laplace": lh.Laplace,
    "logistic": lh.Logistic,
    "student": lambda *scale: lh.StudentT(3.0, *scale),
}


@pytest.mark.parametrize("name", ON_THE_LINE)
def test_the_fixed_scale_is_the_best_for_the_training_data(name: str) -> None:
    family = ON_THE_LINE[name]
    x, reconstructions = family(0.3)(torch.zeros(7)).sample((1000,)), torch.randn(1000, 7) * 0.01
    likelihood = family()
    scale = likelihood.fix_scale(reconstructions, x)
    assert likelihood.scale == scale
    assert not list(likelihood.parameters())

    def score(at: float) -> float:
        return family(at)(reconstructions.double()).log_prob(x.double()).sum().item()

    assert score(scale) > max(score(scale * 1.001), score(scale / 1.001))
    residuals = (x - reconstructions).double()
    if name == "gaussian":
        assert scale == pytest.approx(residuals.square().mean().sqrt().item())
    if name == "laplace":
        assert scale == pytest.approx(residuals.abs().mean().item())
    assert likelihood(torch.zeros(7)).base_dist.scale[0].item() == pytest.approx(scale)
    assert scale == pytest.approx(0.3, rel=0.05)


def test_a_scale_of_the_evaluated_data_would_be_caught() -> None:
    """The mutant fixes the scale on the data that it then scores: they depend on each other, and have no density."""
    x_train, x = 0.3 * torch.randn(1000, 7).double(), 0.3 * torch.randn(11, 7).double()
    mean = torch.zeros(7).double()
    fixed = lh.Gaussian()
    fixed.fix_scale(mean.expand_as(x_train), x_train)

    def honest(x: Tensor) -> Tensor:
        return fixed(mean[: x.shape[1]]).log_prob(x)

    def mutant(x: Tensor) -> Tensor:
        own = lh.Gaussian()
        own.fix_scale(mean[: x.shape[1]].expand_as(x), x)
        return own(mean[: x.shape[1]]).log_prob(x)

    def alone(score: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.cat([score(row) for row in x.split(1)])

    torch.testing.assert_close(alone(honest), honest(x))
    assert alone(mutant).mean() > mutant(x).mean() + 0.1  # "better" the fewer data are scored at once
    grid = torch.linspace(-30, 30, 60_000, dtype=torch.float64).unsqueeze(-1)  # of one dimension, without 0
    masses = [(score(grid).exp().sum() * (grid[1] - grid[0])).item() for score in (honest, lambda x: by_row(mutant, x))]
    assert masses[0] == pytest.approx(1, abs=1e-6)
    assert masses[1] > 3


def by_row(score: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What the mutant gives each datum alone: a Gaussian at one scale from its mean, −½ − ½ log 2π − log |x|."""
    torch.testing.assert_close(score(x[:1]), -0.5 - 0.5 * log(2 * pi) - x[0].abs().log())
    return -0.5 - 0.5 * log(2 * pi) - x.abs().log().squeeze(-1)


def test_scales_that_cannot_be_fixed() -> None:
    with pytest.raises(ValueError, match="come from the decoder; there is none to fix"):
        Gaussian(per_pixel=True).fix_scale(torch.zeros(3), torch.ones(3))
    with pytest.raises(ValueError, match=r"got shapes \(3,\) and \(3, 1\)"):
        Gaussian().fix_scale(torch.zeros(3), torch.ones(3, 1))
    for x in (torch.zeros(3), torch.tensor([0.0, 1.0, torch.nan])):
        with pytest.raises(ValueError, match="they fix no scale"):
            Gaussian().fix_scale(torch.zeros(3), x)
    discretised = lh.DiscretisedGaussian()
    assert discretised.scale is None
    assert discretised.likelihood.fix_scale(torch.zeros(3), torch.ones(3)) == discretised.scale == 1
    assert Gaussian(floor=0.5).fix_scale(torch.zeros(3), torch.full((3,), 0.1)) == 0.5


# Refusals.

WRONG_DATA: dict[str, tuple[float, list[str]]] = {
    "continuous bernoulli": (1.5, [r"data on \[0, 1\]", "such as 1.5", "Divide levels by the largest"]),
    "beta": (0.0, [r"open interval \(0, 1\)", "such as 0", "Dequantise", "squeeze"]),
    "gaussian, fixed": (float("inf"), ["finite real numbers", "such as inf", "Fill or drop missing entries"]),
    "laplace": (float("nan"), ["finite real numbers", "such as nan"]),
    "logistic, per pixel": (float("nan"), ["finite real numbers"]),
    "student": (float("inf"), ["finite real numbers"]),
    "discretised gaussian": (0.5, ["whole numbers from 0 to 255", "such as 0.5", r"Multiply data on \[0, 1\] by 255"]),
    "discretised logistic, per pixel": (17.0, ["whole numbers from 0 to 16", "such as 17"]),
    "binned continuous bernoulli": (-1.0, ["whole numbers from 0 to 16", "such as -1"]),
    "mixture": (0.5, ["whole numbers from 0 to 16"]),
    "mixture of colours": (0.5, ["whole numbers from 0 to 16"]),
    "categorical": (17.0, ["whole numbers from 0 to 16"]),
    "binomial": (float("nan"), ["whole numbers from 0 to 16"]),
    "poisson": (0.5, ["whole numbers from 0;", "such as 0.5", "Give the raw counts"]),
    "negative binomial": (-1.0, ["whole numbers from 0;"]),
    "zero-inflated": (1.5, ["whole numbers from 0;"]),
}


@pytest.mark.parametrize("name", WRONG_DATA)
def test_data_outside_the_support_are_refused_in_sentences(name: str) -> None:
    bad, patterns = WRONG_DATA[name]
    likelihood = LIKELIHOODS[name]()
    p = likelihood(features_for(likelihood, (3, 5, 7), 2), event_dim=3)
    x = p.sample()
    p.log_prob(x)
    x[1, 2, 3, 4] = bad
    for q in (p, p.expand((11, 2))):
        for pattern in patterns:
            with pytest.raises(ValueError, match=pattern):
                q.log_prob(x)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: lh.Categorical(1), "at least 2; got 1"),
        (lambda: lh.Binomial(2.5), "at least 2; got 2.5"),
        (lambda: lh.StudentT(0.0), "degrees of freedom, must be positive"),
        (lambda: lh.Laplace(0.0), "must be positive and finite; got 0.0"),
        (lambda: lh.Beta(floor=0.0), "smallest α and β"),
        (lambda: lh.LogisticMixture(0), "num_components must be an integer of at least 1; got 0"),
        (lambda: lh.LogisticMixture(floor=-1.0), "floor is the smallest scale"),
        (lambda: lh.NegativeBinomial(-1.0), "dispersion must be positive"),
        (lambda: lh.NegativeBinomial(1.0, per_pixel=True), "either fixed, or learned in some shape, or per pixel"),
        (lambda: lh.NegativeBinomial(shape=7, per_pixel=True), "give one of them"),
        (lambda: lh.LogisticMixture(2, rgb=True)(torch.zeros(2, 8 * 7)), r"scores data of shape \(3, height, width\)"),
        (lambda: lh.LogisticMixture(2, rgb=True)(torch.zeros(8, 5, 7), event_dim=3), "Leave out rgb=True"),
    ],
)
def test_bad_arguments_are_refused(build: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build()


@pytest.mark.parametrize("likelihood", [lh.StudentT, lh.Beta, lh.Poisson, lh.Bernoulli])
def test_only_densities_with_an_integral_are_binned(likelihood: Any) -> None:
    with pytest.raises(TypeError, match=f"The integral of a {likelihood.__name__} over a bin is not known"):
        lh.Binned(likelihood())
    with pytest.raises(NotImplementedError, match="has no integral over a bin"):
        likelihood().log_mass(None, torch.zeros(()), torch.ones(()))


# In programs.


def test_what_encoders_see() -> None:
    levels, counts = torch.tensor([0.0, 8.0, 16.0]), torch.tensor([0.0, 1.0, 100.0])
    assert lh.Binomial().inputs(levels).tolist() == [0, 0.5, 1]
    assert lh.Binned(lh.Gaussian(), 17).inputs(levels).tolist() == [0, 0.5, 1]
    torch.testing.assert_close(lh.Poisson().inputs(counts), torch.log(1 + counts))
    assert lh.Gaussian().inputs(counts) is counts
    vae = pv.VAE((3,), 2, likelihood=lh.Binomial(), encoder=nn.Linear(3, 4))
    torch.testing.assert_close(vae.encode(levels).mean, vae.encoder(levels / 16)[:2])
    assert torch.equal(copy.deepcopy(vae).encode(levels).mean, vae.encode(levels).mean)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_vae_takes_each(name: str) -> None:
    shape = (3, 1, 1) if name == "mixture of colours" else (7,)
    vae = pv.VAE(shape, 2, likelihood=LIKELIHOODS[name]())
    assert len(list(vae.parameters())) == len(list(vae.model.parameters())) + len(list(vae.guide.parameters()))
    x = vae.sample(11)
    assert vae.reconstruct(x).shape == x.shape
    history = pv.fit(vae.model, vae.guide, x, epochs=2, batch_size=11, progress=False)
    assert all(torch.tensor(history.loss).isfinite())
    log_weights = pv.log_weights(vae.model, vae.guide, x, num_samples=5)
    assert log_weights.shape == (5, 11)
    assert log_weights.isfinite().all()


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_each_serves_a_model_function(name: str) -> None:
    shape = (3, 1, 1) if name == "mixture of colours" else (7,)
    likelihood = LIKELIHOODS[name]()
    decoder = nn.Linear(2, likelihood.num_parameters * shape[0])

    def decode(z: Tensor) -> Any:
        rows = decoder(z)
        return likelihood(rows.reshape(*rows.shape[:-1], -1, *shape[1:]), event_dim=len(shape))

    def prior() -> Any:
        return dist.Normal(0.0, 1.0).expand([2]).to_event(1)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            pyro.sample("x", decode(z), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", prior())

    with torch.no_grad():
        x = decode(torch.randn(11, 2)).sample()
    log_weights = pv.log_weights(model, guide, x, num_samples=5)
    assert log_weights.shape == (5, 11)
    evidence = pv.importance_sampling(model, guide, x, num_samples=1000)
    # The guide is the prior, so log p(x) is the log-mean of p(x given z) over z from the prior.
    with torch.no_grad():
        by_hand = decode(torch.randn(20_000, 1, 2)).log_prob(x).double().logsumexp(0) - log(20_000)
    assert ((evidence.log_px - by_hand).abs() < 4.5 * evidence.standard_error + 0.05).all()


def test_a_masked_pixel_has_no_say() -> None:
    """Elementwise families can be masked by pixel, as imputation does."""
    observed = torch.tensor([True, True, False])
    for name in LIKELIHOODS:
        if name not in ("mixture of colours", "zero-inflated, per dimension"):
            likelihood = LIKELIHOODS[name]()
            p = likelihood(features_for(likelihood, (3,)))
            x = p.sample()
            masked = p.base_dist.mask(observed).to_event(1).log_prob(x)
            torch.testing.assert_close(masked, p.base_dist.log_prob(x)[:2].sum())
