"""Exact references: equal to closed forms where there are any, and refusing or flagging what they cannot do."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, log, sqrt
from typing import Any

import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from torch import Tensor

from ppl_vae import coin
from ppl_vae.evidence import discrete, grid, lattice
from ppl_vae.evidence.discrete import enumeration
from ppl_vae.evidence.exact import Exact
from ppl_vae.evidence.grid import grid_integration
from ppl_vae.linear_gaussian import LinearGaussian
from ppl_vae.scoring import Pair, Target
from ppl_vae.scoring.coordinates import Coordinates
from ppl_vae.vae import VAE


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> bool:
    return bool((found - expected).abs().max() < tolerance)


# ---------------------------------------------------------------------------------------------------------------
# Statements that hold for the right sums and for none of the wrong ones below.


def the_linear_gaussian_is_exact() -> None:
    for latent_dim in (1, 2):
        lg = pairs.linear_gaussian(latent_dim)
        x, guide = pairs.simulated(lg, num_data=5), lg.perturbed_guide(shift=0.7, spread=1.4)
        found = grid_integration(lg.model, guide, x)
        assert found.accepted.all()
        assert close(found.log_px, lg.log_px(x))
        assert close(found.elbo, guide.elbo(x))
        assert close(found.kl, lg.log_px(x) - guide.elbo(x))


def a_constrained_latent_is_exact() -> None:
    """A Beta posterior's tails fall like e^(−a|u|) in unconstrained coordinates, far beyond the prior's box."""
    pair = coin.BetaBernoulli(1.0, 3.0)
    tosses = torch.cat([torch.eye(7)[:3], torch.zeros(1, 7), torch.ones(1, 7)]).double()
    found = grid_integration(pair.model, pair.guide, tosses)
    assert found.accepted.all()
    assert close(found.log_px, pair.log_px(tosses))
    assert close(found.elbo, pair.log_px(tosses))


def distance_pair(noise: float) -> tuple[Any, Any]:
    """x is |z| with noise, so that the posterior has a mode on either side; the guide sees the one on the right."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("x", dist.Normal(z.abs(), noise), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, noise))

    return model, guide


def distance_log_px(x: Tensor, noise: float) -> Tensor:
    """log 2 ∫_0^∞ N(z; 0, 1) N(x; z, noise²) dz."""
    variance = 1 + noise**2
    positive = dist.Normal(0.0, noise / sqrt(variance)).cdf(x / variance)
    return log(2) + dist.Normal(0.0, sqrt(variance)).log_prob(x) + positive.log()


def a_sharp_mode_is_found_by_its_slope() -> None:
    """Fifty times narrower than the spacing of the first grid, and unknown to the guide."""
    x = torch.tensor([0.5, 1.1, 2.3]).double()
    found = grid_integration(*distance_pair(5e-4), x)
    assert found.accepted.all()
    assert close(found.log_px, distance_log_px(x, 5e-4))
    lg = pairs.linear_gaussian(2, noise=0.03)
    x = pairs.simulated(lg, num_data=3)
    found = grid_integration(lg.model, pairs.as_functions(lg, lambda _: pairs.prior(lg))[1], x)
    assert found.accepted.all()
    assert close(found.log_px, lg.log_px(x))


def draws_are_those_of_the_posterior() -> None:
    lg = pairs.linear_gaussian(2)
    x, num_draws = pairs.simulated(lg, num_data=3), 40_009
    # A grid about as coarse as is accepted: what lies between its points must be right too.
    found = grid_integration(lg.model, lg.perturbed_guide(), x, num_points=20, num_draws=num_draws)
    assert found.accepted.all()
    z = found.draws["z"]
    assert z.shape == (num_draws, 3, 2)
    white = (z - lg.posterior(x).mean) @ torch.linalg.cholesky(lg.precision)
    assert (white.mean(0).abs() < 4.5 / sqrt(num_draws)).all()
    products = white[..., :, None] * white[..., None, :]
    spread = torch.tensor([[2.0, 1.0], [1.0, 2.0]]).sqrt() / sqrt(num_draws)
    assert ((products.mean(0) - torch.eye(2)).abs() < 4.5 * spread).all()
    assert abs(white[1:].flatten().double() @ white[:-1].flatten().double()) < 4.5 * sqrt(white.numel())


