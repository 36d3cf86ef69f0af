"""The two parts of log p(x) − ELBO: equal to their closed forms, each datum's its own, and not prettied."""

from __future__ import annotations

from collections.abc import Callable
from math import pi, sqrt
from types import SimpleNamespace
from typing import Any

import numpy as np
import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from ppl_vae import coin, gaps
from ppl_vae.evidence import importance_sampling
from ppl_vae.gaps import Gaps, inference_gaps
from ppl_vae.linear_gaussian import LinearGaussian
from ppl_vae.proposals.families import CouplingFlow, DiagonalNormal, FullCovarianceNormal
from ppl_vae.scoring import Target
from ppl_vae.scoring.coordinates import Coordinates
from ppl_vae.vae import VAE


@pytest.fixture
def lg() -> LinearGaussian:
    return pairs.linear_gaussian()


def diagonal_gap(lg: LinearGaussian) -> float:
    """½ (Σ log Λ_ii − log|Λ|): the approximation gap of the best diagonal normal, for every x."""
    return 0.5 * (lg.precision.diagonal().log().sum() - lg.precision.logdet()).item()


def within_errors(found: Gaps, name: str, exact: Tensor | float, slack: float = 1e-3) -> None:
    """Each datum within 4.5 of its standard errors, and the mean too; `slack` for what the ascent leaves undone."""
    difference = getattr(found, name) - exact
    assert (difference.abs() < 4.5 * found.standard_error[name] + slack).all()
    assert abs(difference.mean()) < 4.5 * found.mc_standard_error[name] + slack


# ---------------------------------------------------------------------------------------------------------------
# Statements that hold for the right decomposition and for none of the wrong ones below.


def gaps_are_their_closed_forms() -> None:
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg, 61)
    for guide in (lg.perturbed_guide(), lg.perturbed_guide(shift=1.0, spread=0.8)):
        found = inference_gaps(lg.model, guide, x, num_steps=400, log_px=lg.log_px(x))
        exact = lg.log_px(x) - guide.elbo(x)
        within_errors(found, "kl", exact)
        within_errors(found, "approximation", diagonal_gap(lg))
        within_errors(found, "amortisation", exact - diagonal_gap(lg))
        assert found.converged.double().mean() > 0.9
        assert torch.equal(found.kl, found.log_px - found.elbo)
        torch.testing.assert_close(found.kl, found.approximation + found.amortisation, rtol=0, atol=1e-12)


def a_guide_outside_the_family_has_a_negative_gap() -> None:
    """The posterior itself against diagonal normals: nothing is clipped, and the summary says so."""
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg)
    found = inference_gaps(lg.model, lg.guide, x, num_steps=300, num_samples=4000, log_px=lg.log_px(x))
    assert found.kl.abs().max() < 1e-6
    within_errors(found, "amortisation", -diagonal_gap(lg))
    assert not found.converged.any()
    assert "amortisation is negative by more than 4.5 standard errors for 11 of 11 data" in str(found)


def a_constrained_latent_has_its_jacobian() -> None:
    """Coins in logit coordinates: log p(x), the guide's KL and the ELBO of the best normal."""
    pair = coin.BetaBernoulli(2.0, 3.0)
    tosses = torch.bernoulli(torch.full((5, 7), 0.4)).double()

    def q(tosses: Tensor) -> dist.TorchDistribution:
        exact = pair.posterior(tosses)
        return dist.Beta(exact.concentration1 + 2, exact.concentration0)

    def guide(tosses: Tensor) -> None:
        with pyro.plate("data", len(tosses)):
            pyro.sample("z", q(tosses))

    found = inference_gaps(pair.model, guide, tosses, num_steps=400, num_samples=4000)
    within_errors(found, "log_px", pair.log_px(tosses))
    within_errors(found, "kl", kl_divergence(q(tosses), pair.posterior(tosses)))
    best = torch.stack([best_normal_of_a_coin(pair, row) for row in tosses])
    within_errors(found, "best_elbo", best)


