"""What is labelled bits per dimension is that: the length, or a bound on it, of a code for the data's own levels."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from families import FAMILIES
from hypothesis import given, settings
from torch import Tensor

import ppl_vae as pv
from ppl_vae.data import AsIs, Data, Dequantized, Levels, Logit, Scale, Unit
from ppl_vae.likelihoods import (
    Bernoulli,
    Beta,
    Binned,
    Binomial,
    Categorical,
    ContinuousBernoulli,
    DiscretisedGaussian,
    DiscretisedLogistic,
    Gaussian,
    Likelihood,
    Measure,
    Poisson,
    bits,
    bits_per_dim,
    without_bits,
)

POINTS, WEIGHTS = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(40))
NOISE, NOISE_WEIGHTS = (POINTS + 1) / 2, WEIGHTS / 2  # of u on (0, 1)


def test_measures() -> None:
    assert Bernoulli().measure.levels == 2
    assert Gaussian().measure.levels is None
    assert Bernoulli().measure != Gaussian().measure
    assert Bernoulli().measure == Categorical(2).measure
    assert DiscretisedGaussian().measure == DiscretisedLogistic().measure == Categorical().measure
    assert Categorical(17).measure == Measure("probability on {0, ..., 16}", 17)
    assert ContinuousBernoulli().measure != Gaussian().measure


# Eight bits.


def noisy_bytes(num_data: int = 11, num_dims: int = 7) -> Data:
    raw = torch.randint(256, (num_data, num_dims)) / 255
    return Data(raw, raw.clone(), scale=Unit(256))


def eight(bits: Tensor) -> bool:
    return bits.shape == (11,) and bool((bits - 8).abs().max() < 1e-5)


def bits_of_uniform_probabilities() -> Tensor:
    data, likelihood = noisy_bytes().as_levels(), Categorical(256)
    log_px = likelihood(torch.zeros(256 * 7)).log_prob(data.test)
    return bits_per_dim(log_px, likelihood, data.test, scale=data.scale)


def bits_of_a_uniform_density() -> Tensor:
    data, likelihood = noisy_bytes().static_dequantization(), ContinuousBernoulli()
    log_px = likelihood(torch.zeros(7)).log_prob(data.test)
    return bits_per_dim(log_px, likelihood, data.test, scale=data.scale)


def bits_of_the_logits_of_a_uniform_density() -> Tensor:
    """σ(y) of a standard logistic y is uniform: so is v, as near as the margin lets it."""
    data, likelihood = noisy_bytes().static_dequantization().logit_transform(margin=1e-9), pv.likelihoods.Logistic(1.0)
    log_px = likelihood(torch.zeros(7).double()).log_prob(data.test.double())
    return bits_per_dim(log_px, likelihood, data.test, scale=data.scale)


UNIFORM = {
    "probabilities": bits_of_uniform_probabilities,
    "a density": bits_of_a_uniform_density,
    "logits": bits_of_the_logits_of_a_uniform_density,
}


@pytest.mark.parametrize("name", UNIFORM)
def test_uniform_bytes_have_eight_bits(name: str) -> None:
    assert eight(UNIFORM[name]())


def test_fair_coins_have_one_bit() -> None:
    x = torch.tensor([[0.0, 1.0, 1.0]]).expand(5, 3)
    log_px = torch.tensor([-3 * log(2), -1.5 * log(2)]).unsqueeze(-1).expand(2, 5)
    expected = torch.tensor([1.0, 0.5]).unsqueeze(-1).expand(2, 5)
    torch.testing.assert_close(bits_per_dim(log_px, Bernoulli(), x, scale=Levels(2)), expected)
    torch.testing.assert_close(bits_per_dim(log_px.double(), Bernoulli(), x, scale=Levels(2)), expected.double())


MUTANTS: dict[str, tuple[Any, str, Any, str]] = {
    "+8 forgotten": (Dequantized, "log_slope", lambda self, x: torch.zeros_like(x), "a density"),
    "+8 subtracted": (Dequantized, "log_slope", lambda self, x: torch.full_like(x, log(256)), "a density"),
    "255 in the place of 256": (Dequantized, "log_slope", lambda self, x: torch.full_like(x, -log(255)), "a density"),
    "mean over dimensions": (Scale, "log_jacobian", lambda self, x: self.log_slope(x.double()).mean(-1), "a density"),
    "sum over the data": (Scale, "log_jacobian", lambda self, x: self.log_slope(x.double()).sum(), "a density"),
    "log 2 forgotten": (bits, "log", lambda _: 1.0, "probabilities"),
    "the logit's own slope forgotten": (Logit, "log_slope", Dequantized.log_slope, "logits"),
    "the logit's slope inverted": (
        Logit,
        "log_slope",
        lambda self, x: Dequantized.log_slope(self, x) + torch.nn.functional.logsigmoid(x).mul(2) - x,
        "logits",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_no_eight_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, attribute, wrong, uniform = MUTANTS[name]
    monkeypatch.setattr(where, attribute, wrong)
    try:
        found = UNIFORM[uniform]()
    except ValueError as error:
        assert "at most 0" in str(error)  # noqa: PT017 - caught already
        return
    assert not eight(found)


def test_noise_that_is_reused_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of `tests/test_scales.py`, and a mutant that draws from the same seed each time."""

    def is_new() -> bool:
        noisy = noisy_bytes().dynamic_dequantization().train
        return bool((noisy[:][0] != noisy[:][0]).float().mean() > 0.9)

    assert is_new()
    draw = Dequantized.draw
    monkeypatch.setattr(Dequantized, "draw", lambda self, k, g=None: draw(self, k, torch.Generator().manual_seed(0)))
    assert not is_new()