def every_value_is_counted_once() -> None:
    """Sites of four kinds, some given another, against sums written out by hand."""
    x = torch.linspace(-2, 3, 5).double()
    found = enumeration(kinds_model, kinds_guide, x)
    log_joint, log_q = kinds_by_hand(x)
    assert found.accepted.all()
    assert (found.error == 0).all()
    assert close(found.log_px, log_joint.logsumexp(0), 1e-9)
    assert close(found.elbo, (log_q.exp() * (log_joint - log_q)).sum(0), 1e-9)


KINDS_PRIOR = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
KINDS_ON = torch.tensor([0.3, 0.8], dtype=torch.float64)
KINDS_HOT = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25], dtype=torch.float64)
KINDS_PLATE = torch.tensor([0.35, 0.6, 0.45], dtype=torch.float64)
ON_MOVES = torch.tensor([1.0, -0.7], dtype=torch.float64)
PART_MOVES = torch.tensor([0.2, -0.4, 0.9], dtype=torch.float64)


def kinds_model(x: Tensor) -> None:
    """A Categorical, two Bernoullis of one site that depend on it, a OneHotCategorical, three parts in a plate."""
    with pyro.plate("data", len(x), dim=-2):
        c = pyro.sample("c", dist.Categorical(KINDS_PRIOR))
        on = pyro.sample("on", dist.Bernoulli(KINDS_ON + 0.05 * c.double().unsqueeze(-1)).to_event(1))
        hot = pyro.sample("hot", dist.OneHotCategorical(KINDS_HOT))
        with pyro.plate("parts", 3, dim=-1):
            part = pyro.sample("part", dist.Bernoulli(KINDS_PLATE))
        loc = 0.5 * c + on @ ON_MOVES + hot @ torch.arange(5.0).double() / 3
        loc = loc + (part * PART_MOVES).sum(-1, keepdim=True)
        pyro.sample("x", dist.Normal(loc, 0.8), obs=x[:, None])


def kinds_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-2):
        pyro.sample("c", dist.Categorical(logits=x[:, None, None] * torch.arange(3.0).double()))
        pyro.sample("on", dist.Bernoulli(torch.full((2,), 0.4).double()).to_event(1))
        pyro.sample("hot", dist.OneHotCategorical(torch.ones(5).double() / 5))
        with pyro.plate("parts", 3, dim=-1):
            pyro.sample("part", dist.Bernoulli(torch.sigmoid(x[:, None]) * torch.ones(3).double()))


def kinds_by_hand(x: Tensor) -> tuple[Tensor, Tensor]:
    """log p(x, z) and log q(z given x), `(480, 5)`, value by value."""
    log_joint, log_q = [], []
    bits = [torch.tensor([float(b) for b in f"{n:05b}"]).double() for n in range(32)]
    for c in range(3):
        for five in bits:
            on, part = five[:2], five[2:]
            for hot in range(5):
                loc = 0.5 * c + on @ ON_MOVES + hot / 3 + part @ PART_MOVES
                p = KINDS_PRIOR[c].log() + KINDS_HOT[hot].log() + dist.Normal(loc, 0.8).log_prob(x)
                p = p + dist.Bernoulli(KINDS_ON + 0.05 * c).log_prob(on).sum()
                log_joint.append(p + dist.Bernoulli(KINDS_PLATE).log_prob(part).sum())
                q = torch.log_softmax(x[:, None] * torch.arange(3.0).double(), -1)[:, c] - log(5)
                q = q + dist.Bernoulli(torch.tensor(0.4).double()).log_prob(on).sum()
                log_q.append(q + dist.Bernoulli(torch.sigmoid(x[:, None])).log_prob(part).sum(-1))
    return torch.stack(log_joint), torch.stack(log_q)


STATEMENTS: list[Callable[[], None]] = [
    the_linear_gaussian_is_exact,
    a_constrained_latent_is_exact,
    a_sharp_mode_is_found_by_its_slope,
    draws_are_those_of_the_posterior,
    every_value_is_counted_once,
]


