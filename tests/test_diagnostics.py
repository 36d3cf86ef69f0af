"""What a pair's latents are used for: equal to its closed forms, whatever the form of the pair."""

from __future__ import annotations

from collections.abc import Callable
from math import log, pi, sqrt
from typing import Any

import numpy as np
import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.distributions import kl_divergence
from torch.distributions.transforms import AffineTransform

import ppl_vae as pv
from ppl_vae.coin import BetaBernoulli
from ppl_vae.diagnostics import NAMES, Diagnostics, diagnose, diagnosis
from ppl_vae.linear_gaussian import LinearGaussian

# More than one block of data, and no whole number of them.
MANY = diagnosis.BLOCK_DATA + 3


@pytest.fixture
def lg() -> LinearGaussian:
    return pairs.linear_gaussian()


def within_errors(found: Diagnostics, name: str, exact: Tensor, *, by_datum: bool = True) -> None:
    """The mean, and each datum, within 4.5 of its standard errors over draws."""
    difference, slack = getattr(found, name) - exact, 1e-9
    assert difference.mean().abs() < 4.5 * found.mc_standard_error[name] + slack
    if by_datum:
        assert (difference.abs() < 4.5 * found.standard_error[name] + slack).all()


def kl_of_normals(loc: Tensor, scale: Tensor) -> Tensor:
    """KL(N(loc, scale²), N(0, 1))."""
    return 0.5 * (scale**2 + loc**2 - 1) - scale.log()


def information_by_quadrature(loc: Tensor, scale: float) -> Tensor:
    """∫ q_n log(q_n / mean of q) for each of the normals N(loc_n, scale²) in one dimension."""
    z = torch.linspace(loc.min() - 9 * scale, loc.max() + 9 * scale, 20_001, dtype=torch.float64)
    log_q = dist.Normal(loc[:, None], scale).log_prob(z)
    ratio = log_q - (torch.logsumexp(log_q, 0) - log(len(loc)))
    return torch.trapezoid(log_q.exp() * ratio, z)


def one_dimension(num_data: int, slope: float = 1.2, scale: float = 0.4) -> tuple[Any, Any, Tensor]:
    """z ~ N(0, 1), x ~ N(z, 1), and an encoder N(slope x, scale²)."""
    x = torch.randn(num_data, 1, generator=torch.Generator().manual_seed(7), dtype=torch.float64)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.squeeze(-1))

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x.squeeze(-1), scale))

    return model, guide, x


# ---------------------------------------------------------------------------------------------------------------
# Statements that hold for the right numbers and for none of the wrong ones below.


def parts_are_their_closed_forms() -> None:
    lg = pairs.linear_gaussian()
    x, guide = pairs.simulated(lg, MANY), lg.perturbed_guide()
    found = diagnose(lg.model, guide, x)
    q = guide.q(x).base_dist
    assert found.is_closed
    assert found.kl_per_dimension is not None
    torch.testing.assert_close(found.kl_per_dimension, kl_of_normals(q.loc, q.scale), rtol=0, atol=1e-9)
    torch.testing.assert_close(found.kl, found.kl_per_dimension.sum(1), rtol=0, atol=1e-9)
    assert (found.standard_error["kl"] == 0).all()
    squares = (x - q.loc @ lg.w.T - lg.mean).square() + q.scale.square() @ lg.w.T.square()
    within_errors(found, "reconstruction", -0.5 * ((2 * pi * lg.noise**2).log() + squares / lg.noise**2).sum(1))
    within_errors(found, "elbo", guide.elbo(x))
    torch.testing.assert_close(found.elbo, found.reconstruction - found.kl, rtol=0, atol=1e-9)


def units_are_active_by_their_means() -> None:
    lg = pairs.linear_gaussian()
    x, guide = pairs.simulated(lg, MANY), lg.perturbed_guide()
    found = diagnose(lg.model, guide, x, num_samples=3)
    torch.testing.assert_close(found.unit_variance, guide.q(x).mean.var(0), rtol=0, atol=1e-9)


def means_from_draws_have_their_noise_taken_off() -> None:
    """A flow knows no mean; and of q = prior it is the same for all data, whatever the draws say."""
    lg, num_samples = pairs.linear_gaussian(), 5
    x = pairs.simulated(lg, MANY)

    def guide(x: Tensor) -> None:
        normal = dist.Normal(torch.zeros(len(x), 3, dtype=x.dtype), 1.0)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(normal, [AffineTransform(0.0, 0.8)]).to_event(1))

    found = diagnose(lg.model, guide, x, num_samples=num_samples)
    noise = 0.8**2 / num_samples
    assert not found.is_closed
    assert (found.unit_variance.abs() < 4.5 * noise * sqrt(2 * (1 + 1 / (num_samples - 1)) / MANY)).all()