# Bins and noise.


def gaussians(scale: float) -> tuple[Tensor, Tensor]:
    """Bits of each of 256 levels under a Gaussian of so many levels: in bins, and as the mean over the noise."""
    loc, levels = 100.0, torch.arange(256.0).double().unsqueeze(-1)
    binned = DiscretisedGaussian(256, scale=scale / 255, floor=1e-9)
    log_p = binned(torch.tensor([loc / 255], dtype=torch.float64)).log_prob(levels)
    exact = bits_per_dim(log_p, binned, levels, scale=Levels(256))
    v = (levels + NOISE) / 256  # the same density, of level + u
    density = Gaussian(scale / 256)
    log_p = density(torch.tensor([(loc + 0.5) / 256], dtype=torch.float64)).log_prob(v.unsqueeze(-1))
    dequantised = torch.stack(
        [bits_per_dim(log_p[:, i], density, v[:, i : i + 1], scale=UNCHECKED) for i in range(len(NOISE))], -1
    )
    return exact, dequantised @ NOISE_WEIGHTS


class Unchecked(Dequantized):
    """Without the check that noise differs from number to number: quadrature takes the same for all."""

    def check(self, x: Tensor) -> None:
        pass


UNCHECKED = Unchecked(256)


@pytest.mark.parametrize("scale", [0.1, 0.5, 2.0, 10.0, 50.0])
def test_bins_need_no_more_bits_than_noise(scale: float) -> None:
    exact, dequantised = gaussians(scale)
    assert (exact <= dequantised + 1e-9).all()
    assert dequantised[80] - exact[80] > 1e-6


def test_bins_and_noise_agree_as_the_scale_grows() -> None:
    """But for the two ends of the levels, which in bins take the tails."""
    excess = [(b - a)[1:-1].abs().max().item() for a, b in map(gaussians, (10.0, 100.0, 1000.0))]
    assert excess[0] > 20 * excess[1] > 400 * excess[2]
    assert excess[2] < 1e-6


def test_the_mean_over_drawn_noise_is_that_of_quadrature() -> None:
    _, expected = gaussians(2.0)
    levels = torch.tensor([97.0, 100.0, 104.0]).repeat(1, 20_000).T
    v = Dequantized(256).draw(levels)
    likelihood = Gaussian(2.0 / 256)
    found = bits_per_dim(likelihood(torch.tensor([100.5 / 256])).log_prob(v), likelihood, v, scale=Dequantized(256))
    found = found.reshape(-1, 3).double()
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - expected[[97, 100, 104]]).abs() < 4.5 * error).all()