@pytest.mark.parametrize("statement", STATEMENTS, ids=lambda s: s.__name__)
def test_statement(statement: Callable[[], None]) -> None:
    statement()


def forgets_the_jacobian(patch: pytest.MonkeyPatch) -> None:
    right = Coordinates.restore
    patch.setattr(Coordinates, "restore", lambda self, u: ((found := right(self, u))[0], torch.zeros_like(found[1])))


def forgets_the_spacing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lattice.Lattice, "log_integral", lambda self: float(self.log_density.logsumexp(0)))


def forgets_the_prior(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: Target, u: Tensor) -> Tensor:
        log_prior, log_joint = self.log_parts(u)
        return log_joint - log_prior

    patch.setattr(Target, "log_joint", wrong)


def cuts_too_close(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lattice, "NATS", 2.0)


def keeps_the_first_box(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lattice, "MOST_WIDENINGS", 1)
    patch.setattr(lattice, "EDGE_MASS", 1.0)


def takes_points_for_the_mass_around_them(patch: pytest.MonkeyPatch) -> None:
    """Prunes by the values at the points alone, from the first grid on."""
    patch.setattr(lattice.Lattice, "at", lambda self, index: torch.full(index.shape[:-1], -inf).double())


def never_rejects(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lattice, "REJECTION_RATIO", 1e-9)


def forgets_a_value(patch: pytest.MonkeyPatch) -> None:
    right = discrete._scored
    patch.setattr(discrete, "_scored", lambda *args: tuple(column[:-1] for column in right(*args)))


def averages_over_values(patch: pytest.MonkeyPatch) -> None:
    right = discrete._scored
    patch.setattr(discrete, "_scored", lambda *args: (right(*args)[0] - log(480), right(*args)[1]))


def forgets_the_discrete_prior(patch: pytest.MonkeyPatch) -> None:
    def wrong(self: Pair, z: Any, *args: Any, num_samples: int) -> Tensor:
        return self.scores(z, *args, num_samples=num_samples).observed

    patch.setattr(Pair, "log_joint", wrong)


