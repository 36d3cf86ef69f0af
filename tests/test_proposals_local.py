"""The best q of a family for each datum: as good as it can be, found for each by itself, and a density anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from math import exp, log
from typing import Any

import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from ppl_vae import isolation
from ppl_vae.linear_gaussian import LinearGaussian
from ppl_vae.proposals.densities import Defensive, Guide, Proposal, Widened
from ppl_vae.proposals.families import CouplingFlow, DiagonalNormal, Family, FullCovarianceNormal
from ppl_vae.proposals.local import JUDGED_SAMPLES, Local, LocalDensity, Member
from ppl_vae.scoring import Pair, Target
from ppl_vae.vae import VAE

FAMILIES: tuple[Family, ...] = (DiagonalNormal(), FullCovarianceNormal(), CouplingFlow(num_layers=3, hidden_dim=13))


def any_parameters(family: Family, batch: int, dim: int) -> dict[str, Tensor]:
    start = family.start(batch, dim, torch.device("cpu"))
    return {name: p + 0.7 * torch.randn_like(p) for name, p in start.items()}


@contextmanager
def evaluating(model: Any, guide: Any, *args: Any, seed: int = 0, width: int = 67) -> Iterator[Target]:
    with isolation.evaluation(model, guide, seed=seed):
        yield Target(Pair(model, guide, *args), *args, width=width)


def fitted(proposal: Local, model: Any, guide: Any, *args: Any, seed: int = 0) -> LocalDensity:
    with evaluating(model, guide, *args, seed=seed) as target:
        torch.manual_seed(seed)
        return proposal.fitted(target, 1)


def as_normal(q: Member) -> MultivariateNormal:
    """The normal in u that a density of one of the two families of normals is."""
    p = q.parameters
    lower = p.get("lower", torch.zeros(*p["loc"].shape, p["loc"].shape[-1]).double()).tril(-1)
    scale = (q.scale * p["log_scale"].exp()).unsqueeze(-1)
    return MultivariateNormal(q.loc + q.scale * p["loc"], scale_tril=scale * (torch.eye(lower.shape[-1]) + lower))


def diagonal_gap(lg: LinearGaussian) -> Tensor:
    """½ (Σ log Λ_ii − log|Λ|): the approximation gap of the best diagonal normal, for every x."""
    return 0.5 * (lg.precision.diagonal().log().sum() - lg.precision.logdet())


@cache
def problem(latent_dim: int, data_dim: int, num_data: int) -> tuple[LinearGaussian, Tensor]:
    lg = pairs.linear_gaussian(latent_dim, data_dim)
    return lg, pairs.simulated(lg, num_data)


# ---------------------------------------------------------------------------------------------------------------
# Families. Statements that hold for the right family and for none of the wrong ones below.


def the_density_is_that_of_the_draws(family: Family) -> None:
    for batch, dim in ((5, 3), (3, 3), (2, 7)):
        parameters = any_parameters(family, batch, dim)
        noise = torch.randn(11, batch, dim).double()
        v, log_q = family.draw(parameters, noise)
        torch.testing.assert_close(family.log_prob(parameters, v), log_q, rtol=0, atol=1e-8)
        torch.testing.assert_close(family.inverse(parameters, v)[0], noise, rtol=0, atol=1e-8)


def the_density_integrates_to_one(family: Family) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        parameters = any_parameters(family, 3, 2)
        wide = Normal(torch.zeros(2).double(), 8.0)
        v = wide.sample((100_003, 3))
        weights = (family.log_prob(parameters, v) - wide.log_prob(v).sum(-1)).exp()
        assert ((weights.mean(0) - 1).abs() < 4.5 * weights.std(0) / len(v) ** 0.5).all()


@pytest.mark.parametrize("family", FAMILIES, ids=str)
@pytest.mark.parametrize("statement", [the_density_is_that_of_the_draws, the_density_integrates_to_one])
def test_family(statement: Callable[[Family], None], family: Family) -> None:
    statement(family)


class NoJacobian(DiagonalNormal):
    def forward(self, parameters: dict[str, Tensor], noise: Tensor) -> tuple[Tensor, Tensor]:
        v, log_det = super().forward(parameters, noise)
        return v, 0 * log_det

    def inverse(self, parameters: dict[str, Tensor], v: Tensor) -> tuple[Tensor, Tensor]:
        noise, log_det = super().inverse(parameters, v)
        return noise, 0 * log_det


class WrongSign(CouplingFlow):
    def forward(self, parameters: dict[str, Tensor], noise: Tensor) -> tuple[Tensor, Tensor]:
        v, log_det = super().forward(parameters, noise)
        return v, -log_det

    def inverse(self, parameters: dict[str, Tensor], v: Tensor) -> tuple[Tensor, Tensor]:
        noise, log_det = super().inverse(parameters, v)
        return noise, -log_det


class WrongSignOfTheInverse(CouplingFlow):
    def inverse(self, parameters: dict[str, Tensor], v: Tensor) -> tuple[Tensor, Tensor]:
        noise, log_det = super().inverse(parameters, v)
        return noise, -log_det


class Transposed(FullCovarianceNormal):
    """Not the inverse of how it draws."""

    def inverse(self, parameters: dict[str, Tensor], v: Tensor) -> tuple[Tensor, Tensor]:
        return super().inverse(parameters | {"lower": parameters["lower"].mT.contiguous()}, v)


@pytest.mark.parametrize(
    ("mutant", "statement"),
    [
        (NoJacobian(), the_density_integrates_to_one),
        (WrongSign(3, 13), the_density_integrates_to_one),
        (WrongSignOfTheInverse(3, 13), the_density_is_that_of_the_draws),
        (Transposed(), the_density_is_that_of_the_draws),
    ],
    ids=lambda m: type(m).__name__,
)
def test_a_wrong_family_is_caught(mutant: Family, statement: Callable[[Family], None]) -> None:
    with pytest.raises(AssertionError):
        statement(mutant)


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_families_start_at_the_identity_and_keep_data_apart(family: Family) -> None:
    noise = torch.randn(3, 5, 2).double()
    start = family.start(5, 2, torch.device("cpu"))
    torch.testing.assert_close(family.forward(start, noise)[0], noise, rtol=0, atol=0)
    parameters = {name: p.requires_grad_() for name, p in any_parameters(family, 5, 2).items()}
    v, log_q = family.draw(parameters, noise)
    for output in (v[:, 1].sum() + log_q[:, 1].sum(), family.log_prob(parameters, noise)[:, 1].sum()):
        for gradient in torch.autograd.grad(output, list(parameters.values()), retain_graph=True, allow_unused=True):
            if gradient is not None:
                assert gradient[1].abs().sum() > 0 or gradient.shape[-1] == gradient.shape[-2] == 2
                assert (gradient[[0, 2, 3, 4]] == 0).all()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="the latents of this pair have 1"):
        CouplingFlow().start(3, 1, torch.device("cpu"))
    with pytest.raises(ValueError, match="2 layers or more"):
        CouplingFlow(num_layers=1)
    for wrong in ({"num_steps": 1}, {"num_particles": 7}, {"num_particles": 0}):
        with pytest.raises(ValueError, match="num_steps must be at least 2"):
            Local(**wrong)
    for no_family, got in ((Local(), "Local"), (DiagonalNormal, "<class"), ("diagonal", "'diagonal'")):
        with pytest.raises(TypeError, match=rf"family is one of pv\.proposals\.DiagonalNormal\(\), .*; got {got}"):
            Local(no_family)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------
# The optimum. The KL of a normal to the posterior is exact here, and log p(x) − ELBO(q*) with it.


@pytest.mark.parametrize(("latent_dim", "data_dim", "num_data"), [(3, 7, 11), (5, 11, 5)])
def test_the_best_diagonal_normal(latent_dim: int, data_dim: int, num_data: int) -> None:
    lg, x = problem(latent_dim, data_dim, num_data)
    q = fitted(Local(), lg.model, lg.perturbed_guide(), x)
    gap = kl_divergence(as_normal(q), lg.posterior(x))
    torch.testing.assert_close(gap, diagonal_gap(lg).expand(num_data), rtol=0, atol=1e-3)
    assert q.converged.all()


@pytest.mark.parametrize(("latent_dim", "data_dim", "num_data"), [(3, 7, 11), (5, 11, 5)])
def test_the_best_normal_is_the_posterior(latent_dim: int, data_dim: int, num_data: int) -> None:
    lg, x = problem(latent_dim, data_dim, num_data)
    q = fitted(Local(FullCovarianceNormal(), num_steps=500), lg.model, lg.perturbed_guide(), x)
    assert kl_divergence(as_normal(q), lg.posterior(x)).max() < 1e-3
    assert q.converged.all()
    with evaluating(lg.model, lg.guide, x):
        u = q.draw(0, 7)
        log_prior, log_joint = q.target.log_parts(u)
        torch.testing.assert_close(log_joint - q.log_prob(u, log_prior), lg.log_px(x).expand(7, -1), rtol=0, atol=0.05)


def test_a_flow_comes_closer_than_a_diagonal_normal() -> None:
    lg, x = problem(5, 11, 7)
    q = fitted(Local(CouplingFlow(), num_steps=400), lg.model, lg.perturbed_guide(), x)
    with evaluating(lg.model, lg.guide, x):
        u = q.draw(0, 2003)
        log_prior, log_joint = q.target.log_parts(u)
        gap = lg.log_px(x) - (log_joint - q.log_prob(u, log_prior)).mean(0)
    assert (gap < 0.05 * diagonal_gap(lg)).all()


# ---------------------------------------------------------------------------------------------------------------
# Data do not touch each other.


def a_datum_alone_gets_what_it_gets_among_others() -> None:
    lg, x = problem(3, 7, 11)
    guide = lg.perturbed_guide()
    others = torch.cat([x[:1], 100 + 50 * x[1:]])
    for family in FAMILIES:
        local = Local(family, num_steps=60)
        among, alone, replaced = (fitted(local, lg.model, guide, data) for data in (x, x[:1], others))
        for name, value in among.parameters.items():
            torch.testing.assert_close(alone.parameters[name][0], value[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(replaced.parameters[name][0], value[0], rtol=0, atol=1e-5)
        assert abs(alone.gain[0] - among.gain[0]) < 1e-5


def test_a_datum_alone_gets_what_it_gets_among_others() -> None:
    a_datum_alone_gets_what_it_gets_among_others()


class ClipsTheNormOfAll(torch.optim.Adam):
    def step(self, closure: Any = None) -> Any:
        torch.nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 1.0)
        return super().step(closure)


class DividesTheRate(torch.optim.Adam):
    """The mean over the data in place of the sum, for an optimiser that feels the difference."""

    def step(self, closure: Any = None) -> Any:
        self.param_groups[0]["lr"] /= len(self.param_groups[0]["params"][0])
        return super().step(closure)


class StopsWhenAllAreDone(torch.optim.Adam):
    def step(self, closure: Any = None) -> Any:
        if max(p.grad.abs().max() for p in self.param_groups[0]["params"]) < 0.5:
            return None
        return super().step(closure)


@pytest.mark.parametrize("mutant", [ClipsTheNormOfAll, DividesTheRate, StopsWhenAllAreDone])
def test_coupling_is_caught(mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.optim, "Adam", mutant)
    with pytest.raises(AssertionError):
        a_datum_alone_gets_what_it_gets_among_others()


def test_a_datum_without_finite_values_stands_aside() -> None:
    lg, x = problem(3, 7, 11)
    bad = x.clone()
    bad[7, 0] = 1e3

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pairs.prior(lg))
            loc = pairs.conditional(lg, z).loc
            lost = (x[..., 0] > 900) & (z[..., 0].abs() > 2.5)
            pyro.sample("x", dist.Normal(loc.where(~lost[..., None], torch.nan), lg.noise).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc = lg.posterior(x).mean.where(x[:, :1] < 900, 0.0)
            pyro.sample("z", dist.Normal(loc, 0.5).to_event(1))

    with pyro.validation_enabled(False):
        clean, hurt = (fitted(Local(num_steps=100), model, guide, data) for data in (x, bad))
    others = torch.arange(11) != 7
    for name, value in clean.parameters.items():
        torch.testing.assert_close(hurt.parameters[name][others], value[others], rtol=0, atol=1e-9)
        assert (hurt.parameters[name][7] == 0).all()  # where it started: at the guide's moments
    assert clean.converged.all()
    assert hurt.converged.tolist() == others.tolist()
    torch.testing.assert_close(hurt.scale[7], torch.full((3,), 0.5).double(), rtol=0, atol=0.15)


# ---------------------------------------------------------------------------------------------------------------
# What is said of the run.


def test_a_run_that_was_too_short_says_so() -> None:
    lg, x = problem(3, 7, 11)
    far = lg.perturbed_guide(shift=2.0, spread=0.7)
    for family in FAMILIES:
        assert not fitted(Local(family, num_steps=20), lg.model, far, x).converged.any()
    for family in FAMILIES[:2]:  # a flow takes its time
        assert fitted(Local(family, num_steps=600), lg.model, far, x).converged.all()
    close = lg.perturbed_guide(shift=0.0, spread=1.0)  # there already
    assert fitted(Local(num_steps=20), lg.model, close, x).converged.all()


@pytest.mark.parametrize("num_steps", [11, 20])
def test_the_later_half_of_the_steps_is_averaged(num_steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes the noise of the single steps away."""
    iterates: list[dict[str, Tensor]] = []

    class Recorded(torch.optim.Adam):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            iterates.append(dict(enumerate(p.detach().clone() for p in self.param_groups[0]["params"])))

    monkeypatch.setattr(torch.optim, "Adam", Recorded)
    lg, x = problem(3, 7, 5)
    with evaluating(lg.model, lg.perturbed_guide(), x) as target:
        family = FullCovarianceNormal()
        ones, zeros = torch.ones(5, 3).double(), torch.zeros(5, 3).double()
        start = family.start(5, 3, target.device)
        found, finite = Local(family)._ascended(lambda p: Member(target, family, p, zeros, ones), start, num_steps)
    assert finite.all()
    assert len(iterates) == num_steps
    later = iterates[num_steps // 2 :]
    for number, value in enumerate(found.values()):
        torch.testing.assert_close(value, torch.stack([i[number] for i in later]).mean(0), rtol=0, atol=1e-12)
        assert (value != later[-1][number]).any()


def test_losses_and_gains_are_both_signs_of_a_run_that_was_too_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than 0.01 nats and three standard errors, up or down."""
    gain = torch.tensor([1.0, -1.0, 0.009, -0.009, 0.3, -0.3, 0.32, -0.32, torch.nan]).double()
    error = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.1, 0.1, 0.1, 0.1, 0.1]).double()
    monkeypatch.setattr(Local, "_gain", lambda self, last, before: (gain, error))
    lg, x = problem(3, 7, 11)
    q = fitted(Local(num_steps=4), lg.model, lg.perturbed_guide(), x[:9])
    assert q.converged.tolist() == [False, False, True, True, True, True, False, False, False]
    assert JUDGED_SAMPLES >= 512  # of which the error is a standard error


def test_gain_is_a_difference_of_elbos() -> None:
    """Against the exact one, within its own error, over many data with the same answer."""
    lg, x = problem(3, 7, 61)
    guide = lg.perturbed_guide(shift=0.3, spread=1.1)
    with evaluating(lg.model, guide, x) as target:
        start = DiagonalNormal().start(61, 3, target.device)
        best = Member(target, DiagonalNormal(), start, lg.posterior(x).mean, lg.precision.diagonal().rsqrt())
        worse = Member(target, DiagonalNormal(), start, guide.q(x).mean, guide.q(x).stddev)
        gain, error = Local()._gain(best, worse)
    z = (gain - (lg.log_px(x) - diagonal_gap(lg) - guide.elbo(x))) / error
    assert z.abs().max() < 4.5
    assert 0.7 < z.std() < 1.3


def test_nothing_but_q_is_touched() -> None:
    vae = VAE((5,), 3)
    state = torch.get_rng_state()
    x = (torch.arange(55).reshape(11, 5) % 3 > 0).float()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    one, same = (fitted(Local(num_steps=20), vae.model, vae.guide, x) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None and p.requires_grad for p in vae.parameters())
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert all(torch.equal(one.parameters[name], value) for name, value in same.parameters.items())
    assert not any(p.requires_grad for p in one.parameters.values())
    with evaluating(vae.model, vae.guide, x):
        u = one.draw(0, 7)
    assert u.dtype == torch.float32
    assert one.log_prob(u, u).dtype == torch.float64
    assert str(Local(CouplingFlow())) == "CouplingFlow(num_layers=4, hidden_dim=32), fitted to each datum"


# ---------------------------------------------------------------------------------------------------------------
# As a proposal.


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_its_density_has_a_slope_in_u(family: Family) -> None:
    lg, x = problem(3, 7, 2)
    q = fitted(Local(family, num_steps=20), lg.model, lg.perturbed_guide(), x)
    u = torch.randn(3, 2, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda u: q.log_prob(u, u), (u,))


def estimates_are_unbiased(proposal: Proposal) -> None:
    """E Ẑ = p(x), for a fit of any quality: 5 draws for each of many data whose guide is wrong."""
    lg, x = problem(3, 7, 1009)
    guide = lg.perturbed_guide(shift=1.0, spread=0.6)
    with evaluating(lg.model, guide, x, seed=3, width=1):
        target = Target(Pair(lg.model, guide, x), x)
        density = proposal.fitted(target, 5)
        u = density.draw(0, 5)
        log_prior, log_joint = target.log_parts(u)
        ratio = (log_joint - density.log_prob(u, log_prior) - lg.log_px(x)).exp().mean(0)
    assert abs(ratio.mean() - 1) < 4.5 * ratio.std() / len(x) ** 0.5


PROPOSALS = {str(p): p for p in (Local(num_steps=60), Local(FullCovarianceNormal(), num_steps=10))}
PROPOSALS |= {str(p): p for p in (Widened(p) for p in list(PROPOSALS.values()))}
PROPOSALS |= {str(p): p for p in (Defensive(p) for p in list(PROPOSALS.values())[-1:])}
PROPOSALS |= {"a flow": Local(CouplingFlow(num_layers=2, hidden_dim=5), num_steps=10)}


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_estimates_from_it_are_unbiased(proposal: str) -> None:
    estimates_are_unbiased(PROPOSALS[proposal])


@pytest.mark.parametrize(
    "family", [NoJacobian(), WrongSignOfTheInverse(num_layers=2, hidden_dim=5)], ids=lambda f: type(f).__name__
)
def test_estimates_from_a_wrong_density_are_caught(family: Family) -> None:
    with pytest.raises(AssertionError):
        estimates_are_unbiased(Local(family, num_steps=40))


def test_it_is_a_better_proposal_than_the_guide() -> None:
    lg, x = problem(3, 7, 11)
    guide = lg.perturbed_guide(shift=2.0, spread=0.5)
    error = {}
    with evaluating(lg.model, guide, x) as target:
        for proposal in (Guide(), Widened(Local(num_steps=300))):
            density = proposal.fitted(target, 1000)
            u = density.draw(0, 1000)
            log_prior, log_joint = target.log_parts(u)
            log_px = (log_joint - density.log_prob(u, log_prior)).logsumexp(0) - log(1000)
            error[type(proposal)] = (log_px - lg.log_px(x)).abs().max().item()
    assert error[Widened] < 0.2 < error[Guide]
    assert exp(error[Guide]) > 1.2