def nothing_is_clipped() -> None:
    """Of a log p(x) that is too low by five nats all gaps are negative, and the last for a guide outside the family."""
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg)
    found = inference_gaps(lg.model, lg.guide, x, num_steps=40, num_samples=1009, log_px=lg.log_px(x) - 5)
    assert torch.equal(found.kl, found.log_px - found.elbo)
    assert torch.equal(found.approximation, found.log_px - found.best_elbo)
    assert torch.equal(found.amortisation, found.best_elbo - found.elbo)
    for gap in (found.kl, found.approximation, found.amortisation):
        assert gap.max() < 0
    for name in ("kl", "approximation", "amortisation"):
        assert f"! {name} is negative by more than 4.5 standard errors for 11 of 11 data" in str(found)


def best_normal_of_a_coin(pair: coin.BetaBernoulli, tosses: Tensor) -> Tensor:
    """The greatest ELBO of a normal in logit coordinates, by Gauss-Hermite quadrature."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(60))
    heads, tails = tosses.sum(), (1 - tosses).sum()
    log_beta = torch.lgamma(torch.tensor([pair.a, pair.b, pair.a + pair.b]).double())

    def elbo(loc: Tensor, log_scale: Tensor) -> Tensor:
        u = loc + log_scale.exp() * nodes
        # With the prior's p^(a − 1) (1 − p)^(b − 1) and dp/du = p (1 − p).
        log_p, log_1_p = torch.nn.functional.logsigmoid(u), torch.nn.functional.logsigmoid(-u)
        log_joint = (pair.a + heads) * log_p + (pair.b + tails) * log_1_p - log_beta[0] - log_beta[1] + log_beta[2]
        return (weights * log_joint).sum() / sqrt(2 * pi) + log_scale + 0.5 * (1 + torch.tensor(2 * pi).log())

    parameters = torch.zeros(2).double().requires_grad_()
    optimiser = torch.optim.LBFGS([parameters], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = -elbo(*parameters)
        loss.backward()
        return loss

    optimiser.step(closure)
    return elbo(*parameters).detach()


def a_datum_does_not_know_of_the_others() -> None:
    lg = pairs.linear_gaussian()
    x, guide = pairs.simulated(lg, 71), lg.perturbed_guide()  # two blocks

    def of(data: Tensor, family: Any) -> Gaps:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gaps, "TEMPERATURES", 7)  # of log p(x), whatever it is
            return inference_gaps(lg.model, guide, data, family=family, num_steps=23, num_samples=50)

    for family in (DiagonalNormal(), CouplingFlow(num_layers=2, hidden_dim=5)):
        among, alone, replaced = (of(data, family) for data in (x, x[:1], torch.cat([x[:1], 9 * x[1:]])))
        for name in gaps.NAMES:
            for other in (alone, replaced):
                assert abs(getattr(other, name)[0] - getattr(among, name)[0]) < 1e-5
                assert abs(other.standard_error[name][0] - among.standard_error[name][0]) < 1e-5


def all_random_numbers_are_fresh() -> None:
    """The guide's draws, the ascent's, those of the best ELBO and of log p(x), in each of two blocks."""
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg, 67)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gaps, "TEMPERATURES", 2)
        seeds, right = [], torch.manual_seed
        patch.setattr(torch, "manual_seed", lambda seed: (seeds.append(seed), right(seed))[1])
        inference_gaps(lg.model, lg.perturbed_guide(), x, num_steps=2, num_samples=2)
    derived = [seed for seed in seeds if seed > 2**32]  # not the fixed ones that isolate a run
    assert len(derived) == 2 * 5
    assert len(set(derived)) == len(derived)


STATEMENTS: dict[str, Callable[[], None]] = {
    f.__name__: f
    for f in (
        gaps_are_their_closed_forms,
        a_guide_outside_the_family_has_a_negative_gap,
        a_constrained_latent_has_its_jacobian,
        a_datum_does_not_know_of_the_others,
        nothing_is_clipped,
        all_random_numbers_are_fresh,
    )
}


@pytest.mark.parametrize("statement", STATEMENTS)
def test_statement(statement: str) -> None:
    STATEMENTS[statement]()


class ClipsTheNormOfAll(torch.optim.Adam):
    def step(self, closure: Any = None) -> Any:
        torch.nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 1.0)
        return super().step(closure)


def couples_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim, "Adam", ClipsTheNormOfAll)


def clipped(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    right = getattr(Gaps, name)
    monkeypatch.setattr(Gaps, name, property(lambda self: right.fget(self).clamp(min=0)))


def clips_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    clipped(monkeypatch, "amortisation")


def clips_the_kl(monkeypatch: pytest.MonkeyPatch) -> None:
    clipped(monkeypatch, "kl")


def clips_the_approximation(monkeypatch: pytest.MonkeyPatch) -> None:
    clipped(monkeypatch, "approximation")


def reuses_the_seed_of_the_ascent(monkeypatch: pytest.MonkeyPatch) -> None:
    right = gaps.start_from
    monkeypatch.setattr(gaps, "start_from", lambda root, start, what: right(root, start, 1 if what == 2 else what))


def jacobian_of_wrong_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Coordinates.restore
    monkeypatch.setattr(Coordinates, "restore", lambda self, u: ((found := right(self, u))[0], -found[1]))


def forgets_the_jacobian(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Coordinates.restore

    def without(self: Coordinates, u: Tensor) -> tuple[Any, Tensor]:
        values, log_det = right(self, u)
        return values, 0 * log_det

    monkeypatch.setattr(Coordinates, "restore", without)


MUTANTS: dict[Callable[[pytest.MonkeyPatch], None], str] = {
    couples_the_data: "a_datum_does_not_know_of_the_others",
    clips_at_zero: "a_guide_outside_the_family_has_a_negative_gap",
    clips_the_kl: "nothing_is_clipped",
    clips_the_approximation: "nothing_is_clipped",
    reuses_the_seed_of_the_ascent: "all_random_numbers_are_fresh",
    forgets_the_jacobian: "a_constrained_latent_has_its_jacobian",
    jacobian_of_wrong_sign: "a_constrained_latent_has_its_jacobian",
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.__name__)
def test_a_wrong_decomposition_is_caught(mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        STATEMENTS[MUTANTS[mutant]]()


def test_draws_that_the_ascent_has_seen_would_be_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four draws, the same for every step and again for the ELBO that is reported: above what any diagonal can have."""
    right, kept = Target.normal, {}

    def again(self: Target, num_samples: int) -> Tensor:
        few = kept.setdefault(id(self), right(self, 4))
        return few.repeat(num_samples // 4 + 1, 1, 1)[:num_samples]

    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg, 61)
    best = (lg.log_px(x) - diagonal_gap(lg)).mean().item()
    for are_reused in (False, True):
        if are_reused:
            monkeypatch.setattr(Target, "normal", again)
        found = inference_gaps(lg.model, lg.perturbed_guide(), x, num_steps=400, log_px=lg.log_px(x))
        too_good = found.mean["best_elbo"] - best > 4.5 * found.mc_standard_error["best_elbo"]
        assert too_good == are_reused