def information_is_that_of_the_data() -> None:
    for num_data, num_samples in ((13, 401), (101, 53)):
        model, guide, x = one_dimension(num_data)
        found = diagnose(model, guide, x, num_samples=num_samples)
        exact = information_by_quadrature(1.2 * x.squeeze(-1), 0.4)
        # The ratio of a datum that is alone hardly varies, but seldom falls far: only the mean has a normal error.
        within_errors(found, "mutual_information", exact, by_datum=False)
        kl = kl_of_normals(1.2 * x.squeeze(-1), torch.tensor(0.4).double())
        within_errors(found, "marginal_kl", kl - exact, by_datum=False)


def a_datum_does_not_know_of_the_others() -> None:
    lg = pairs.linear_gaussian()
    x, guide = pairs.simulated(lg, MANY), lg.perturbed_guide()
    many, few = diagnose(lg.model, guide, x), diagnose(lg.model, guide, x[:5])
    for name in ("reconstruction", "kl", "elbo"):
        torch.testing.assert_close(getattr(few, name), getattr(many, name)[:5], rtol=0, atol=1e-9)
        torch.testing.assert_close(few.standard_error[name], many.standard_error[name][:5], rtol=0, atol=1e-9)


STATEMENTS: dict[str, Callable[[], None]] = {
    f.__name__: f
    for f in (
        parts_are_their_closed_forms,
        units_are_active_by_their_means,
        means_from_draws_have_their_noise_taken_off,
        information_is_that_of_the_data,
        a_datum_does_not_know_of_the_others,
    )
}


@pytest.mark.parametrize("statement", STATEMENTS)
def test_statement(statement: str) -> None:
    STATEMENTS[statement]()


def kl_of_the_wrong_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "closed_form", lambda q, p: kl_divergence(p, q))


def forgets_the_number_of_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "log", lambda count: 0.0)


def mean_of_logarithms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "logsumexp", lambda self, dim: self.mean(dim) + log(self.shape[dim]))


def variance_of_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "_mean", lambda site, value: value)


def keeps_the_noise_of_the_means(monkeypatch: pytest.MonkeyPatch) -> None:
    right = diagnosis._Moments.standard_error.fget
    assert right is not None
    monkeypatch.setattr(diagnosis._Moments, "standard_error", property(lambda self: 0 * right(self)))


def normalises_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    right = diagnosis.run

    def centred(program: Any, args: tuple[Any, ...], values: Any) -> Any:
        return right(program, (args[0] - args[0].mean(0), *args[1:]), values)

    monkeypatch.setattr(diagnosis, "run", centred)


MUTANTS: dict[Callable[[pytest.MonkeyPatch], None], str] = {
    kl_of_the_wrong_direction: "parts_are_their_closed_forms",
    forgets_the_number_of_data: "information_is_that_of_the_data",
    mean_of_logarithms: "information_is_that_of_the_data",
    variance_of_draws: "units_are_active_by_their_means",
    keeps_the_noise_of_the_means: "means_from_draws_have_their_noise_taken_off",
    normalises_the_batch: "a_datum_does_not_know_of_the_others",
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.__name__)
def test_a_wrong_number_is_caught(mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        STATEMENTS[MUTANTS[mutant]]()


# ---------------------------------------------------------------------------------------------------------------
# Every form of a pair


@pytest.mark.parametrize("form", pairs.FORMS)
def test_every_form_of_a_pair_has_the_same_numbers(lg: LinearGaussian, form: str) -> None:
    x, guide = pairs.simulated(lg), lg.perturbed_guide()
    found = diagnose(*pairs.FORMS[form](lg, guide.q), x)
    q = guide.q(x).base_dist
    assert found.kl_per_dimension is not None
    torch.testing.assert_close(found.kl_per_dimension, kl_of_normals(q.loc, q.scale), rtol=0, atol=1e-9)
    torch.testing.assert_close(found.unit_variance, q.loc.var(0), rtol=0, atol=1e-9)
    within_errors(found, "elbo", guide.elbo(x))
    assert found.dimensions == ["z[0]", "z[1]", "z[2]"]


def test_as_many_data_as_latent_dimensions(lg: LinearGaussian) -> None:
    x, guide = pairs.simulated(lg, pairs.LATENT_DIM), lg.perturbed_guide()
    found = diagnose(lg.model, guide, x)
    q = guide.q(x).base_dist
    assert found.kl_per_dimension is not None
    torch.testing.assert_close(found.kl_per_dimension, kl_of_normals(q.loc, q.scale), rtol=0, atol=1e-9)


def test_a_full_covariance_has_no_split(lg: LinearGaussian) -> None:
    """But its KL from a diagonal prior has a closed form."""
    x = pairs.simulated(lg)
    found = diagnose(lg.model, lg.guide, x)
    prior = dist.MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double())
    within_errors(found, "elbo", lg.log_px(x))
    torch.testing.assert_close(found.kl, kl_divergence(lg.posterior(x), prior), rtol=0, atol=1e-9)
    assert found.kl_per_dimension is None
    assert found.is_closed
    assert "KL per dimension             –" in str(found)

    def model(x: Tensor) -> None:
        components = dist.Categorical(logits=torch.zeros(2).double())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.MixtureSameFamily(components, prior.expand((2,))))
            pyro.sample("x", pairs.conditional(lg, z).to_event(1), obs=x)

    # From a mixture, of twice the same prior here, it has none; and draws from the posterior have all the same ELBO.
    drawn = diagnose(model, lg.guide, x)
    within_errors(drawn, "kl", found.kl)
    torch.testing.assert_close(drawn.elbo, lg.log_px(x), rtol=0, atol=1e-6)
    assert not drawn.is_closed
    assert drawn.kl_per_dimension is None


