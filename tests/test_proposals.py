"""Proposals: densities that integrate to 1 and say so at any point, so that every estimate from them is unbiased."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, log, sqrt
from typing import Any

import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from ppl_vae.evidence import annealed_importance_sampling, importance_sampling, sandwich
from ppl_vae.evidence.blocks import looked_at
from ppl_vae.proposals import Defensive, DiagonalNormal, Guide, Local, Prior, Proposal, StudentT, Widened, densities
from ppl_vae.scoring import Target

PROPOSALS: list[Proposal] = [
    Guide(),
    Prior(),
    Widened(),
    Widened(factor=2.5),
    StudentT(),
    StudentT(df=11.0),
    Defensive(),
    Defensive(Guide(), share=0.3),
    Defensive(StudentT(), share=0.05),
    Widened(Defensive()),
    Defensive(Widened(Defensive())),
]


def weights_average_to_px(proposal: Proposal, *, num_samples: int = 23) -> None:
    """E[p̂] = p(x), from a guide that is off by more than its own width."""
    lg = pairs.linear_gaussian(noise=1.5)
    x = pairs.simulated(lg, num_data=6007)
    found = importance_sampling(
        lg.model, lg.perturbed_guide(shift=0.7, spread=1.1), x, num_samples=num_samples, proposal=proposal
    )
    ratio = (found.log_px - lg.log_px(x)).exp()
    tolerance = 4.5 * ratio.std() / sqrt(len(x))
    assert abs(ratio.mean() - 1) < tolerance < 0.25


@pytest.mark.parametrize("proposal", PROPOSALS, ids=str)
def test_weights_average_to_px(proposal: Proposal) -> None:
    weights_average_to_px(proposal)


NESTED: list[tuple[Proposal, int]] = [
    (Defensive(Widened(Defensive(share=0.5)), share=0.5), 3),
    (Defensive(Defensive(Guide(), share=0.5), share=0.5), 3),
    (Defensive(Defensive(Defensive(Guide(), share=0.3), share=0.3), share=0.3), 5),
]


@pytest.mark.parametrize(("proposal", "num_samples"), NESTED, ids=str)
def test_mixtures_of_mixtures_average_to_px(proposal: Proposal, num_samples: int) -> None:
    """Of so few draws that one of the wrong part would tell."""
    weights_average_to_px(proposal, num_samples=num_samples)


def every_datum_has_draws_of_its_own(proposal: Proposal) -> None:
    """Two data that are the same, drawn for side by side: neither the draws nor their distances go together."""
    lg = pairs.linear_gaussian()
    x, num_samples = pairs.simulated(lg, num_data=1).expand(2, -1), 4001
    with looked_at(lg.model, lg.perturbed_guide(), x) as pair:
        torch.manual_seed(4)
        density = proposal.fitted(Target(pair, x), num_samples)
        u = density.draw(0, num_samples)
        if isinstance(density, densities._Defensive):
            u = u[~density.from_prior]  # which draws are the prior's is the same for all data
    assert (u[:, 0] != u[:, 1]).all()
    distance = ((u - u.mean(0)) / u.std(0)).square().sum(-1).log()
    for values in (u[..., 0], u[..., 2], distance):
        assert abs(torch.corrcoef(values.T)[0, 1]) < 4.5 / sqrt(len(u))


OWN = [*PROPOSALS[:8], Local(num_steps=4)]


@pytest.mark.parametrize("proposal", OWN, ids=str)
def test_every_datum_has_draws_of_its_own(proposal: Proposal) -> None:
    every_datum_has_draws_of_its_own(proposal)


def one_chi2_for_all(self: Any, start: int, stop: int) -> Tensor:
    normal = self.target.normal(stop - start)
    chi2 = dist.Chi2(torch.tensor(self.df).to(normal)).sample((stop - start, 1))
    return self.loc + self.scale * normal * (self.df / chi2).sqrt().unsqueeze(-1)


def one_draw_for_all(self: Any, start: int, stop: int) -> Tensor:
    return self.loc + self.scale * self.target.normal(stop - start)[:, :1]


@pytest.mark.parametrize("mutant", [one_chi2_for_all, one_draw_for_all])
def test_shared_draws_are_caught(mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(densities._StudentT, "draw", mutant)
    with pytest.raises(AssertionError):
        every_datum_has_draws_of_its_own(StudentT())


def test_the_guide_as_proposal_is_the_default() -> None:
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg)
    one = importance_sampling(lg.model, lg.perturbed_guide(), x)
    two = importance_sampling(lg.model, lg.perturbed_guide(), x, proposal=Guide())
    torch.testing.assert_close(one.log_px, two.log_px, rtol=0, atol=1e-9)
    assert one.method == "Importance sampling from the guide"


def test_the_price_of_widening_an_exact_guide() -> None:
    """ESS / K = ((2c − 1) / c²)^(D / 2), in closed form."""
    for latent_dim in (3, 13):
        lg = pairs.linear_gaussian(latent_dim=latent_dim, data_dim=17)
        x = pairs.simulated(lg, num_data=5)
        for factor in (None, 1.5, 2.0):
            c = 1 + 1 / sqrt(latent_dim) if factor is None else factor
            found = importance_sampling(lg.model, lg.guide, x, num_samples=20_000, proposal=Widened(factor=factor))
            price = ((2 * c - 1) / c**2) ** (latent_dim / 2)
            assert (found.ess / 20_000 - price).abs().max() < 0.05 * price + 0.01
            assert (found.pareto_k < 0.2).all()


def narrow(lg: Any) -> Any:
    """A guide far from the posterior and narrow: plain importance sampling loses nats without a word."""
    return lg.perturbed_guide(shift=2.0, spread=0.4)


@pytest.mark.parametrize("proposal", [Defensive(share=0.2), Defensive(StudentT(), share=0.2)], ids=str)
def test_better_than_a_narrow_guide(proposal: Proposal) -> None:
    lg = pairs.linear_gaussian(latent_dim=2, noise=1.5)
    x = pairs.simulated(lg, num_data=101)
    plain = importance_sampling(lg.model, narrow(lg), x, num_samples=3000)
    found = importance_sampling(lg.model, narrow(lg), x, num_samples=3000, proposal=proposal)
    assert (plain.log_px - lg.log_px(x)).mean() < -0.3
    assert (found.log_px - lg.log_px(x)).abs().mean() < 0.1
    assert found.pareto_k.mean() < plain.pareto_k.mean() - 0.3


def test_a_mixture_is_drawn_in_fixed_proportions() -> None:
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg)
    with looked_at(lg.model, lg.guide, x) as pair:
        target = Target(pair, x)
        for share, num_samples, count in ((0.1, 97, 10), (0.5, 7, 4), (0.001, 50, 1), (0.9, 2, 1), (0.5, 1, 0)):
            density = Defensive(Guide(), share=share).fitted(target, num_samples)
            assert int(density.from_prior.sum()) == count
            assert density.share == count / num_samples
            torch.manual_seed(1)
            assert density.draw(0, num_samples).shape == (num_samples, len(x), 3)
        density = Defensive(Guide(), share=0.2).fitted(target, 100)
        parts = [int(density.from_prior[k : k + 10].sum()) for k in range(0, 100, 10)]
        assert parts == [2] * 10
        torch.manual_seed(1)
        u = density.draw(0, 100)
        near = (u - lg.posterior(x).mean).square().sum(-1).mean(1).sqrt()
        assert near[density.from_prior].mean() > 2 * near[~density.from_prior].mean()


def test_weights_are_bounded_by_the_likelihood() -> None:
    """w ≤ p(x given z) / share for every draw, so at most sup p(x given z) / share."""
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg)
    with looked_at(lg.model, narrow(lg), x) as pair:
        target = Target(pair, x)
        density = Defensive(Guide(), share=0.25).fitted(target, 400)
        torch.manual_seed(2)
        u = density.draw(0, 400)
        log_prior, log_joint = target.log_parts(u)
        log_w = log_joint - density.log_prob(u, log_prior)
        assert (log_w <= log_joint - log_prior - log(0.25) + 1e-9).all()


def own_component(self: Any, u: Tensor, log_prior: Tensor) -> Tensor:
    base = self.base.log_prob(u, log_prior)
    return torch.where(self.from_prior[: len(u)].unsqueeze(1), log_prior + log(self.share), base + log(1 - self.share))


def unequal_shares_forgotten(self: Any, u: Tensor, log_prior: Tensor) -> Tensor:
    return torch.logaddexp(self.base.log_prob(u, log_prior), log_prior) - log(2)


def no_volume(self: Any, u: Tensor, log_prior: Tensor) -> Tensor:
    return self.base.log_prob(self.loc + (u - self.loc) / self.spread, log_prior)


def variance_for_deviation(self: Any, u: Tensor, log_prior: Tensor) -> Tensor:
    kept, self.scale = self.scale, self.scale**2
    try:
        return RIGHT_T(self, u, log_prior)
    finally:
        self.scale = kept


RIGHT_T = densities._StudentT.log_prob
MUTANTS: list[tuple[type, Callable[..., Tensor], Proposal]] = [
    (densities._Defensive, own_component, Defensive(Guide(), share=0.3)),
    (densities._Defensive, unequal_shares_forgotten, Defensive(Guide(), share=0.1)),
    (densities._Widened, no_volume, Widened(factor=2.5)),
    (densities._StudentT, variance_for_deviation, StudentT()),
]


@pytest.mark.parametrize(("owner", "mutant", "proposal"), MUTANTS)
def test_mutant_is_caught(owner: type, mutant: Any, proposal: Proposal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "log_prob", mutant)
    with pytest.raises(AssertionError):
        weights_average_to_px(proposal)


def test_draws_and_density_of_a_student_t_agree() -> None:
    """Its own moments, against those of the guide."""
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg, num_data=5)
    guide = lg.perturbed_guide()
    with looked_at(lg.model, guide, x) as pair:
        torch.manual_seed(3)
        density = StudentT(df=7.0).fitted(Target(pair, x), 1)
        u = density.draw(0, 40_000)
        mean, deviation = guide.q(x).mean, guide.q(x).base_dist.scale * sqrt(7 / 5)
    assert ((u.mean(0) - mean) / deviation).abs().max() < 0.3  # moments come from 256 draws of the guide
    assert (u.std(0) / deviation - 1).abs().max() < 0.25


@pytest.mark.parametrize("form", [*pairs.FORMS, "auto_normal"])
def test_every_form_gives_right_numbers(form: str) -> None:
    lg = pairs.linear_gaussian()
    x, guide = pairs.simulated(lg), lg.perturbed_guide()
    model, q = pairs.auto_normal(lg, guide, x) if form == "auto_normal" else pairs.FORMS[form](lg, guide.q)
    found = importance_sampling(model, q, x, num_samples=2000, proposal=Widened())
    assert ((found.log_px - lg.log_px(x)).abs() < 4.5 * found.standard_error).all()
    assert found.standard_error.max() < 0.3


def test_constrained_and_discrete_latents() -> None:
    """A Beta probability of one of two coins, which is summed out."""
    first, second = torch.tensor(2.0).double(), torch.tensor(5.0).double()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.3).double()))
            p = pyro.sample("p", dist.Beta(first, 2 + 3 * c))
            pyro.sample("x", dist.Binomial(10, p), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Bernoulli(torch.tensor(0.5).double()))
            pyro.sample("p", dist.Beta(1 + x, 11 - x))

    x = torch.arange(0, 11).double()
    marginal = [dist.BetaBinomial(first, b, total_count=10).log_prob(x) for b in (torch.tensor(2.0).double(), second)]
    exact = torch.stack([marginal[0] + log(0.7), marginal[1] + log(0.3)]).logsumexp(0)
    for proposal in (Guide(), Widened(), StudentT(), Defensive(), Prior()):
        found = importance_sampling(model, guide, x, num_samples=5000, proposal=proposal)
        assert ((found.log_px - exact).abs() < 4.5 * found.standard_error + 1e-12).all()
        assert found.standard_error.max() < 0.2


def test_numbers_do_not_depend_on_companions_or_on_how_the_work_is_cut() -> None:
    lg = pairs.linear_gaussian()
    x, guide = pairs.simulated(lg, num_data=29), lg.perturbed_guide()
    for proposal in PROPOSALS:
        whole = importance_sampling(lg.model, guide, x, num_samples=1500, proposal=proposal)
        alone = importance_sampling(lg.model, guide, x[:1], num_samples=1500, proposal=proposal)
        cut = importance_sampling(lg.model, guide, x, num_samples=1500, proposal=proposal, max_rows=211)
        torch.testing.assert_close(whole.log_px[:1], alone.log_px, rtol=0, atol=1e-9)
        torch.testing.assert_close(whole.log_px, cut.log_px, rtol=0, atol=1e-9)


def test_an_infinite_weight_names_the_site() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(torch.where(z > 1.5, torch.nan, z).sum(-1), 1.0, validate_args=False), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    with pytest.raises(ValueError, match=r"A weight of datum \d+ is NaN or \+∞: site 'x' of the model"):
        importance_sampling(model, guide, torch.zeros(300), num_samples=100, proposal=Widened())


def test_what_is_refused() -> None:
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="factor multiplies a variance and must be above 0"):
            Widened(factor=bad)
    with pytest.raises(ValueError, match="df must be above 2"):
        StudentT(df=2.0)
    for bad in (0.0, 1.0, inf):
        with pytest.raises(ValueError, match="share is the part of the draws that the prior gives"):
            Defensive(share=bad)


NO_PROPOSALS: list[tuple[Any, str]] = [
    ("defensive", r"got 'defensive'\."),
    (Defensive, r"got the class Defensive, without parentheses\."),
    (dist.Normal(0.0, 1.0), r"got Normal\(loc: 0\.0, scale: 1\.0\)\."),
    (2.0, r"got 2\.0\."),
    (DiagonalNormal(), r"got DiagonalNormal\(\)\."),
]


@pytest.mark.parametrize(("wrong", "got"), NO_PROPOSALS, ids=str)
def test_what_is_no_proposal(wrong: Any, got: str) -> None:
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg, num_data=3)
    takers: list[Callable[[], object]] = [
        lambda: importance_sampling(lg.model, lg.guide, x, proposal=wrong),
        lambda: annealed_importance_sampling(lg.model, lg.guide, x, proposal=wrong),
        lambda: sandwich(lg.model, lg.guide, proposal=wrong),
        lambda: Widened(wrong),
        lambda: Defensive(wrong),
    ]
    for taker in takers:
        with pytest.raises(TypeError, match=r"A proposal is one of pv\.proposals, such as Guide\(\) .*; " + got):
            taker()


# ---------------------------------------------------------------------------------------------------------------
# The jackknife and the Pareto-smoothed value.


def test_the_jackknife_takes_the_bias_away() -> None:
    """And, being no bound, may lie above: its bias is under a third of the plain one's."""
    lg = pairs.linear_gaussian(noise=1.5)
    x = pairs.simulated(lg, num_data=20_011)
    found = importance_sampling(lg.model, lg.perturbed_guide(shift=0.5, spread=1.1), x, num_samples=29)
    kept = found.jackknife.isfinite()
    assert kept.double().mean() > 0.99
    plain, jackknife = ((v - lg.log_px(x))[kept] for v in (found.log_px, found.jackknife))
    assert plain.mean() < -4.5 * plain.std() / sqrt(len(plain))
    assert abs(jackknife.mean()) < abs(plain.mean()) / 3
    exact = importance_sampling(lg.model, lg.guide, x[:7], num_samples=29)
    assert (exact.jackknife - exact.log_px).abs().max() < 1e-9
    assert (exact.pareto_smoothed - exact.log_px).abs().max() < 1e-9


def test_smoothing_steadies_a_heavy_tail() -> None:
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg, num_data=1).expand(307, -1)
    found = importance_sampling(lg.model, lg.perturbed_guide(shift=0.8, spread=0.75), x, num_samples=500)
    assert found.pareto_k.median() > 0.5
    assert found.pareto_smoothed.std() < found.log_px.std()
    assert abs(found.pareto_smoothed.mean() - found.log_px.mean()) < 0.2