MUTANTS = {
    forgets_the_jacobian: a_constrained_latent_is_exact,
    forgets_the_spacing: the_linear_gaussian_is_exact,
    forgets_the_prior: the_linear_gaussian_is_exact,
    cuts_too_close: the_linear_gaussian_is_exact,
    keeps_the_first_box: a_constrained_latent_is_exact,
    takes_points_for_the_mass_around_them: a_sharp_mode_is_found_by_its_slope,
    never_rejects: draws_are_those_of_the_posterior,
    forgets_a_value: every_value_is_counted_once,
    averages_over_values: every_value_is_counted_once,
    forgets_the_discrete_prior: every_value_is_counted_once,
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.__name__)
def test_a_wrong_sum_is_caught(mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        MUTANTS[mutant]()


# ---------------------------------------------------------------------------------------------------------------
# What a lattice says of itself, on densities written down point by point.


def lattice_of(log_density: Tensor, *others: Tensor, spacing: float = 1.0) -> lattice.Lattice:
    """In one dimension, with no mass at its sides."""
    values = torch.stack([torch.nn.functional.pad(v.double(), (4, 4), value=-inf) for v in (log_density, *others)])
    size = values.shape[1] - 1
    index = torch.arange(size + 1)[:, None]
    return lattice.Lattice(torch.zeros(1).double(), torch.tensor([spacing]).double(), size, index, values)


def test_the_error_is_that_of_the_worst_shift() -> None:
    """One in four of the wide lattices is right by accident; the worst sums to half as much again."""
    found = lattice_of(torch.tensor([0.25, 0.375, 0.125, 0.25]).log())
    assert found.error(4) == pytest.approx(log(2))
    assert found.error(2) == pytest.approx(-log(0.75))


def test_two_halvings_must_agree() -> None:
    """Every second point gives the same sum, every fourth does not: the spacing is not yet small, by accident it seems.

    For a smooth density the error of every fourth is the fourth root of that of every second.
    """
    accident = lattice_of(torch.tensor([3.0, 2.0, 1.0, 2.0]).double().log())
    assert accident.error() < 1e-12
    assert accident.error(4) == pytest.approx(log(2))
    assert not accident.is_resolved(1e-3)
    axis = torch.arange(-40.0, 41.0).double()
    smooth = lattice_of(dist.Normal(0.0, 2.0).log_prob(axis))
    assert smooth.is_resolved(1e-3)
    assert smooth.error(4) == pytest.approx(2 * torch.tensor(-2 * torch.pi**2 * 4 / 16).exp().item(), rel=0.01)
    on_the_edge = lattice_of(dist.Normal(0.0, 2.0).log_prob(axis))
    on_the_edge.size = on_the_edge.size // 2
    assert not on_the_edge.is_resolved(1e-3)


def test_an_elbo_that_has_not_settled_is_not_resolved() -> None:
    """q sums to 1 on lattices of any shift, and log p − log q is another at every second point."""
    axis = 0.25 * torch.arange(-40.0, 41.0).double()
    log_q = dist.Normal(0.0, 1.0).log_prob(axis)
    steps = torch.arange(81) % 2
    for log_p, is_resolved in (
        (log_q - 3, True),
        (log_q - 0.5 * axis**2, True),
        (log_q + 2e-4 * steps, True),
        (log_q + 2 * steps, False),
        (torch.full_like(log_q, -inf), True),  # the ELBO is −∞, and was on wider lattices
    ):
        q = lattice_of(log_q, log_p, spacing=0.25)
        assert q.is_resolved(1e-3)
        assert grid._resolves_guide(q, 1e-3) == is_resolved
    assert not grid._resolves_guide(lattice_of(log_q + 0.01, log_q, spacing=0.25), 1e-3)


def run(routine: lattice.Routine[Any], log_density: Callable[[Tensor], Tensor]) -> Any:
    points = next(routine)
    while True:
        try:
            points = routine.send(log_density(points)[None])
        except StopIteration as stop:
            return stop.value


def adapted(log_density: Callable[[Tensor], Tensor], pin: float, done: Callable[[lattice.Lattice], bool]) -> Any:
    low, high, pins = (torch.tensor(v).double() for v in ([-6.0], [6.0], [[pin]]))
    return run(lattice.adapted(low, high, pins, num_points=64, max_levels=14, done=done), log_density)


def test_the_spacing_is_halved_at_least_once() -> None:
    found = adapted(lambda u: dist.Normal(0.0, 1.0).log_prob(u[:, 0]), 0.0, lambda _: True)
    assert found.size == 2 * 64
    assert found.log_integral() == pytest.approx(0, abs=1e-6)


def within(noise: float) -> tuple[Any, Any]:
    """The posterior is the prior but for half of its mass, which is at 0.371 and known to the guide."""

    def mixture() -> Any:
        parts = dist.Normal(torch.tensor([0.0, 0.371]).double(), torch.tensor([1.0, noise]).double())
        return dist.MixtureSameFamily(dist.Categorical(torch.ones(2).double()), parts)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.factor("sharper", mixture().log_prob(z) - dist.Normal(0.0, 1.0).log_prob(z))
            pyro.sample("x", dist.Normal(0 * z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", mixture())

    return model, guide


@pytest.mark.parametrize("noise", [3e-3, 1e-4])
def test_a_sharp_mode_that_the_guide_knows_is_not_missed(noise: float) -> None:
    x = torch.tensor([0.5, 1.0]).double()
    found = grid_integration(*within(noise), x)
    exact = dist.Normal(0.0, 1.0).log_prob(x)
    assert (found.elbo <= found.log_px + 1e-3).all()
    assert ((found.log_px - exact).abs() < 1e-3)[found.accepted].all()


# ---------------------------------------------------------------------------------------------------------------
# On grids: any form, any posterior.


@pytest.mark.parametrize("form", [form for form in pairs.FORMS if form != "one_sample_at_a_time"])
def test_every_form_gives_the_same_numbers(form: str) -> None:
    lg = pairs.linear_gaussian(2)
    x, guide = pairs.simulated(lg), lg.perturbed_guide()
    found = grid_integration(*pairs.FORMS[form](lg, guide.q), x)
    assert found.accepted.all()
    assert close(found.log_px, lg.log_px(x))
    assert close(found.elbo, guide.elbo(x))


def test_an_autoguide_is_integrated_over_all_data_at_once() -> None:
    lg = pairs.linear_gaussian(2)
    x, guide = pairs.simulated(lg), lg.perturbed_guide()
    found = grid_integration(*pairs.auto_normal(lg, guide, x), x, num_draws=3)
    assert close(found.log_px, lg.log_px(x))
    assert close(found.elbo, guide.elbo(x), 1e-4)  # its parameters are float32
    assert found.draws["z"].shape == (3, 11, 2)


def test_a_datum_alone_is_what_it_is_among_others() -> None:
    lg = pairs.linear_gaussian(2)
    x = pairs.simulated(lg)
    whole = grid_integration(lg.model, lg.perturbed_guide(), x, num_draws=5)
    for datum in (0, 7):
        alone = grid_integration(lg.model, lg.perturbed_guide(), x[datum : datum + 1], num_draws=5)
        for name in ("log_px", "error", "elbo"):
            assert torch.equal(getattr(alone, name), getattr(whole, name)[datum : datum + 1])
        assert torch.equal(alone.draws["z"][:, 0], whole.draws["z"][:, datum]) == (datum == 0)


def test_seeds_are_of_the_draws_alone() -> None:
    lg = pairs.linear_gaussian(1)
    x = pairs.simulated(lg, num_data=3)
    one, same, other = (grid_integration(lg.model, lg.guide, x, num_draws=7, seed=seed) for seed in (1, 1, -2))
    assert torch.equal(one.log_px, other.log_px)
    assert torch.equal(one.draws["z"], same.draws["z"])
    assert (one.draws["z"] != other.draws["z"]).all()


def test_a_mode_that_the_guide_does_not_see() -> None:
    x, num_draws = torch.tensor([0.5, 1.1, 2.3]).double(), 2003
    found = grid_integration(*distance_pair(0.1), x, num_draws=num_draws)
    assert close(found.log_px, distance_log_px(x, 0.1))
    assert ((found.kl - log(2)).abs() < 0.1).all()
    right = (found.draws["z"] > 0).double().mean(0)
    assert ((right - 0.5).abs() < 4.5 * 0.5 / sqrt(num_draws)).all()


def test_a_narrow_guide_does_not_narrow_the_grid() -> None:
    lg = pairs.linear_gaussian(2)
    x, guide = pairs.simulated(lg, num_data=3), lg.perturbed_guide(shift=8.0, spread=0.01)
    found = grid_integration(lg.model, guide, x)
    assert close(found.log_px, lg.log_px(x))
    assert close(found.elbo, guide.elbo(x), 1e-5)


def test_data_that_the_prior_did_not_expect() -> None:
    """A posterior ten standard deviations from the prior's mean, outside the first box of a guide that stays there."""
    lg = LinearGaussian(torch.tensor([[1.0], [0.5]]).double(), mean=0.0, noise=0.05)
    x = torch.tensor([[10.0, 5.0], [-13.0, -6.5]]).double()
    guide = pairs.as_functions(lg, lambda _: pairs.prior(lg))[1]
    found = grid_integration(lg.model, guide, x)
    assert found.accepted.all()
    assert close(found.log_px, lg.log_px(x))


CLUSTERS = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
CENTRES = torch.tensor([[0.0, 1.0, -1.0], [2.0, -2.0, 0.5], [0.3, 0.1, 3.0]], dtype=torch.float64)


def test_discrete_latents_beside_two_continuous_dimensions() -> None:
    lg = pairs.linear_gaussian(2, data_dim=3)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(CLUSTERS))
            z = pyro.sample("z", pairs.prior(lg))
            pyro.sample("x", dist.Normal(z @ lg.w.T + CENTRES[c], lg.noise).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(torch.ones(3).double() / 3))
            pyro.sample("z", lg.perturbed_guide().q(x))

    x, num_draws = torch.randn(5, 3).double(), 2003
    found = grid_integration(model, guide, x, num_draws=num_draws)
    parts = torch.stack(
        [w.log() + LinearGaussian(lg.w, m, lg.noise).log_px(x) for w, m in zip(CLUSTERS, CENTRES, strict=True)]
    )
    assert close(found.log_px, parts.logsumexp(0))
    shares = parts.softmax(0)
    drawn = torch.nn.functional.one_hot(found.draws["c"], 3).double().mean(0).T
    assert ((drawn - shares).abs() < 4.5 * (shares * (1 - shares) / num_draws).sqrt() + 1e-9).all()
    # z belongs to the c beside it
    mean = torch.stack([LinearGaussian(lg.w, m, lg.noise).posterior(x).mean for m in CENTRES])
    residual = found.draws["z"] - mean[found.draws["c"], torch.arange(5)]
    white = residual @ torch.linalg.cholesky(lg.precision)
    assert (white.mean(0).abs() < 4.5 / sqrt(num_draws)).all()
    assert (white.square().mean(0) - 1).abs().max() < 4.5 * sqrt(2 / num_draws)


def test_a_neural_decoder_against_a_grid_of_one_piece() -> None:
    torch.manual_seed(1)
    vae = VAE((13,), 2).double()
    with torch.no_grad():
        vae.decoder.layers[-1].weight *= 10
    x = torch.bernoulli(torch.full((3, 13), 0.5)).double()
    found = grid_integration(vae.model, vae.guide, x)
    axis = torch.arange(-6.5, 6.5, 0.05).double()
    z = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        log_joint = vae.decode(z[:, None]).log_prob(x) + dist.Normal(0.0, 1.0).log_prob(z).sum(-1)[:, None]
        q = vae.encode(x)
        log_q = q.log_prob(z[:, None])
    assert found.accepted.all()
    assert close(found.log_px, log_joint.logsumexp(0) + 2 * log(0.05), 1e-3)
    elbo = (log_q.exp() * (log_joint - log_q)).sum(0) * 0.05**2
    assert close(found.elbo, elbo, 2e-3)


def test_what_is_not_resolved_is_flagged(capsys: pytest.CaptureFixture[str]) -> None:
    lg = pairs.linear_gaussian(2, noise=0.03)
    x = pairs.simulated(lg, num_data=3)
    found = grid_integration(lg.model, lg.perturbed_guide(), x, max_levels=1)
    assert not found.accepted.any()
    assert (found.error > 1e-3).all()
    found.summary()
    assert "! log p(x) of 3 of 3 data was not accepted, datum 0 the first" in capsys.readouterr().out


def test_a_guide_that_is_not_resolved_is_flagged() -> None:
    lg = pairs.linear_gaussian(1)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            scales = torch.tensor([[0.01], [1.0]]).double()
            parts = dist.Normal(torch.zeros(2, 1).double(), scales).to_event(1)
            weights = dist.Categorical(torch.ones(2).double())
            pyro.sample("z", dist.MixtureSameFamily(weights, parts))

    x = pairs.simulated(lg, num_data=3)
    found = grid_integration(lg.model, guide, x, max_levels=4)
    assert found.accepted.all()
    assert close(found.log_px, lg.log_px(x))
    assert found.elbo.isnan().all()
    assert [w[:26] for w in found.warnings()] == ["The ELBO of 3 data is NaN:"]
    assert grid_integration(lg.model, guide, x).elbo.isfinite().all()


def test_an_impossible_datum() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("x", dist.Uniform(z - 100, z + 100, validate_args=False), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))

    x = torch.tensor([0.0, 1e9]).double()
    found = grid_integration(model, guide, x)
    assert found.log_px[0] == pytest.approx(-log(200), abs=1e-6)
    assert found.log_px[1] == -inf
    assert found.accepted.tolist() == [True, False]
    assert found.elbo[1] == -inf
    assert any("probability 0" in warning for warning in found.warnings())
    with pytest.raises(ValueError, match=r"Datum 1 has probability 0, so that it has no posterior"):
        grid_integration(model, guide, x, num_draws=1)


def test_nothing_is_changed_by_evaluation() -> None:
    vae = VAE((5,), 2)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    x = torch.eye(5)[:3]
    kept, state = pyro.param("mine", torch.tensor(1.5)), torch.get_rng_state()
    found = grid_integration(vae.model, vae.guide, x, num_draws=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert not found.log_px.requires_grad
    assert not found.draws["z"].requires_grad
    assert list(pyro.get_param_store()) == ["mine"]
    assert pyro.param("mine") is kept
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert all(module.training for module in vae.modules())


# ---------------------------------------------------------------------------------------------------------------
# By enumeration.


def test_it_is_what_pyro_sums() -> None:
    """`TraceEnum_ELBO` with an empty guide is −Σ log p(x)."""

    @config_enumerate
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            c = pyro.sample("c", dist.Categorical(CLUSTERS))
            with pyro.plate("pixels", 3, dim=-1):
                on = pyro.sample("on", dist.Bernoulli(0.2 + 0.25 * c.double()))
                pyro.sample("x", dist.Normal(on + 0.5 * c, 0.7), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("c", dist.Categorical(CLUSTERS))
            with pyro.plate("pixels", 3, dim=-1):
                pyro.sample("on", dist.Bernoulli(torch.full((len(x), 3), 0.5).double()))

    x = torch.randn(5, 3).double()
    loss = TraceEnum_ELBO(max_plate_nesting=2).loss(model, lambda x: None, x)
    found = enumeration(model, guide, x, num_draws=2)
    assert found.log_px.sum().item() == pytest.approx(-loss, abs=1e-9)
    assert found.draws["c"].shape == (2, 5)
    assert found.draws["on"].shape == (2, 5, 3)


def test_numbers_do_not_depend_on_how_the_work_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.linspace(-2, 3, 7).double()
    whole = enumeration(kinds_model, kinds_guide, x)
    monkeypatch.setattr(discrete, "BLOCK_ROWS", 3 * 480)
    monkeypatch.setattr(discrete, "RUN_ROWS", 101)
    cut = enumeration(kinds_model, kinds_guide, x)
    assert close(cut.log_px, whole.log_px, 1e-12)
    assert close(cut.elbo, whole.elbo, 1e-12)


def test_draws_of_discrete_latents() -> None:
    x, num_draws = torch.linspace(-2, 3, 5).double(), 4001
    draws = enumeration(kinds_model, kinds_guide, x, num_draws=num_draws).draws
    assert {name: tuple(value.shape[1:]) for name, value in draws.items()} == {
        "c": (5,),
        "on": (5, 2),
        "hot": (5, 5),
        "part": (5, 3),
    }
    # c changes slowest in the sum by hand, `hot` fastest
    joint = kinds_by_hand(x)[0].softmax(0).reshape(3, 32, 5, 5)
    code = draws["on"] @ torch.tensor([16.0, 8.0]).double() + draws["part"] @ torch.tensor([4.0, 2.0, 1.0]).double()
    for values, shares in (
        (draws["c"], joint.sum((1, 2))),
        (code.long(), joint.sum((0, 2))),
        (draws["hot"].argmax(-1), joint.sum((0, 1))),
        (draws["c"] * 32 + code.long(), joint.sum(2).flatten(0, 1)),
    ):
        drawn = torch.nn.functional.one_hot(values, len(shares)).double().mean(0).T
        assert ((drawn - shares).abs() < 4.5 * (shares * (1 - shares) / num_draws).sqrt() + 2 / num_draws).all()


def test_a_pair_without_latents() -> None:
    found = enumeration(coin.model, coin.guide, torch.tensor([1.0, 0.0, 1.0]))
    assert close(found.log_px, torch.full((3,), log(0.5)))
    assert close(found.kl, torch.zeros(3))


def test_a_guide_with_values_that_the_model_has_not() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3).double()))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Geometric(torch.tensor(0.5).double()))

    x = torch.randn(11).double()
    found = enumeration(model, guide, x)
    parts = torch.stack([log(0.7) + dist.Normal(0.0, 1.0).log_prob(x), log(0.3) + dist.Normal(1.0, 1.0).log_prob(x)])
    assert close(found.log_px, parts.logsumexp(0))
    assert found.elbo.isnan().all()


