"""log p(x) by importance sampling: exact where it is known, honest about its error, the same however it is cut."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from math import inf, log, nan, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

from ppl_vae import coin, pareto
from ppl_vae.autoencoder import Autoencoder
from ppl_vae.evidence import Evidence, WeightStream, importance, importance_sampling
from ppl_vae.vae import VAE

NUM_DATA = 523


@pytest.fixture
def lg() -> Any:
    return pairs.linear_gaussian()


# ---------------------------------------------------------------------------------------------------------------
# Statements that hold for the right estimator and for none of the wrong ones below.


def exact_posterior_gives_the_exact_value() -> None:
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg)
    for num_samples in (1, 7, 1000):
        for max_rows in (1, 13, num_samples * len(x)):
            found = importance_sampling(lg.model, lg.guide, x, num_samples=num_samples, max_rows=max_rows)
            assert (found.log_px - lg.log_px(x)).abs().max() < 1e-5
            assert (found.elbo - lg.log_px(x)).abs().max() < 1e-5
            assert (found.ess - num_samples).abs().max() < 1e-3
            if num_samples > 1:
                assert found.standard_error.max() < 1e-5
                assert (found.pareto_k == -inf).all()


def the_wrong_guide_is_right_within_its_error() -> None:
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg, num_data=500)
    found = importance_sampling(lg.model, lg.perturbed_guide(), x, num_samples=3001)
    z = (found.log_px - lg.log_px(x)) / found.standard_error
    assert (z.abs() < 4.5).double().mean() >= 0.99
    # E[w] / p(x) = 1 over all data, which have independent draws
    ratio = (found.log_px - lg.log_px(x)).exp()
    assert abs(ratio.mean() - 1) < 4.5 * ratio.std() / sqrt(len(x))


def the_elbo_is_that_of_the_guide() -> None:
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg, num_data=500)
    guide = lg.perturbed_guide()
    difference = importance_sampling(lg.model, guide, x, num_samples=1000).elbo - guide.elbo(x)
    assert abs(difference.mean()) < 4.5 * difference.std() / sqrt(len(x))


def the_standard_error_is_honest() -> None:
    """Over 500 replicates the spread of log_px is what is reported, where Pareto k < 0.3."""
    lg = pairs.linear_gaussian()
    checked = 0
    for seed, (shift, spread) in enumerate([(0.2, 1.7), (0.5, 1.5), (1.0, 1.4)]):
        x = pairs.simulated(lg, num_data=1).expand(500, -1)
        guide = lg.perturbed_guide(shift=shift, spread=spread)
        found = importance_sampling(lg.model, guide, x, num_samples=1000, seed=seed)
        if found.pareto_k.median() < 0.3:
            assert 0.9 < found.log_px.std() / found.standard_error.mean() < 1.15
            checked += 1
    assert checked >= 2


def pieces_add_up() -> None:
    """The accumulator gives for any cut of the same weights what one pass in float64 gives."""
    lw = torch.randn(1009, 5, dtype=torch.float64) * 3 - 500
    lw[17, 2] = -inf
    whole = by_hand(lw)
    for size in (1, 7, 100, 1009):
        stream = importance.WeightStream(len(lw), lw.shape[1])
        for part in lw.split(size):
            stream.add(part)
        for found, expected in zip(stream.evidence(), whole, strict=True):
            # The jackknife by hand is a difference of numbers near 500,000.
            torch.testing.assert_close(
                found, expected, rtol=1e-12, atol=2e-9 if expected is whole[5] else 1e-12, equal_nan=True
            )


def by_hand(lw: Tensor) -> tuple[Tensor, ...]:
    n = len(lw)
    w = (lw - lw.max(0).values).exp()
    log_px = lw.logsumexp(0) - log(n)
    ess = w.sum(0) ** 2 / w.square().sum(0)
    jackknife = n * log_px - (n - 1) * torch.stack([leave_out(lw, k) for k in range(n)]).mean(0)
    jackknife[w.max(0).values / w.sum(0) >= 0.5] = nan
    smoothed = pareto_smoothed_by_hand(lw)
    return log_px, ((n / ess - 1) / (n - 1)).sqrt(), ess, pareto.shape(lw), lw.mean(0), jackknife, smoothed


def leave_out(lw: Tensor, k: int) -> Tensor:
    return torch.cat([lw[:k], lw[k + 1 :]]).logsumexp(0) - log(len(lw) - 1)


def pareto_smoothed_by_hand(lw: Tensor) -> Tensor:
    """With all the weights there, as the literature has it."""
    ordered = lw.sort(0, descending=True).values
    kept = pareto.tail_length(len(lw)) + 1
    tail = pareto.smoothed(ordered[:kept].T, len(lw))[1].T
    return torch.cat([tail, ordered[kept:]]).logsumexp(0) - log(len(lw))


def the_mean_weighs_every_datum_alike() -> None:
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg, num_data=1031)  # no multiple of any block
    found = importance_sampling(lg.model, lg.guide, x, num_samples=2)
    assert found.log_px.shape == (1031,)
    assert found.mean == pytest.approx(lg.log_px(x).mean().item(), abs=1e-9)


STATEMENTS: dict[str, Callable[[], None]] = {
    f.__name__: f
    for f in (
        exact_posterior_gives_the_exact_value,
        the_wrong_guide_is_right_within_its_error,
        the_elbo_is_that_of_the_guide,
        the_standard_error_is_honest,
        pieces_add_up,
        the_mean_weighs_every_datum_alike,
    )
}


@pytest.fixture(params=[False, True], ids=["eager", "compiled"])
def compiled(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, graphs_as_recorded: list[Any]
) -> Iterator[bool]:
    """Has all of a test sampled by graphs too, and sees to it that there are some."""
    if request.param:
        monkeypatch.setattr(sys.modules[__name__], "importance_sampling", partial(importance_sampling, compile=True))
    yield request.param
    assert bool(graphs_as_recorded) == request.param


@pytest.mark.parametrize("statement", STATEMENTS)
def test_statement(statement: str) -> None:
    STATEMENTS[statement]()


@pytest.mark.parametrize("compiled", [True], indirect=True)
@pytest.mark.parametrize(
    "statement",
    [
        exact_posterior_gives_the_exact_value,
        the_wrong_guide_is_right_within_its_error,
        the_mean_weighs_every_datum_alike,
    ],
)
def test_statement_of_graphs(statement: Callable[[], None], compiled: bool) -> None:
    statement()


class RequestedNotDrawn(WeightStream):
    """Divides by the number of samples asked for plus what a last full chunk would have held."""

    def evidence(self) -> Any:
        log_px, *rest = super().evidence()
        return log_px - log((self.count + 3) / self.count), *rest


class MeanOfLogs(WeightStream):
    def evidence(self) -> Any:
        _, *rest = super().evidence()
        return self.shift + self.total / self.count, *rest


class AveragesPartsInLogSpace(WeightStream):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parts: list[Tensor] = []

    def add(self, log_weights: Tensor) -> None:
        super().add(log_weights)
        self.parts.append(log_weights.double().logsumexp(0) - log(len(log_weights)))

    def evidence(self) -> Any:
        _, *rest = super().evidence()
        return torch.stack(self.parts).mean(0), *rest


class DropsImpossibleDraws(WeightStream):
    def add(self, log_weights: Tensor) -> None:
        super().add(log_weights)
        self.count -= int(log_weights.isneginf().any(1).sum())


class ErrorFromLogs(WeightStream):
    """√(variance of log w / K): the error of the ELBO, not of log p(x)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.squares = torch.zeros_like(self.total)

    def add(self, log_weights: Tensor) -> None:
        super().add(log_weights)
        self.squares = self.squares + (log_weights - self.shift).square().sum(0)

    def evidence(self) -> Any:
        log_px, _, *rest = super().evidence()
        variance = self.squares / self.count - (self.total / self.count) ** 2
        return log_px, (variance.clamp(min=0) / self.count).sqrt() * 0.7, *rest