def test_an_autoguide_of_real_latents_is_split(lg: LinearGaussian) -> None:
    x, guide = pairs.simulated(lg), lg.perturbed_guide()
    found = diagnose(*pairs.auto_normal(lg, guide, x), x, num_samples=400)
    q = guide.q(x).base_dist
    assert found.kl_per_dimension is not None
    torch.testing.assert_close(found.kl_per_dimension.sum(1), found.kl, rtol=0, atol=1e-9)
    within_errors(found, "kl", kl_of_normals(q.loc, q.scale).sum(1))
    assert not found.is_closed


def test_a_constrained_latent() -> None:
    pair = BetaBernoulli(2.0, 3.0)
    tosses = torch.bernoulli(torch.full((5, 7), 0.4)).double()
    found = diagnose(pair.model, pair.guide, tosses)
    q, prior = pair.posterior(tosses), dist.Beta(torch.tensor(2.0).double(), torch.tensor(3.0).double())
    torch.testing.assert_close(found.kl, kl_divergence(q, prior), rtol=0, atol=1e-9)
    within_errors(found, "elbo", pair.log_px(tosses))
    torch.testing.assert_close(found.unit_variance, q.mean.var(0, keepdim=True), rtol=0, atol=1e-9)
    assert found.dimensions == ["z"]

    # An autoguide draws it through a transform, whose Jacobian belongs to the whole latent.
    auto = AutoNormal(pair.model)
    auto(tosses)
    found = diagnose(pair.model, auto, tosses, num_samples=400)
    u = torch.linspace(-9, 9, 4001, dtype=torch.float64)[:, None]
    q_u = dist.Normal(auto.locs.z.double(), auto.scales.z.double())
    log_p = prior.log_prob(u.sigmoid()) + torch.nn.functional.logsigmoid(u) + torch.nn.functional.logsigmoid(-u)
    exact = torch.trapezoid(q_u.log_prob(u).exp() * (q_u.log_prob(u) - log_p), u.expand(-1, 5), dim=0).detach()
    within_errors(found, "kl", exact)
    assert found.kl_per_dimension is None