# Change of variables.


@pytest.mark.parametrize("margin", [1e-6, 0.05])
def test_logits_have_the_bits_of_the_density_that_they_push_forward(margin: float) -> None:
    """A Beta density of v is, by hand, one of the logits; through either scale the bits are the same."""
    data = noisy_bytes().static_dequantization()
    v, on_line = data.test.double(), Logit(256, margin=margin)
    y = on_line.from_unit(v).requires_grad_()
    (slope,) = torch.autograd.grad(on_line.to_unit(y).sum(), y)  # ∂v/∂y
    likelihood = Beta()
    log_pv = likelihood(torch.randn(14).double()).log_prob(v)
    direct = bits_per_dim(log_pv, likelihood, v, scale=Dequantized(256))
    through = bits_per_dim(log_pv + slope.log().sum(-1), Gaussian(), y.detach(), scale=on_line)
    torch.testing.assert_close(through, direct, rtol=1e-9, atol=0)


@pytest.mark.parametrize("margin", [1e-6, 0.05])
def test_a_density_of_logits_is_one_of_levels(margin: float) -> None:
    """2^−bits, integrated over the noise and summed over all levels, is the mass that the density has there."""
    scale, likelihood = Logit(17, margin=margin), Gaussian(1.3)
    v = ((torch.arange(17.0).double().unsqueeze(-1) + NOISE) / 17).flatten().unsqueeze(-1)
    y = scale.from_unit(v)
    found = bits_per_dim(likelihood(torch.tensor([0.4]).double()).log_prob(y), likelihood, y, scale=scale)
    total = (2.0**-found).reshape(17, -1) @ NOISE_WEIGHTS
    ends = (scale.from_unit(torch.tensor([0.0, 1.0]).double()) - 0.4) / 1.3
    mass = torch.special.ndtr(ends[1]) - torch.special.ndtr(ends[0])
    assert total.sum().item() == pytest.approx(mass.item(), abs=1e-6)


# Refusals.