class EssOfLogs(WeightStream):
    def evidence(self) -> Any:
        log_px, error, ess, *rest = super().evidence()
        return log_px, error, ess.clamp(max=self.count - 1), *rest


class ForgetsLogK(WeightStream):
    def evidence(self) -> Any:
        log_px, *rest = super().evidence()
        return log_px + log(self.count), *rest


STREAM_MUTANTS: dict[type[WeightStream], str] = {
    RequestedNotDrawn: "exact_posterior_gives_the_exact_value",
    MeanOfLogs: "the_wrong_guide_is_right_within_its_error",
    AveragesPartsInLogSpace: "pieces_add_up",
    DropsImpossibleDraws: "pieces_add_up",
    ErrorFromLogs: "the_standard_error_is_honest",
    EssOfLogs: "exact_posterior_gives_the_exact_value",
    ForgetsLogK: "exact_posterior_gives_the_exact_value",
}


@pytest.mark.parametrize("mutant", STREAM_MUTANTS, ids=lambda m: m.__name__)
def test_a_wrong_accumulator_is_caught(mutant: type[WeightStream], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance, "WeightStream", mutant)
    with pytest.raises(AssertionError):
        STATEMENTS[STREAM_MUTANTS[mutant]]()


def mean_of_minibatch_means(self: Evidence) -> float:
    return torch.stack([part.mean() for part in self.log_px.split(128)]).mean().item()