def test_latents_that_depend_on_each_other(lg: LinearGaussian) -> None:
    """The exact posterior drawn as a chain: the same KL, and an ELBO without error."""
    x = pairs.simulated(lg)
    exact = lg.posterior(x)
    covariance = exact.covariance_matrix[0]
    gain = covariance[0, 1:] / covariance[0, 0]
    rest = covariance[1:, 1:] - covariance[0, 0] * gain.outer(gain)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            first = pyro.sample("first", dist.Normal(torch.zeros(()).double(), 1.0))
            others = pyro.sample("others", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            z = torch.cat([first.unsqueeze(-1), others], -1)
            pyro.sample("x", pairs.conditional(lg, z).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        mean = lg.posterior(x).mean
        with pyro.plate("data", len(x)):
            first = pyro.sample("first", dist.Normal(mean[:, 0], covariance[0, 0].sqrt()))
            loc = mean[:, 1:] + (first - mean[:, 0]).unsqueeze(-1) * gain
            pyro.sample("others", dist.MultivariateNormal(loc, rest))

    found = diagnose(model, guide, x)
    prior = dist.MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double())
    torch.testing.assert_close(found.elbo, lg.log_px(x), rtol=0, atol=1e-6)
    within_errors(found, "kl", kl_divergence(exact, prior))
    assert found.dimensions == ["first", "others[0]", "others[1]"]
    assert found.kl_per_dimension is None
    # The mean of the second given the first is averaged over the first.
    error = (covariance[0, 0] * gain.square().max() / found.num_samples).sqrt()
    slack = 4.5 * 2 * exact.mean.std(0).max() * error / sqrt(len(x) - 1) + 1e-6
    torch.testing.assert_close(found.unit_variance, exact.mean.var(0), rtol=0, atol=slack.item())


def test_a_plate_of_latents_within_a_datum() -> None:
    x = torch.randn(11, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scale = torch.tensor(0.3, dtype=torch.float64)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2), pyro.plate("pixels", 5, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2), pyro.plate("pixels", 5, dim=-1):
            pyro.sample("z", dist.Normal(torch.stack([x, -0.5 * x], -1), scale).to_event(1))

    found = diagnose(model, guide, x)
    loc = torch.stack([x, -0.5 * x], -1).flatten(1)
    assert found.kl_per_dimension is not None
    torch.testing.assert_close(found.kl_per_dimension, kl_of_normals(loc, scale), rtol=0, atol=1e-9)
    torch.testing.assert_close(found.unit_variance, loc.var(0), rtol=0, atol=1e-9)
    assert found.dimensions[7] == "z[7]"


def test_a_masked_latent_does_not_count() -> None:
    lg = pairs.linear_gaussian()
    x, q = pairs.simulated(lg), lg.perturbed_guide().q
    there = torch.arange(pairs.NUM_DATA) % 3 > 0

    def model(x: Tensor, there: Tensor) -> None:
        with pyro.plate("data", len(x)):
            with poutine.mask(mask=there):
                z = pyro.sample("z", pairs.prior(lg))
            pyro.sample("x", pairs.conditional(lg, z).to_event(1), obs=x)

    def guide(x: Tensor, there: Tensor) -> None:
        with pyro.plate("data", len(x)), poutine.mask(mask=there):
            pyro.sample("z", q(x))

    found = diagnose(model, guide, x, there)
    base = q(x).base_dist
    expected = torch.where(there[:, None], kl_of_normals(base.loc, base.scale), 0.0)
    assert found.kl_per_dimension is not None
    torch.testing.assert_close(found.kl_per_dimension, expected, rtol=0, atol=1e-9)


def test_discrete_latents_have_a_kl_in_closed_form() -> None:
    x = torch.tensor([[0.3], [1.7], [2.2], [0.9], [-1.0]]).double()

    def logits(x: Tensor) -> Tensor:
        return torch.cat([x, 0 * x, -x], -1)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(logits=torch.zeros(3).double()))
            pyro.sample("x", dist.Normal(k.double(), 1.0), obs=x.squeeze(-1))

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(logits=logits(x)))

    found = diagnose(model, guide, x, num_samples=400)
    q = logits(x).softmax(-1)
    kl = (q * (q.log() + log(3))).sum(-1)
    torch.testing.assert_close(found.kl, kl, rtol=0, atol=1e-9)
    information = (q * (q / q.mean(0)).log()).sum(-1)
    within_errors(found, "mutual_information", information)


# ---------------------------------------------------------------------------------------------------------------
# What the numbers say