# ---------------------------------------------------------------------------------------------------------------
# Sharper, and for other families and guides.


def test_the_approximation_gap_to_a_thousandth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaps, "ROWS", 2**14)  # a small model runs faster on many rows
    lg = pairs.linear_gaussian(noise=1.5)
    x = pairs.simulated(lg, 251)
    found = inference_gaps(lg.model, lg.perturbed_guide(), x, num_steps=400, num_samples=8000, log_px=lg.log_px(x))
    assert found.mc_standard_error["approximation"] < 2.5e-4
    assert found.mean["approximation"] == pytest.approx(diagonal_gap(lg), abs=1e-3)
    spread = (found.approximation - diagonal_gap(lg)) / found.standard_error["approximation"]
    assert 0.85 < spread.std() < 1.15  # the error is honest, and there is no other difference between data


def test_a_family_that_holds_the_posterior_has_no_gap() -> None:
    lg = pairs.linear_gaussian(5, 11)
    x = pairs.simulated(lg, 5)  # D = B
    for family, most in ((FullCovarianceNormal(), 1e-3), (CouplingFlow(), 0.05 * diagonal_gap(lg))):
        found = inference_gaps(lg.model, lg.perturbed_guide(), x, family=family, num_steps=500, log_px=lg.log_px(x))
        assert found.approximation.abs().max() < most + 4.5 * found.standard_error["approximation"].max()
        assert found.standard_error["approximation"].max() < 0.01
        assert found.mean["approximation"] == pytest.approx(0, abs=most)