def mean_over_full_minibatches(self: Evidence) -> float:
    return self.log_px[: len(self.log_px) // 128 * 128].mean().item()


@pytest.mark.parametrize("mutant", [mean_of_minibatch_means, mean_over_full_minibatches])
def test_a_mean_of_means_is_caught(mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Evidence, "mean", property(mutant))
    with pytest.raises(AssertionError):
        the_mean_weighs_every_datum_alike()


def scale_inside(joint: Any) -> Any:
    return lambda self, z, *args, num_samples: 2 * joint(self, z, *args, num_samples=num_samples)


def no_replay(joint: Any) -> Any:
    """The model runs with latents of its own."""
    return lambda self, z, *args, num_samples: joint(
        self, {n: torch.randn_like(v) for n, v in z.items()}, *args, num_samples=num_samples
    )


def whole_batch(joint: Any) -> Any:
    def wrong(self: Any, z: Any, *args: Any, num_samples: int) -> Tensor:
        right = joint(self, z, *args, num_samples=num_samples)
        return right.sum(1, keepdim=True).expand_as(right)

    return wrong


@pytest.mark.parametrize("mutation", [scale_inside, no_replay, whole_batch])
def test_wrong_weights_are_caught(mutation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance.Pair, "log_joint", mutation(importance.Pair.log_joint))
    with pytest.raises((AssertionError, ValueError)):
        exact_posterior_gives_the_exact_value()
    with pytest.raises((AssertionError, ValueError)):
        the_wrong_guide_is_right_within_its_error()


# ---------------------------------------------------------------------------------------------------------------
# The same numbers, whatever the form of the pair and however the work is cut.


@pytest.mark.parametrize(
    ("form", "compiled"),
    [
        *((form, False) for form in (*pairs.FORMS, "auto_normal")),
        *((form, True) for form in ("as_functions", "with_pixel_plate", "with_two_dimensional_decoder", "auto_normal")),
    ],
    indirect=["compiled"],
)
def test_every_form_gives_the_same_numbers(form: str, lg: Any, compiled: bool) -> None:
    x, guide = pairs.simulated(lg), lg.perturbed_guide()
    model, q = pairs.auto_normal(lg, guide, x) if form == "auto_normal" else pairs.FORMS[form](lg, guide.q)
    # A pair that runs on all its data or not at all draws for these data and no others.
    whole = form in ("with_fixed_plate", "auto_normal")
    same = pairs.with_fixed_plate(lg, guide.q) if whole else (lg.model, guide)
    reference = importance_sampling(*same, x, num_samples=1000)
    assert ((reference.log_px - lg.log_px(x)).abs() < 4.5 * reference.standard_error).all()
    found = importance_sampling(model, q, x, num_samples=1000)
    for name in ("log_px", "standard_error", "ess", "pareto_k", "elbo"):
        torch.testing.assert_close(getattr(found, name), getattr(reference, name), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("num_samples", [1, 7, 997, 5003])
def test_numbers_do_not_depend_on_how_the_work_is_cut(num_samples: int, lg: Any) -> None:
    x, guide = pairs.simulated(lg, num_data=37), lg.perturbed_guide()
    reference = importance_sampling(lg.model, guide, x, num_samples=num_samples)
    for max_rows in (101, 4096):
        found = importance_sampling(lg.model, guide, x, num_samples=num_samples, max_rows=max_rows)
        torch.testing.assert_close(found.log_px, reference.log_px, rtol=0, atol=1e-10)
        torch.testing.assert_close(found.pareto_k, reference.pareto_k, rtol=0, atol=1e-8)


def test_the_first_data_do_not_depend_on_the_rest(lg: Any, compiled: bool) -> None:
    x, guide = pairs.simulated(lg, num_data=53), lg.perturbed_guide()
    whole = importance_sampling(lg.model, guide, x, num_samples=5000)
    part = importance_sampling(lg.model, guide, x[:16], num_samples=5000)
    torch.testing.assert_close(whole.log_px[:16], part.log_px, rtol=0, atol=1e-10)


def test_any_integer_is_a_seed_and_a_number_of_samples(lg: Any) -> None:
    x = pairs.simulated(lg)
    for seed in (-5, 2**64 + 1):
        found = importance_sampling(lg.model, lg.guide, x, num_samples=np.int64(3), seed=seed)
        assert (found.log_px - lg.log_px(x)).abs().max() < 1e-9


def test_seeds(lg: Any) -> None:
    x, guide = pairs.simulated(lg), lg.perturbed_guide()
    one, same, other = (importance_sampling(lg.model, guide, x, num_samples=100, seed=s).log_px for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert (one != other).all()
    free = [importance_sampling(lg.model, guide, x, num_samples=100, seed=None).log_px for _ in range(2)]
    assert (free[0] != free[1]).all()


def test_every_datum_and_block_has_draws_of_its_own(lg: Any) -> None:
    x = pairs.simulated(lg)[:1].expand(100, -1)
    found = importance_sampling(lg.model, lg.perturbed_guide(), x, num_samples=1000).log_px
    assert len(found.unique()) == 100


def test_nothing_is_changed_by_evaluation() -> None:
    decoder = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 4))
    vae = VAE((4,), 2, decoder=decoder)
    x = (torch.arange(20).reshape(5, 4) % 2).float()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    vae.guide.eval()
    state = torch.get_rng_state()
    kept = pyro.param("model$$$mine", torch.tensor(1.5))
    one, two = (importance_sampling(vae.model, vae.guide, x, num_samples=50) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.log_px, two.log_px)
    assert list(pyro.get_param_store()) == ["model$$$mine"]
    assert pyro.param("model$$$mine") is kept
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert all(module.training for module in decoder.modules())
    assert not vae.guide.encoder.training
    assert all(p.grad is None and p.requires_grad for p in vae.parameters())
    assert not one.log_px.requires_grad


# ---------------------------------------------------------------------------------------------------------------
# Other pairs with a known answer.


def test_beta_bernoulli_from_its_prior(compiled: bool) -> None:
    pair = coin.BetaBernoulli(2.0, 3.0)
    tosses = torch.bernoulli(torch.full((5, 11), 0.4))

    def prior_as_guide(tosses: Tensor) -> None:
        with pyro.plate("data", len(tosses)):
            pyro.sample("z", dist.Beta(torch.tensor(2.0), torch.tensor(3.0)))

    found = importance_sampling(pair.model, prior_as_guide, tosses, num_samples=20_000)
    assert ((found.log_px - pair.log_px(tosses)).abs() < 4.5 * found.standard_error).all()
    exact = importance_sampling(pair.model, pair.guide, tosses, num_samples=7)
    assert (exact.log_px - pair.log_px(tosses)).abs().max() < 2e-5  # float32 sums of the Beta density


def test_a_discrete_latent_against_enumeration(compiled: bool) -> None:
    weights = torch.tensor([0.2, 0.5, 0.3]).double()
    locs = torch.tensor([-1.0, 0.5, 2.0]).double()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(locs[z], 0.8), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(torch.ones(3).double() / 3))

    x = torch.linspace(-2, 3, 5).double()
    exact = (weights.log() + dist.Normal(locs, 0.8).log_prob(x[:, None])).logsumexp(1)
    found = importance_sampling(model, guide, x, num_samples=20_000)
    assert ((found.log_px - exact).abs() < 4.5 * found.standard_error).all()