# ---------------------------------------------------------------------------------------------------------------
# What is refused, and what is said.


def drawn_from(**latents: Any) -> tuple[Any, Any]:
    """A model that says nothing of x, and its prior as guide."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            for name, fn in latents.items():
                pyro.sample(name, fn)
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            for name, fn in latents.items():
                pyro.sample(name, fn)

    return model, guide


def test_refusals() -> None:
    x = torch.randn(3)
    normal = drawn_from(z=dist.Normal(torch.zeros(3), 1.0).to_event(1))
    poisson = drawn_from(z=dist.Poisson(torch.tensor(2.0)))
    many = drawn_from(z=dist.Bernoulli(torch.full((17,), 0.5)).to_event(1))
    coins = drawn_from(z=dist.Bernoulli(torch.tensor(0.5)))
    with pytest.raises(ValueError, match=r"have 3 dimensions \(\{'z': 3\}\); a grid goes up to 2\. Use annealed"):
        grid_integration(*normal, x)
    with pytest.raises(ValueError, match=r"The latent 'z' is continuous, .* Use grid_integration where"):
        enumeration(*normal, x)
    with pytest.raises(ValueError, match=r"The latent 'z' is discrete and its values cannot be listed \(Poisson\)"):
        enumeration(*poisson, x)
    with pytest.raises(ValueError, match=r"The latent 'n' is discrete and its values cannot be listed \(Poisson\)"):
        grid_integration(*drawn_from(z=dist.Normal(0.0, 1.0), n=dist.Poisson(2.0)), x)
    with pytest.raises(ValueError, match=r"more than 65536 configurations"):
        enumeration(*many, x)
    with pytest.raises(ValueError, match=r"no continuous latent .* Use enumeration"):
        grid_integration(*coins, x)
    for options, sentence in (
        ({"tolerance": 0.0}, "tolerance is a difference in nats and must be above 0; got 0"),
        ({"num_points": 0}, "num_points must be an integer of at least 1"),
        ({"max_levels": 0}, "max_levels must be an integer of at least 1"),
        ({"num_draws": -1}, "num_draws must be an integer, 0 for none; got -1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            grid_integration(*normal, x, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"num_draws must be an integer, 0 for none; got 2\.5"):
        enumeration(*coins, x, num_draws=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NaN or infinite"):
        enumeration(*coins, x * torch.nan)
    with pytest.raises(TypeError, match="must be a tensor"):
        grid_integration(*normal, [1.0])


def test_a_density_that_is_nan_names_the_site() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            loc = torch.where(z > 4.5, torch.nan, z)
            pyro.sample("x", dist.Normal(loc, 1.0, validate_args=False), obs=x)

    with pytest.raises(ValueError, match=r"A density is NaN or \+∞ at .*: site 'x' of the model has none there"):
        grid_integration(model, drawn_from(z=dist.Normal(torch.zeros(()), 1.0))[1], torch.zeros(3))


def test_the_record() -> None:
    found = Exact(
        log_px=torch.tensor([-1.0, -2.0, -6.0]).double(),
        error=torch.tensor([0.0, 1e-5, 2e-4]).double(),
        elbo=torch.tensor([-1.5, -2.0, -8.0]).double(),
        accepted=torch.ones(3, dtype=torch.bool),
        method="grid integration in 2 dimensions",
    )
    assert found.mean == pytest.approx(-3)
    assert found.mean_standard_error == pytest.approx(sqrt((4 + 1 + 9) / 2) / sqrt(3))
    assert found.kl.tolist() == [0.5, 0.0, 2.0]
    assert found.warnings() == []
    assert found.draws == {}
    text = str(found)
    assert text.startswith("Grid integration in 2 dimensions: 3 data\n")
    for words in ("-3.0000", "2.0e-04", "-3.8333", "0.8333"):
        assert words in text
    alone = Exact(*(column[:1] for column in (found.log_px, found.error, found.elbo, found.accepted)), "enumeration")
    assert "–  standard error over data" in str(alone)


def test_runs_are_of_bounded_length(monkeypatch: pytest.MonkeyPatch) -> None:
    longest = 0
    right = Target.log_parts

    def counted(self: Target, u: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal longest
        longest = max(longest, len(u))
        return right(self, u)

    monkeypatch.setattr(Target, "log_parts", counted)
    lg = pairs.linear_gaussian(2)
    grid_integration(lg.model, lg.guide, pairs.simulated(lg, num_data=2))
    assert longest == grid.RUN_ROWS