# The lowest and the highest level are among them: of a few others, level / 16 could be taken for dequantised levels.
X17, X2 = (8.0 * torch.arange(15) % 17).reshape(5, 3), (torch.arange(15.0) % 2).reshape(5, 3)
V17 = Dequantized(17).draw(X17, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("likelihood", "x", "scale", "match"),
    [
        (Gaussian(), X17, Levels(17), r"density can hide, .* without limit. Score `data.dynamic_dequantization\(\)`"),
        (Gaussian(), X17 / 16, Unit(17), r"density on the line, and the data are levels divided by 16: between levels"),
        (Gaussian(), X17, AsIs(), "with a known number of levels. Report nats, or load levels"),
        (ContinuousBernoulli(), X17 / 16, Unit(17), r"density on \[0, 1\], and .*DiscretisedGaussian\(17\)"),
        (ContinuousBernoulli(), Logit(17).from_unit(V17), Logit(17), r"on the line. Score .* without their logit_tr"),
        (Bernoulli(), X2, AsIs(), "known number of levels"),
        (Categorical(256), X17, Levels(17), r"probability on \{0, ..., 255\}, .* with 17 levels. Give the likelihood"),
        (Binomial(17), X2, Levels(2), "with 2 levels"),
        (Bernoulli(), X2, Levels(17), "with 17 levels"),
        (Binomial(17), X17 / 16, Unit(17), r"divided by 16. Score `data.as_levels\(\)`"),
        (Binomial(17), V17, Dequantized(17), r"u drawn for each number. Score `data.as_levels\(\)`"),
        (Poisson(), X17, Levels(17), r"Poisson gives a probability on counts .* without end: .* Report nats"),
        (Poisson(), X17, AsIs(), "Report nats"),
    ],
)
def test_what_has_no_bits_is_refused(likelihood: Likelihood, x: Tensor, scale: Scale, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        bits_per_dim(torch.full((5,), -1.0), likelihood, x, scale=scale)
    reason = without_bits(likelihood, scale)
    assert reason is not None
    assert reason.endswith(".")


@pytest.mark.parametrize(
    ("log_px", "likelihood", "x", "scale", "match"),
    [
        (torch.zeros(3), Binomial(), X17, Levels(17), r"got shapes \(3,\) and \(5, 3\). Give neither a mean nor a sum"),
        (torch.zeros(5, 3), Binomial(), X17, Levels(17), r"got shapes \(5, 3\) and \(5, 3\)"),
        (torch.tensor(-1.0), Binomial(), X17, Levels(17), r"got shapes \(\) and"),
        (torch.zeros(0), Binomial(), X17[:0], Levels(17), r"got shapes \(0,\) and \(0, 3\)"),
        (torch.zeros(5), Binomial(), X17 / 16, Levels(17), "Expected whole numbers from 0 to 16; got"),
        (torch.zeros(5), Gaussian(), X17 / 16, Dequantized(17), "Expected 17 levels dequantised"),
        (torch.zeros(15), Gaussian(), (X17.repeat(3, 1) + 0.5) / 17, Dequantized(17), "u drawn for each number; got"),
        (torch.tensor([-3.0, 1400, -1, -2, -3]), Binomial(), X17, Levels(17), "at most 0; got log_px = 1400 for 3 dim"),
        (torch.tensor([-3.0, torch.nan, -1, -2, -3]), Binomial(), X17, Levels(17), "got log_px = nan"),
        (torch.full((5,), torch.inf), Gaussian(), V17, Dequantized(17), "got log_px = inf"),
        (torch.full((5,), 40.0), Gaussian(), V17, Dequantized(17), "40 for 3 dimensions, where it is 31.5"),
    ],
)
def test_what_cannot_be_is_refused(log_px: Tensor, likelihood: Likelihood, x: Tensor, scale: Scale, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        bits_per_dim(log_px, likelihood, x, scale=scale)


def test_an_impossible_datum_has_infinite_bits() -> None:
    log_px = torch.tensor([-torch.inf, -1.0, -1.0, -1.0, -1.0])
    found = bits_per_dim(log_px, Binomial(), X17, scale=Levels(17))
    assert found[0] == torch.inf
    assert found[1:].isfinite().all()


# Every family, every transform, every range.


def transformed(name: str, raw: Tensor, levels: int) -> tuple[Tensor, Scale]:
    """Data as a user gets them: values, and what `Data` says they are."""
    data = Data(raw, raw, scale=Levels(2) if levels == 2 else Unit(levels))
    if name == "raw":
        return raw, AsIs()
    if name != "loaded":
        data = data.as_levels()
    if name == "one noise":
        return (data.test + 0.3) / levels, Dequantized(levels)
    if name in ("noisy", "logits"):
        data = data.dynamic_dequantization()
    if name == "logits":
        data = data.logit_transform()
    return data.test, data.scale


def level_and_slope(scale: Scale, x: Tensor) -> tuple[Tensor, Tensor]:
    """level + u of each number, and log |∂x/∂(level + u)| by autograd through the scale's own definition."""
    if isinstance(scale, Levels):
        return x.double(), torch.zeros(len(x)).double()
    assert isinstance(scale, Dequantized)
    place = (scale.to_unit(x.double()) * scale.levels).requires_grad_()
    v = place / scale.levels
    y = torch.logit(1e-6 + (1 - 2e-6) * v) if isinstance(scale, Logit) else v
    torch.testing.assert_close(y.detach(), x.double(), rtol=1e-4, atol=1e-4)
    (slope,) = torch.autograd.grad(y.sum(), place)
    return place.detach(), slope.log().squeeze(-1)


@settings(deadline=None, max_examples=400)
@given(
    name=st.sampled_from(sorted(FAMILIES)),
    case=st.integers(0, 10**6),
    levels=st.sampled_from([2, 5, 17, 256, 65536]),
    of_data=st.sampled_from(["raw", "loaded", "levels", "noisy", "logits", "one noise"]),
    other=st.one_of(st.none(), st.sampled_from(["raw", "loaded", "levels", "noisy", "logits"])),
    seed=st.integers(0, 10**6),
)
def test_nothing_is_labelled_bits_that_is_not(
    name: str, case: int, levels: int, of_data: str, other: str | None, seed: int
) -> None:
    """Either it is refused in words, or x are levels and the bits those of a code, exact or by way of their noise."""
    likelihood, features = FAMILIES[name].make(), FAMILIES[name].features
    features = features[case % len(features)]
    raw = torch.randint(levels, (11, 1), generator=torch.Generator().manual_seed(seed)) / (levels - 1)
    x, scale = transformed(of_data, raw, levels)
    if other is not None:  # the scale of other data than these
        _, scale = transformed(other, raw, levels)
    try:
        log_px = likelihood(features).log_prob(x)
        found = bits_per_dim(log_px, likelihood, x, scale=scale)
    except ValueError as error:
        assert len(str(error)) > 80  # noqa: PT017 - in words
        return
    assert scale.levels == levels
    place, slope = level_and_slope(scale, x)
    assert ((place >= 0) & (place < levels)).all()
    torch.testing.assert_close(found.double(), -(log_px.double() + slope) / log(2), rtol=1e-5, atol=1e-5)
    if likelihood.measure.levels is None:
        assert isinstance(scale, Dequantized)
        assert torch.unique((place % 1).round(decimals=4)).numel() > 1
        return
    assert isinstance(scale, Levels)
    assert likelihood.measure.levels == levels
    assert found.min() >= -1e-6
    code = torch.arange(float(levels)).unsqueeze(-1)  # Kraft's sum of all its words is 1
    words = bits_per_dim(likelihood(features).log_prob(code).double(), likelihood, code, scale=scale)
    assert (2.0**-words).sum().item() == pytest.approx(1, abs=1e-4 if levels > 256 else 2e-6)


def test_every_kind_of_bits_is_reached() -> None:
    """The property above is no refusal of everything: what the table of the room promises is there."""
    found = {}
    raw = torch.randint(17, (7, 3)) / 16
    for name in ("levels", "noisy", "logits"):
        x, scale = transformed(name, raw, 17)
        makes: list[Callable[[], Likelihood]] = [
            Binomial,
            lambda: Binned(Gaussian(), 17),
            Gaussian,
            ContinuousBernoulli,
        ]
        found[name] = [without_bits(make(), scale) is None for make in makes]
        for make, has in zip(makes, found[name], strict=True):
            if has:
                likelihood = make()
                log_px = likelihood(torch.zeros(3)).log_prob(x)
                assert bits_per_dim(log_px, likelihood, x, scale=scale).isfinite().all()
    assert found == {
        "levels": [True, True, False, False],
        "noisy": [False, False, True, True],
        "logits": [False, False, True, False],
    }


# As a user calls it.


def test_new_noise_changes_the_bits_within_their_error() -> None:
    """Of a trained VAE."""
    digits = pv.data.load("digits")
    vae = pv.VAE((8, 8), 3, likelihood=Gaussian())
    pv.fit(vae.model, vae.guide, digits.dynamic_dequantization().train, epochs=2, progress=False)
    means, errors = [], []
    for seed in (0, 1):
        data = digits.dynamic_dequantization(seed=seed)
        evidence = pv.importance_sampling(vae.model, vae.guide, data.test[:101], num_samples=20)
        found = pv.bits_per_dim(evidence.log_px, vae.likelihood, data.test[:101], scale=data.scale)
        means.append(found.mean().item())
        errors.append(found.std().item() / len(found) ** 0.5)
    assert means[0] != means[1]
    assert abs(means[0] - means[1]) < 4.5 * (errors[0] ** 2 + errors[1] ** 2) ** 0.5
    assert 1 < means[0] < 5