def test_a_pair_without_latents_is_exact() -> None:
    tosses = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    found = importance_sampling(coin.model, coin.guide, tosses, num_samples=3)
    torch.testing.assert_close(found.log_px, torch.full((5,), log(0.5)).double(), rtol=0, atol=1e-6)


def test_impossible_data_count_as_such() -> None:
    """Draws of probability 0 count among the draws; a datum impossible under all of them has log p(x) = −∞."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(torch.tensor(0.0), torch.tensor(1.0)))
            pyro.sample("x", dist.Delta((z > 0.75).float()), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(torch.tensor(0.0), torch.tensor(1.0)))

    found = importance_sampling(model, guide, torch.tensor([1.0, 0.0, 2.0]), num_samples=10_000)
    assert abs(found.log_px[0].exp() - 0.25) < 4.5 * sqrt(0.25 * 0.75 / 10_000)
    assert found.log_px[2] == -inf
    assert found.ess[2] == 0
    assert any("probability 0" in warning for warning in found.warnings())


def test_weights_that_are_not_finite_name_the_site() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(torch.where(z > 1.5, torch.nan, z).sum(-1), 1.0, validate_args=False), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"A weight of datum \d+ is NaN or \+∞: site 'x' of the model"):
        importance_sampling(model, guide, torch.zeros(300), num_samples=100)


# ---------------------------------------------------------------------------------------------------------------
# What is refused, and what is said.


def test_refusals(lg: Any) -> None:
    x = pairs.simulated(lg)
    for bad in (0, -3, 2.5):
        with pytest.raises(ValueError, match="num_samples must be an integer of at least 1"):
            importance_sampling(lg.model, lg.guide, x, num_samples=bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_rows must be an integer of at least 1"):
        importance_sampling(lg.model, lg.guide, x, max_rows=0)
    with pytest.raises(ValueError, match="NaN or infinite"):
        importance_sampling(lg.model, lg.guide, x * float("nan"))
    with pytest.raises(ValueError, match="There are no data"):
        importance_sampling(lg.model, lg.guide, x[:0])
    autoencoder = Autoencoder((7,), 3)
    with pytest.raises(ValueError, match="no density log q"):
        importance_sampling(autoencoder.model, autoencoder.guide, x.float())


def test_grey_pixels_are_refused_wherever_they_are() -> None:
    """Also with validation switched off for the whole notebook, and in the last datum only."""
    vae = VAE((3,), 2)
    x = torch.ones(700, 3)
    x[-1, 1] = 0.5
    pyro.enable_validation(False)
    with pytest.raises(ValueError, match=r"A Bernoulli likelihood scores data in \{0, 1\}"):
        importance_sampling(vae.model, vae.guide, x, num_samples=10)
    pyro.enable_validation(True)


def test_weights_of_a_network_that_are_nan_are_explained() -> None:
    vae = VAE((3,), 2)
    torch.nn.init.constant_(vae.decoder.layers[0].weight, torch.nan)
    with pytest.raises(ValueError, match=r"got parameters that it cannot have .*Its networks hold NaN"):
        importance_sampling(vae.model, vae.guide, torch.ones(7, 3), num_samples=10)


def test_summary_says_when_not_to_believe_it(lg: Any, capsys: pytest.CaptureFixture[str]) -> None:
    x = pairs.simulated(lg, num_data=100)
    good = importance_sampling(lg.model, lg.perturbed_guide(shift=0.1, spread=1.05), x, num_samples=2000)
    good.summary()
    printed = capsys.readouterr().out
    rows = {line[:18].strip(): line[18:30].strip() for line in printed.splitlines()[1:]}
    for name, value in (
        ("log p(x)", good.log_px),
        ("jackknife", good.jackknife),
        ("Pareto-smoothed", good.pareto_smoothed),
        ("ELBO", good.elbo),
    ):
        assert rows[name] == f"{value.mean().item():.3f}"
    assert rows["Pareto k good"] == f"{100 * good.share_believable:.1f} %"
    assert "100 data, 2000 samples each" in printed
    assert "!" not in printed
    bad = importance_sampling(lg.model, lg.perturbed_guide(shift=3.0, spread=0.3), x, num_samples=2000)
    text = str(bad)
    for words in ("Pareto k is above", "effective sample size is below 50", "standard error exceeds", "bias is larger"):
        assert words in text
    few = importance_sampling(lg.model, lg.guide, x, num_samples=10)
    assert "too few" in str(few)


def test_numbers_over_the_data() -> None:
    found = Evidence(
        log_px=torch.tensor([-1.0, -2.0, -6.0]).double(),
        standard_error=torch.tensor([0.1, 0.2, 0.4]).double(),
        ess=torch.ones(3).double(),
        pareto_k=torch.tensor([-inf, 0.6, inf]).double(),
        elbo=torch.zeros(3).double(),
        jackknife=torch.zeros(3).double(),
        pareto_smoothed=torch.zeros(3).double(),
        num_samples=1000,
        method="Importance sampling from the guide",
        strategy="particles",
    )
    assert found.mean == pytest.approx(-3)
    assert found.mean_standard_error == pytest.approx(sqrt((4 + 1 + 9) / 2) / sqrt(3))
    assert found.mc_standard_error == pytest.approx(sqrt(0.01 + 0.04 + 0.16) / 3)
    assert found.mc_bias == pytest.approx(-0.5 * (0.01 + 0.04 + 0.16) / 3)
    assert found.share_believable == pytest.approx(2 / 3)


def test_bound_rises_with_samples_and_by_the_known_amount(lg: Any) -> None:
    x, guide = pairs.simulated(lg, num_data=NUM_DATA), lg.perturbed_guide()
    means = [importance_sampling(lg.model, guide, x, num_samples=k).mean for k in (1, 10, 100, 1000)]
    assert means == sorted(means)
    kl = (lg.log_px(x) - guide.elbo(x)).mean().item()
    assert means[-1] - means[0] == pytest.approx(kl, abs=0.25)


MEMORY = """
import sys
import torch
import ppl_vae as pv
torch.manual_seed(0)
num_data, num_samples = map(int, sys.argv[1:])
vae = pv.VAE((28, 28), 5, encoder=pv.networks.MLP((28, 28), 10, hidden_dims=(64,)),
             decoder=pv.networks.MLP(5, (28, 28), hidden_dims=(64,)))