def test_a_collapsed_pair_is_called_so(lg: LinearGaussian) -> None:
    x = pairs.simulated(lg, 29)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", pairs.prior(lg))
            pyro.sample("x", dist.Normal(lg.mean, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", pairs.prior(lg))

    found = diagnose(model, guide, x)
    assert found.kl.abs().max() == 0
    assert found.num_active == 0
    assert found.unit_variance.abs().max() < 1e-12
    assert found.mutual_information.abs().max() < 1e-9
    assert found.standard_error["reconstruction"].max() < 1e-9
    assert any("posterior collapse" in warning for warning in found.warnings())
    assert "0 of 3" in str(found)


def test_information_has_a_ceiling_and_says_so() -> None:
    model, guide, x = one_dimension(11, slope=50.0, scale=0.1)
    found = diagnose(model, guide, x)
    assert found.mean["mutual_information"] == pytest.approx(log(11), abs=1e-6)
    assert any("ceiling" in warning for warning in found.warnings())
    model, guide, x = one_dimension(11)
    assert diagnose(model, guide, x).warnings() == []


def test_information_of_a_sample_approaches_that_of_the_population() -> None:
    """I(x; z) = ½ log(1 + (slope/scale)²) for x ~ N(0, 1): a lower bound in expectation, and near with enough data."""
    exact = 0.5 * log(1 + (1.2 / 0.4) ** 2)
    model, guide, x = one_dimension(diagnosis.MOST_DATA + 9)
    found = diagnose(model, guide, x, num_samples=11)
    assert len(found.kl) == diagnosis.MOST_DATA + 9
    assert len(found.mutual_information) == diagnosis.MOST_DATA
    assert abs(found.mean["mutual_information"] - exact) < 4.5 * found.mean_standard_error["mutual_information"]
    biased = diagnose(model, guide, x[:3], num_samples=401)
    assert biased.mean["mutual_information"] < exact


def test_a_vae_has_the_elbo_of_its_importance_weights() -> None:
    with pv.isolation.seeded(1):
        small = pv.networks.MLP((8, 8), 6, hidden_dims=(13,)), pv.networks.MLP(3, (8, 8), hidden_dims=(13,))
        vae = pv.VAE((8, 8), latent_dim=3, encoder=small[0], decoder=small[1])
    x = pv.data.load("digits").static_binarization(seed=0).test[:23]
    found = diagnose(vae.model, vae.guide, x)
    evidence = pv.importance_sampling(vae.model, vae.guide, x)
    error = np.hypot(found.mc_standard_error["elbo"], evidence.log_px.std().item() / sqrt(len(x) * 1000))
    assert abs(found.mean["elbo"] - evidence.elbo.mean().item()) < 4.5 * error + 1e-3
    assert set(found.mean) == set(found.standard_error) == set(NAMES)


def test_draws_depend_on_the_seed_and_leave_no_trace(lg: LinearGaussian, rng_unchanged: None) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", lg.perturbed_guide().q(self.dropout(x)))

    x, guide = pairs.simulated(lg), Noisy()
    one, two, other = (diagnose(lg.model, guide, x, seed=seed) for seed in (3, 3, 4))
    for name in NAMES:
        assert torch.equal(getattr(one, name), getattr(two, name))
    assert not torch.equal(one.elbo, other.elbo)
    assert guide.training
    assert guide.dropout.training


def test_without_a_seed_the_global_random_state_is_used(lg: LinearGaussian) -> None:
    x, guide = pairs.simulated(lg), lg.perturbed_guide()
    one, two = (diagnose(lg.model, guide, x, seed=None) for _ in range(2))
    assert not torch.equal(one.elbo, two.elbo)


def test_one_datum_has_no_variance(lg: LinearGaussian) -> None:
    found = diagnose(lg.model, lg.perturbed_guide(), pairs.simulated(lg)[:1])
    assert found.unit_variance.isnan().all()
    assert found.num_active == 0
    assert found.warnings() == []
    assert found.mutual_information.abs().max() < 1e-12
    found.summary()


def test_numbers_that_are_not_finite_are_counted(lg: LinearGaussian) -> None:
    """A guide that goes beyond the prior."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(-torch.ones(3).double(), torch.ones(3).double()).to_event(1))
            pyro.sample("x", pairs.conditional(lg, z).to_event(1), obs=x)

    found = diagnose(model, lg.perturbed_guide(), pairs.simulated(lg), num_samples=7)
    assert any("not finite" in warning for warning in found.warnings())


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"num_samples": 1}, ValueError, "num_samples must be at least 2"),
        ({"num_samples": 2.5}, ValueError, "num_samples must be an integer"),
    ],
)
def test_what_is_refused(lg: LinearGaussian, options: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        diagnose(lg.model, lg.guide, pairs.simulated(lg), **options)


def test_what_has_no_log_weight_is_refused_as_everywhere(lg: LinearGaussian) -> None:
    with pytest.raises(TypeError, match="must be a tensor"):
        diagnose(lg.model, lg.guide, [1.0, 2.0])
    autoencoder = pv.Autoencoder((7,), latent_dim=3)
    with pytest.raises(ValueError, match="at one point"):
        diagnose(autoencoder.model, autoencoder.guide, torch.zeros(5, 7))