def test_a_wrong_linear_encoder(lg: LinearGaussian) -> None:
    x = pairs.simulated(lg, 13)
    scale = lg.precision.diagonal().rsqrt()

    def q(x: Tensor) -> dist.TorchDistribution:
        return dist.Normal(0.7 * lg.posterior(x).mean + 0.1, 1.3 * scale).to_event(1)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", q(x))

    wide = MultivariateNormal(q(x).mean, scale_tril=torch.diag_embed(q(x).stddev))
    kl = kl_divergence(wide, lg.posterior(x))
    found = inference_gaps(lg.model, guide, x, num_steps=400, log_px=lg.log_px(x))
    within_errors(found, "kl", kl)
    within_errors(found, "amortisation", kl - diagonal_gap(lg))


# This one refuses the lengths that random numbers are drawn for.
FORMS = [form for form in pairs.FORMS if form != "one_sample_at_a_time"]
# Of these the draws are others: data that are one block, and a plate that draws a subsample of its own.
OTHER_DRAWS = ("with_fixed_plate", "with_subsampled_plate")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_numbers(form: str, lg: LinearGaussian) -> None:
    x, guide = pairs.simulated(lg), lg.perturbed_guide()
    expected, found = (
        inference_gaps(*programs, x, num_steps=20, num_samples=200)
        for programs in ((lg.model, guide), pairs.FORMS[form](lg, guide.q))
    )
    for name in ("log_px", "elbo", "kl") if form in OTHER_DRAWS else gaps.NAMES:
        difference = getattr(found, name) - getattr(expected, name)
        error = found.standard_error[name].hypot(expected.standard_error[name]) if form in OTHER_DRAWS else 0.0
        assert (difference.abs() <= 4.5 * error + 1e-6).all()


def test_a_discrete_latent_is_summed_out() -> None:
    locs = torch.tensor([-1.5, 1.5]).double()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0).double(), 1.0))
            c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.3).double()))
            pyro.sample("x", dist.Normal(z + locs[c.long()], 0.7), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.3 * x, 0.9))
            pyro.sample("c", dist.Bernoulli(torch.full_like(x, 0.5)))

    x = torch.tensor([-2.0, 0.3, 1.1]).double()
    sd = sqrt(1 + 0.7**2)
    exact = torch.logaddexp(
        dist.Normal(locs[0], sd).log_prob(x) + torch.tensor(0.7).log(),
        dist.Normal(locs[1], sd).log_prob(x) + torch.tensor(0.3).log(),
    )
    found = inference_gaps(model, guide, x, num_steps=300, num_samples=3000)
    within_errors(found, "log_px", exact)
    own = importance_sampling(model, guide, x, num_samples=3000).elbo
    assert (found.elbo > own + 0.05).all()
    assert (found.best_elbo < exact + 4.5 * found.standard_error["best_elbo"]).all()


# ---------------------------------------------------------------------------------------------------------------
# log p(x) from elsewhere, and what is said.


def test_log_px_from_elsewhere(lg: LinearGaussian) -> None:
    x, guide = pairs.simulated(lg), lg.perturbed_guide()

    def of(log_px: Any) -> Gaps:
        return inference_gaps(lg.model, guide, x, num_steps=10, num_samples=100, log_px=log_px)

    sampled = importance_sampling(lg.model, guide, x, num_samples=100)
    found = of(sampled)
    assert found.is_bound
    assert torch.equal(found.log_px, sampled.log_px)
    assert torch.equal(found.standard_error["log_px"], sampled.standard_error)
    exact = of(SimpleNamespace(log_px=lg.log_px(x), error=torch.full((11,), 3e-4)))
    assert not exact.is_bound
    assert (exact.standard_error["kl"] > exact.standard_error["elbo"]).all()
    tensor = of(lg.log_px(x).float())
    assert not tensor.is_bound
    assert tensor.log_px.dtype == torch.float64
    assert (tensor.standard_error["log_px"] == 0).all()
    estimated = of(None)
    assert estimated.is_bound
    within_errors(estimated, "log_px", lg.log_px(x))
    for name in ("elbo", "best_elbo"):  # the same draws, wherever log p(x) comes from
        assert torch.equal(getattr(estimated, name), getattr(found, name))