x = torch.empty(20_000, 28, 28).bernoulli_(0.5)  # in place: making the data must not set the peak
pv.importance_sampling(vae.model, vae.guide, x[:num_data], num_samples=num_samples)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak_memory(num_data: int, num_samples: int) -> float:
    """Peak resident memory in KiB of a fresh process that holds the same 20,000 data and scores `num_data` of them.

    From /proc, for `ru_maxrss` of a child starts at what its parent had.
    """
    command = [sys.executable, "-c", MEMORY, str(num_data), str(num_samples)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize(
    ("small", "large"), [((1, 1000), (1, 100_000)), ((1000, 10), (10_000, 10))], ids=["samples", "data"]
)
def test_memory_is_bounded(small: tuple[int, int], large: tuple[int, int]) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc, which this system has not")
    assert peak_memory(*large) < 1.1 * peak_memory(*small)


def test_eager_scoring_does_not_wait_for_the_compiler() -> None:
    """PyTorch's compiler, with the sympy that it imports, takes over a second; only compile=True needs it."""
    code = """
import sys
from functools import partial
import ppl_vae as pv
vae = pv.VAE((2, 2), 2)
x = vae.sample(3)
estimators = [pv.importance_sampling, partial(pv.annealed_importance_sampling, num_temperatures=2)]
pv.bounds(vae.model, vae.guide, x, estimators=estimators, num_mode_checks=0)
print("sympy" in sys.modules)
import ppl_vae.compiling
print("sympy" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