def test_refusals(lg: LinearGaussian) -> None:
    x, guide = pairs.simulated(lg), lg.perturbed_guide()
    pair, vae = coin.BetaBernoulli(), VAE((3,), 2)
    with pytest.raises(ValueError, match=r"one value for each of the 11 data; got the shape \(3,\)"):
        inference_gaps(lg.model, guide, x, log_px=lg.log_px(x)[:3])
    with pytest.raises(TypeError, match="got float"):
        inference_gaps(lg.model, guide, x, log_px=-3.0)
    with pytest.raises(ValueError, match="num_samples must be at least 2"):
        inference_gaps(lg.model, guide, x, num_samples=1)
    with pytest.raises(ValueError, match="num_steps must be at least 2"):
        inference_gaps(lg.model, guide, x, num_steps=0)
    with pytest.raises(ValueError, match="the latents of this pair have 1"):
        inference_gaps(pair.model, pair.guide, torch.ones(3, 2), family=CouplingFlow())
    with pytest.raises(ValueError, match="A Bernoulli likelihood scores data"):
        inference_gaps(vae.model, vae.guide, torch.full((67, 3), 0.5))


def test_seeds_and_that_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gaps, "TEMPERATURES", 7)
    vae = VAE((5,), 3)
    x = (torch.arange(35).reshape(7, 5) % 3 > 0).float()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    state = torch.get_rng_state()
    one, same, other = (inference_gaps(vae.model, vae.guide, x, num_steps=10, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    for name in gaps.NAMES:
        assert torch.equal(getattr(one, name), getattr(same, name))
        assert (getattr(one, name) != getattr(other, name)).all()
        assert getattr(one, name).dtype == torch.float64
        assert getattr(one, name).shape == one.standard_error[name].shape == (7,)
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in vae.parameters())
    assert vae.training


def test_what_was_not_found_is_said(lg: LinearGaussian, capsys: pytest.CaptureFixture[str]) -> None:
    x = pairs.simulated(lg)
    far = lg.perturbed_guide(shift=3.0, spread=0.5)
    found = inference_gaps(lg.model, far, x, num_steps=20, log_px=lg.log_px(x))
    assert not found.converged.any()
    assert "The best q of 11 of 11 data was not found" in str(found)
    good = inference_gaps(lg.model, lg.perturbed_guide(), x, num_steps=400, log_px=lg.log_px(x))
    good.summary()
    printed = capsys.readouterr().out
    assert "!" not in printed
    assert f"{good.mean['amortisation']:.4f}" in printed
    assert "Inference gaps: 11 data, 1000 samples each" in printed
    wrong = inference_gaps(lg.model, lg.perturbed_guide(), x, num_steps=20, log_px=lg.log_px(x) - 5)
    assert "kl is negative" in str(wrong)
    assert "log p(x) is too low, or belongs to other data" in str(wrong)


def test_numbers_over_the_data() -> None:
    three = torch.tensor([1.0, 2.0, 6.0]).double()
    found = Gaps(
        log_px=three,
        elbo=torch.zeros(3).double(),
        best_elbo=torch.tensor([1.0, 1.0, torch.inf]).double(),
        standard_error={name: torch.tensor([0.1, 0.2, 0.4]).double() for name in gaps.NAMES},
        converged=torch.ones(3, dtype=torch.bool),
        is_bound=True,
        num_samples=7,
        family="any",
    )
    assert found.mean["kl"] == pytest.approx(3)
    assert found.mean_standard_error["kl"] == pytest.approx(sqrt((4 + 1 + 9) / 2) / sqrt(3))
    assert found.mc_standard_error["kl"] == pytest.approx(sqrt(0.01 + 0.04 + 0.16) / 3)
    assert "1 of 3 data have a log p(x) or an ELBO that is not finite" in str(found)
    assert "too low by about 0.04 nats" in str(found)
