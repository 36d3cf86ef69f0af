"""Annealed importance sampling: unbiased for any temperatures and steps, exact where it must be, frozen in time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import inf, log, nan, sqrt
from typing import Any

import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import ppl_vae as pv
from ppl_vae import coin
from ppl_vae.evidence import annealed_importance_sampling, annealing, importance_sampling
from ppl_vae.evidence.annealing import Work
from ppl_vae.evidence.blocks import Block, blocks, looked_at
from ppl_vae.evidence.graphs import PathGraphs
from ppl_vae.evidence.path import PILOT_CESS, Path, Schedule, State, _largest_step
from ppl_vae.evidence.stream import COLUMNS
from ppl_vae.proposals import Defensive, Guide, Prior, Proposal, StudentT, Widened
from ppl_vae.scoring.coordinates import Coordinates

CHAINS = 5
PROPOSALS: list[Proposal] = [Guide(), Widened(), StudentT(), Defensive(), Prior()]


@contextmanager
def prepared(
    model: Any, guide: Any, x: Tensor, *, temperatures: int = 5, leapfrog: int = 3, proposal: Proposal | None = None
) -> Iterator[tuple[Path, Schedule]]:
    """The path of the first block and its schedule, for tests that look inside."""
    work = Work(CHAINS, temperatures, leapfrog, proposal or Guide())
    with looked_at(model, guide, x) as pair:
        block = next(blocks(pair, (x,), len(x)))
        yield work.prepared(pair, block, root=7)


# ---------------------------------------------------------------------------------------------------------------
# Statements that hold for the right estimator and for none of the wrong ones below.


def exact_posterior_gives_the_exact_value() -> None:
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg)
    for temperatures in (1, 2, 17):
        found = annealed_importance_sampling(
            lg.model, lg.guide, x, num_chains=CHAINS, num_temperatures=temperatures, num_leapfrog=2
        )
        assert (found.log_px - lg.log_px(x)).abs().max() < 1e-9
        assert (found.elbo - lg.log_px(x)).abs().max() < 1e-9
        assert (found.ess - CHAINS).abs().max() < 1e-6
        assert found.standard_error.max() < 1e-6


def weights_average_to_px_with_bad_steps() -> None:
    """E[w] = p(x) at five temperatures, uneven and few, with step sizes that reject most moves or hardly move."""
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg, num_data=2003)
    for factor in (2.5, 0.1):
        with prepared(lg.model, lg.perturbed_guide(), x) as (path, schedule):
            betas = torch.tensor([0.0, 0.02, 0.3, 0.35, 0.9, 1.0]).double().unsqueeze(1).expand(-1, len(x))
            torch.manual_seed(3)
            log_w, _, accepted = path.forward(Schedule(betas, schedule.step_sizes * factor, schedule.resolved), CHAINS)
            assert accepted.mean() < 0.6 or factor < 1
        ratio = (log_w.logsumexp(0) - log(CHAINS) - lg.log_px(x)).exp()
        assert abs(ratio.mean() - 1) < 4.5 * ratio.std() / sqrt(len(x))


def moves_leave_the_density_as_it_is() -> None:
    """Exact draws stay exact draws under a hundred moves, at either end of a path and in between."""
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg, num_data=1).expand(2003, -1)
    exact = lg.posterior(x[:1])
    with prepared(lg.model, lg.guide, x) as (path, schedule):
        torch.manual_seed(5)
        state = path.begin(1)
        for number in range(100):
            temperature = torch.full((len(x),), [0.0, 0.4, 1.0][number % 3]).double()
            state, accepted = path.move(state, temperature, 1.3 * schedule.step_sizes[1])
    assert 0.2 < accepted.mean() < 0.9
    u = (state.u[0] - exact.mean) @ torch.linalg.cholesky(lg.precision)
    assert (u.mean(0).abs() < 4.5 / sqrt(len(x))).all()
    assert ((u.var(0) - 1).abs() < 4.5 * sqrt(2 / len(x))).all()
    assert (torch.corrcoef(u.T) - torch.eye(3)).abs().max() < 4.5 / sqrt(len(x))


def leapfrog_is_reversible_and_of_second_order() -> None:
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg)
    with prepared(lg.model, lg.perturbed_guide(), x, leapfrog=8) as (path, _):
        torch.manual_seed(1)
        state, momentum = path.begin(CHAINS), path.target.normal(CHAINS)
        beta = torch.tensor(0.4).double()

        def energy(s: State, p: Tensor) -> Tensor:
            return 0.5 * p.square().sum(-1) - (1 - beta) * s.log_start - beta * s.log_end

        errors = []
        for num, step in ((8, 0.1), (16, 0.05)):
            path.num_leapfrog = num
            there, p = path.leapfrog(state, momentum, beta, torch.tensor(step).double())
            back, q = path.leapfrog(there, -p, beta, torch.tensor(step).double())
            assert (back.u - state.u).abs().max() < 1e-10
            assert (q + momentum).abs().max() < 1e-10
            errors.append((energy(there, p) - energy(state, momentum)).abs().mean())
        assert errors[0] / errors[1] == pytest.approx(4, rel=0.15)


def a_coin_in_logit_coordinates() -> None:
    pair = coin.BetaBernoulli(2.0, 3.0)
    with pyro.get_param_store().scope():
        tosses = torch.bernoulli(torch.full((211, 11), 0.4), generator=torch.Generator().manual_seed(2)).double()

        def guide(tosses: Tensor) -> None:
            with pyro.plate("data", len(tosses)):
                pyro.sample("z", dist.Beta(torch.tensor(3.0).double(), torch.tensor(3.5).double()))

        for proposal in (Guide(), Prior(), Widened()):
            found = annealed_importance_sampling(
                pair.model, guide, tosses, num_chains=CHAINS, num_temperatures=20, num_leapfrog=3, proposal=proposal
            )
            ratio = (found.log_px - pair.log_px(tosses)).exp()
            tolerance = 4.5 * ratio.std() / sqrt(len(tosses))
            assert abs(ratio.mean() - 1) < tolerance < 0.1


def the_schedule_is_frozen() -> None:
    """Every move that counts has the schedule's temperature and step size, and the schedule is not touched."""
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg)
    with prepared(lg.model, lg.perturbed_guide(), x) as (path, schedule):
        kept = [tensor.clone() for tensor in schedule]
        used: list[tuple[Tensor, Tensor]] = []
        move = path.move
        path.move = lambda s, t, e: (used.append((t.clone(), e.clone())), move(s, t, e))[1]  # type: ignore
        path.forward(schedule, CHAINS)
        forward, used = used, []
        path.backward(schedule, lg.posterior(x).sample((1,)))
    assert all(map(torch.equal, schedule, kept))
    for number, (temperature, step_size) in enumerate(forward, start=1):
        assert torch.equal(temperature, kept[0][number])
        assert torch.equal(step_size, kept[1][number])
    assert len(forward) == len(used) == 4
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(forward, used[::-1], strict=True))


def one_temperature_is_importance_sampling() -> None:
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg)
    guide = lg.perturbed_guide()
    found = annealed_importance_sampling(lg.model, guide, x, num_chains=CHAINS, num_temperatures=1)
    with prepared(lg.model, guide, x, temperatures=1) as (path, schedule):
        torch.manual_seed(11)
        log_w, first, _ = path.forward(schedule, CHAINS)
        torch.manual_seed(11)
        u = path.target.draw_guide(CHAINS)
    by_hand = lg.posterior(x).log_prob(u) + lg.log_px(x) - guide.q(x).log_prob(u)
    torch.testing.assert_close(log_w, by_hand, rtol=0, atol=1e-9)
    torch.testing.assert_close(first, by_hand, rtol=0, atol=1e-9)
    assert (found.elbo < found.log_px).all()


def results_do_not_depend_on_companions() -> None:
    lg = pairs.linear_gaussian()
    x, guide = pairs.simulated(lg, num_data=29), lg.perturbed_guide()
    anneal = partial(annealed_importance_sampling, lg.model, guide, num_chains=CHAINS, num_temperatures=7)
    whole = anneal(x)
    others = x.clone()
    others[1:] = 3 * x[1:].flip(0)
    for found in (anneal(x[:1]), anneal(others), anneal(x[:13])):
        for name in ("log_px", "standard_error", "elbo", "acceptance"):
            torch.testing.assert_close(getattr(found, name)[0], getattr(whole, name)[0], rtol=0, atol=1e-9)
    torch.testing.assert_close(anneal(x[:13]).log_px, whole.log_px[:13], rtol=0, atol=1e-9)


def the_schedule_keeps_weights_more_even_than_equal_spacing_does() -> None:
    """From the prior to a sharp posterior, with the same step sizes at each temperature."""
    lg = pairs.linear_gaussian(noise=0.2)
    x = pairs.simulated(lg, num_data=101)
    with prepared(lg.model, lg.guide, x, temperatures=23, proposal=Prior()) as (path, schedule):
        number = torch.linspace(0, 1, 24).double().unsqueeze(1).expand(-1, len(x))
        step_sizes = torch.stack(
            [schedule.step_sizes.gather(0, (schedule.temperatures < n).sum(0)[None])[0] for n in number]
        )
        ess = []
        for frozen in (schedule, schedule._replace(temperatures=number.contiguous(), step_sizes=step_sizes)):
            torch.manual_seed(2)
            log_w, _, _ = path.forward(frozen, 31)
            ess.append((2 * log_w.logsumexp(0) - (2 * log_w).logsumexp(0)).exp().mean())
    assert ess[0] > 1.5 * ess[1]


def the_elbo_is_that_of_the_proposal() -> None:
    """However many temperatures bring log p(x) closer."""
    lg = pairs.linear_gaussian()
    x, guide = pairs.simulated(lg, num_data=199), lg.perturbed_guide()
    found = annealed_importance_sampling(lg.model, guide, x, num_chains=CHAINS, num_temperatures=20, num_leapfrog=2)
    difference = found.elbo - guide.elbo(x)
    assert abs(difference.mean()) < 4.5 * difference.std() / sqrt(len(x)) < 0.3
    assert (found.log_px - guide.elbo(x)).mean() > 0.5  # there is a difference to be seen


def a_chain_that_has_run_away_stays_where_it_was() -> None:
    """And the model is never run where it has gone."""
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pairs.prior(lg))
            assert z.isfinite().all(), "the model was run at infinity"
            pyro.sample("x", pairs.conditional(lg, z).to_event(1), obs=x)

    with prepared(model, lg.perturbed_guide(), x) as (path, schedule):
        torch.manual_seed(3)
        log_w, first, accepted = path.forward(
            schedule._replace(step_sizes=torch.full_like(schedule.step_sizes, 1e200)), CHAINS
        )
    assert (accepted == 0).all()
    torch.testing.assert_close(log_w, first, rtol=0, atol=1e-9)


STATEMENTS: dict[str, Callable[[], None]] = {
    f.__name__: f
    for f in (
        exact_posterior_gives_the_exact_value,
        weights_average_to_px_with_bad_steps,
        moves_leave_the_density_as_it_is,
        leapfrog_is_reversible_and_of_second_order,
        a_coin_in_logit_coordinates,
        the_schedule_is_frozen,
        one_temperature_is_importance_sampling,
        results_do_not_depend_on_companions,
        the_schedule_keeps_weights_more_even_than_equal_spacing_does,
        the_elbo_is_that_of_the_proposal,
        a_chain_that_has_run_away_stays_where_it_was,
    )
}


@pytest.mark.parametrize("statement", STATEMENTS)
def test_statement(statement: str) -> None:
    STATEMENTS[statement]()


# Mutants: each takes the place of a method, and breaks at least the statements named.


def weight_after_the_move(self: Path, schedule: Schedule, num_chains: int) -> tuple[Tensor, Tensor, Tensor]:
    state = self.begin(num_chains)
    first, log_w = state.log_ratio, torch.zeros_like(state.log_end)
    for number in range(1, len(schedule.temperatures)):
        rise = schedule.temperatures[number] - schedule.temperatures[number - 1]
        state, accepted = self.move(state, schedule.temperatures[number], schedule.step_sizes[number])
        log_w = log_w + rise * state.log_ratio
    return log_w, first, accepted


def adapts_while_it_counts(self: Path, schedule: Schedule, num_chains: int) -> tuple[Tensor, Tensor, Tensor]:
    state = self.begin(num_chains)
    first, log_w, log_step = state.log_ratio, torch.zeros_like(state.log_end), schedule.step_sizes[1].log()
    for number in range(1, len(schedule.temperatures)):
        log_w = log_w + (schedule.temperatures[number] - schedule.temperatures[number - 1]) * state.log_ratio
        if number < len(schedule.temperatures) - 1:
            state, accepted = self.move(state, schedule.temperatures[number], log_step.exp())
            log_step = log_step + 0.4 * (accepted - 0.8)
    return log_w, first, torch.ones_like(log_w[0])


def unnormalised_start(at: Any) -> Any:
    """The proposal's density without its constant."""

    def wrong(self: Path, u: Tensor) -> State:
        state = at(self, u)
        return state._replace(log_start=state.log_start + 0.5 * u.shape[-1] * log(2 * torch.pi))

    return wrong


def slope_of_wrong_sign(at: Any) -> Any:
    return lambda self, u: (s := at(self, u))._replace(slope_end=-s.slope_end, slope_start=-s.slope_start)


def no_first_half_step(self: Path, state: State, momentum: Tensor, beta: Tensor, step: Tensor) -> tuple[State, Tensor]:
    new = state
    for _ in range(self.num_leapfrog):
        new = self.at(new.u + step * self.scale * momentum)
        momentum = momentum + step * self.scale * ((1 - beta) * new.slope_start + beta * new.slope_end)
    return new, momentum


def accepts_without_kinetic_energy(move: Any) -> Any:
    """Metropolis on the density alone, as if the momentum had not changed."""

    def wrong(self: Path, state: State, temperature: Tensor, step_size: Tensor) -> tuple[State, Tensor]:
        leapfrog = Path.leapfrog

        def silent(*args: Any) -> tuple[State, Tensor]:
            new, _ = leapfrog(self, *args)
            return new, args[1]

        self.leapfrog = silent  # type: ignore[method-assign]
        try:
            return move(self, state, temperature, step_size)
        finally:
            del self.leapfrog

    return wrong


def weights_of_other_data(forward: Any) -> Any:
    """`repeat_interleave` with the view of `repeat`: chains of one datum land on another."""

    def wrong(self: Path, schedule: Schedule, num_chains: int) -> tuple[Tensor, Tensor, Tensor]:
        log_w, first, accepted = forward(self, schedule, num_chains)
        return log_w.T.reshape(log_w.shape), first, accepted

    return wrong


def no_jacobian(restore: Any) -> Any:
    return lambda self, u: ((found := restore(self, u))[0], torch.zeros_like(found[1]))


def jacobian_of_wrong_sign(restore: Any) -> Any:
    return lambda self, u: ((found := restore(self, u))[0], -found[1])


def equally_spaced(pilot: Any) -> Any:
    def wrong(self: Path, num_steps: int) -> Schedule:
        schedule = pilot(self, num_steps)
        even = torch.linspace(0, 1, num_steps + 1).double().unsqueeze(1)
        return schedule._replace(temperatures=even.expand_as(schedule.temperatures).contiguous())

    return wrong


def runs_the_model_anywhere(
    self: Path, state: State, momentum: Tensor, beta: Tensor, step: Tensor
) -> tuple[State, Tensor]:
    def force(s: State) -> Tensor:
        return self.scale * ((1 - beta) * s.slope_start + beta * s.slope_end)

    new = state
    for _ in range(self.num_leapfrog):
        momentum = momentum + 0.5 * step * force(new)
        new = self.at(new.u + step * self.scale * momentum)
        momentum = momentum + 0.5 * step * force(new)
    return new, momentum


def elbo_of_the_chains(columns: Any) -> Any:
    return lambda self, log_w, first, block: columns(self, log_w, log_w, block)


def whole_batch_steps(move: Any) -> Any:
    """One step size for all data, from their mean."""
    return lambda self, s, t, e: move(self, s, t, e.mean().expand_as(e))


MUTANTS: list[tuple[type, str, Any, str]] = [
    (Path, "forward", lambda _: weight_after_the_move, "weights_average_to_px_with_bad_steps"),
    (Path, "forward", lambda _: weight_after_the_move, "one_temperature_is_importance_sampling"),
    (Path, "forward", lambda _: adapts_while_it_counts, "the_schedule_is_frozen"),
    (Path, "forward", weights_of_other_data, "exact_posterior_gives_the_exact_value"),
    (Path, "at", unnormalised_start, "exact_posterior_gives_the_exact_value"),
    (Path, "at", unnormalised_start, "weights_average_to_px_with_bad_steps"),
    (Path, "at", slope_of_wrong_sign, "leapfrog_is_reversible_and_of_second_order"),
    (Path, "leapfrog", lambda _: no_first_half_step, "leapfrog_is_reversible_and_of_second_order"),
    (Path, "leapfrog", lambda _: no_first_half_step, "moves_leave_the_density_as_it_is"),
    (Path, "move", accepts_without_kinetic_energy, "moves_leave_the_density_as_it_is"),
    (Path, "move", accepts_without_kinetic_energy, "weights_average_to_px_with_bad_steps"),
    (Path, "move", whole_batch_steps, "results_do_not_depend_on_companions"),
    (Coordinates, "restore", no_jacobian, "a_coin_in_logit_coordinates"),
    (Coordinates, "restore", jacobian_of_wrong_sign, "a_coin_in_logit_coordinates"),
    (Path, "pilot", equally_spaced, "the_schedule_keeps_weights_more_even_than_equal_spacing_does"),
    (Path, "leapfrog", lambda _: runs_the_model_anywhere, "a_chain_that_has_run_away_stays_where_it_was"),
    (Work, "columns", elbo_of_the_chains, "the_elbo_is_that_of_the_proposal"),
]


@pytest.mark.parametrize(("owner", "name", "mutation", "statement"), MUTANTS)
def test_mutant_is_caught(
    owner: type, name: str, mutation: Any, statement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, mutation(getattr(owner, name)))
    with pytest.raises(AssertionError):
        STATEMENTS[statement]()


# ---------------------------------------------------------------------------------------------------------------
# The same numbers for every form of the pair; better than importance sampling where that is lost.


@pytest.mark.parametrize("form", [*pairs.FORMS, "auto_normal"])
def test_every_form_gives_the_same_numbers(form: str) -> None:
    lg = pairs.linear_gaussian()
    x, guide = pairs.simulated(lg), lg.perturbed_guide()
    model, q = pairs.auto_normal(lg, guide, x) if form == "auto_normal" else pairs.FORMS[form](lg, guide.q)
    # A pair that runs on all its data or not at all draws for these data and no others.
    whole = form in ("with_fixed_plate", "auto_normal")
    same = pairs.with_fixed_plate(lg, guide.q) if whole else (lg.model, guide)
    anneal = partial(annealed_importance_sampling, num_chains=CHAINS, num_temperatures=5, num_leapfrog=2)
    found, reference = anneal(model, q, x), anneal(*same, x)
    assert abs((found.log_px - lg.log_px(x)).mean()) < 4.5 * found.mc_standard_error
    if form == "with_subsampled_plate":
        return  # whose plate draws random numbers of its own each time it runs
    for name in ("log_px", "standard_error", "elbo", "acceptance"):
        torch.testing.assert_close(getattr(found, name), getattr(reference, name), rtol=1e-6, atol=1e-6)


def test_as_many_dimensions_as_data() -> None:
    lg = pairs.linear_gaussian(latent_dim=3)
    x = pairs.simulated(lg, num_data=3)
    found = annealed_importance_sampling(lg.model, lg.perturbed_guide(), x, num_chains=3, num_temperatures=100)
    assert ((found.log_px - lg.log_px(x)).abs() < 0.2).all()


@pytest.mark.parametrize("proposal", PROPOSALS, ids=str)
def test_from_every_proposal(proposal: Proposal) -> None:
    """A guide so wrong that importance sampling loses many nats."""
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg, num_data=61)  # one block
    wrong = lg.perturbed_guide(shift=1.5, spread=0.6)
    found = annealed_importance_sampling(lg.model, wrong, x, num_temperatures=100, proposal=proposal)
    error = found.log_px - lg.log_px(x)
    assert abs(error.mean()) < 0.1
    ratio = error.exp()
    assert abs(ratio.mean() - 1) < 4.5 * ratio.std() / sqrt(len(x))
    if isinstance(proposal, Guide):
        plain = importance_sampling(lg.model, wrong, x, num_samples=10_000).log_px - lg.log_px(x)
        assert plain.mean() < -0.5
    assert str(proposal) in found.method


def test_bounds_rise_with_temperatures() -> None:
    lg = pairs.linear_gaussian()
    x, wrong = pairs.simulated(lg, num_data=199), lg.perturbed_guide(shift=2.0, spread=0.5)
    means = [
        annealed_importance_sampling(lg.model, wrong, x, num_chains=CHAINS, num_temperatures=t).mean
        for t in (1, 3, 10, 50)
    ]
    assert means == sorted(means)
    assert means[-1] == pytest.approx(lg.log_px(x).mean().item(), abs=0.3)


def test_the_standard_error_is_honest() -> None:
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg, num_data=1).expand(503, -1)
    found = annealed_importance_sampling(lg.model, lg.perturbed_guide(), x, num_temperatures=20, num_leapfrog=2)
    assert 0.85 < found.log_px.std() / found.standard_error.mean() < 1.2


# ---------------------------------------------------------------------------------------------------------------
# Discrete latents, constrained latents, latents given latents.


def test_discrete_latents_are_summed_out() -> None:
    weights, locs = torch.tensor([0.2, 0.5, 0.3]).double(), torch.tensor([-4.0, 0.5, 5.0]).double()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Categorical(weights))
            z = pyro.sample("z", dist.Normal(locs[c], 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Categorical(torch.ones(3).double() / 3))
            pyro.sample("z", dist.Normal(x, 1.5))

    x = torch.linspace(-5, 6, 11).double()
    exact = (weights.log() + dist.Normal(locs, sqrt(1.25)).log_prob(x[:, None])).logsumexp(1)
    for proposal in (Guide(), Prior()):
        found = annealed_importance_sampling(model, guide, x, num_chains=31, num_temperatures=100, proposal=proposal)
        assert ((found.log_px - exact).abs() < 4.5 * found.standard_error).all()
        assert found.standard_error.max() < 0.3


def test_a_latent_drawn_given_another() -> None:
    """z₂ ~ N(0, 1), z₁ ~ N(z₂, 1), x ~ N(z₁, 0.5): p(x) = N(0, 2.25)."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(()).double(), 1.0))
            z1 = pyro.sample("z1", dist.Normal(z2, 1.0))
            pyro.sample("x", dist.Normal(z1, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(0.2 * x, 1.0))
            pyro.sample("z1", dist.Normal(0.5 * x + 0.3 * z2, 0.7))

    x = torch.linspace(-3, 3, 43).double()
    exact = dist.Normal(0.0, 1.5).log_prob(x)
    for proposal in (Guide(), Prior()):
        found = annealed_importance_sampling(model, guide, x, num_temperatures=100, num_leapfrog=3, proposal=proposal)
        assert (found.log_px - exact).abs().max() < 0.3
        assert abs((found.log_px - exact).mean()) < 0.03


def test_inputs_beside_the_data() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(y, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x, 1.0))

    x, y = torch.randn(17).double(), torch.randn(17).double()
    found = annealed_importance_sampling(model, guide, x, y, num_temperatures=50)
    assert (found.log_px - dist.Normal(y, sqrt(2)).log_prob(x)).abs().max() < 0.2


# ---------------------------------------------------------------------------------------------------------------
# What is left as it was, what is refused, and what is said.


def test_nothing_is_changed_by_evaluation() -> None:
    vae = pv.VAE((4,), 2, decoder=pv.networks.MLP(2, (4,), hidden_dims=(5,)))
    x = (torch.arange(12).reshape(3, 4) % 2).float()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    state = torch.get_rng_state()
    one, two = (annealed_importance_sampling(vae.model, vae.guide, x, num_temperatures=4) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.log_px, two.log_px)
    assert not list(pyro.get_param_store())
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in vae.parameters())
    assert all(module.training for module in vae.modules())
    assert not one.log_px.requires_grad
    other = annealed_importance_sampling(vae.model, vae.guide, x, num_temperatures=4, seed=1)
    assert (one.log_px != other.log_px).all()
    free = [annealed_importance_sampling(vae.model, vae.guide, x, num_temperatures=2, seed=None) for _ in range(2)]
    assert (free[0].log_px != free[1].log_px).all()


def poisson(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        n = pyro.sample("n", dist.Poisson(torch.tensor(3.0)))
        z = pyro.sample("z", dist.Normal(n, 1.0))
        if x.dim():
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def poisson_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("n", dist.Poisson(torch.tensor(2.0)))
        pyro.sample("z", dist.Normal(x, 1.0))


def many(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Bernoulli(torch.full((11,), 0.5)).to_event(1))
        z = pyro.sample("z", dist.Normal(c.sum(-1), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def many_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("c", dist.Bernoulli(torch.full((11,), 0.5)).to_event(1))
        pyro.sample("z", dist.Normal(x, 1.0))


def discrete(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.5)))
        pyro.sample("x", dist.Normal(c, 1.0), obs=x)


def discrete_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("c", dist.Bernoulli(torch.tensor(0.5)))


def moving(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Gamma(torch.tensor(2.0), torch.tensor(1.0)))
        b = pyro.sample("b", dist.Uniform(0.0, a))
        pyro.sample("x", dist.Normal(b, 1.0), obs=x)


def moving_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Gamma(torch.tensor(2.0), torch.tensor(1.0)))
        pyro.sample("b", dist.Uniform(0.0, a))


@pytest.mark.parametrize(
    ("model", "guide", "sentence"),
    [
        (poisson, poisson_guide, r"The latent 'n' is discrete and its values cannot be listed \(Poisson\)"),
        (many, many_guide, r"discrete latents \['c'\] have more than 1024 configurations .*2 values in 11 places"),
        (discrete, discrete_guide, r"no continuous latent to integrate over \(its latents: \['c'\]\)"),
        (moving, moving_guide, "The support of 'b' changes from draw to draw"),
    ],
)
def test_latents_that_cannot_be_annealed_are_named(model: Any, guide: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        annealed_importance_sampling(model, guide, torch.randn(7))


def test_refusals() -> None:
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg)
    for name in ("num_chains", "num_temperatures", "num_leapfrog"):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1; got 0"):
            annealed_importance_sampling(lg.model, lg.guide, x, **{name: 0})
    autoencoder = pv.Autoencoder((7,), 3)
    with pytest.raises(ValueError, match="no density log q"):
        annealed_importance_sampling(autoencoder.model, autoencoder.guide, x.float())
    vae = pv.VAE((7,), 3)
    with pytest.raises(ValueError, match=r"A Bernoulli likelihood scores data in \{0, 1\}"):
        annealed_importance_sampling(vae.model, vae.guide, x.float())


@pytest.mark.parametrize("weight", [nan, inf])
def test_weights_that_are_not_finite_are_refused(weight: float) -> None:
    log_w = torch.zeros(CHAINS, 3).double()
    log_w[2, 1] = weight
    block = Block(13, (torch.zeros(3),), 3)
    with pytest.raises(ValueError, match=r"A weight of datum 14 is NaN or \+∞: .* Call importance_sampling"):
        Work(CHAINS, 1, 1, Guide()).columns(log_w, log_w, block)
    log_w[2, 1] = -inf  # is a weight of 0
    found = dict(zip(COLUMNS, Work(CHAINS, 1, 1, Guide()).columns(log_w, log_w, block), strict=True))
    assert found["log_px"].tolist() == pytest.approx([0, log((CHAINS - 1) / CHAINS), 0])


def test_a_chain_where_the_model_is_nan_is_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("x", dist.Normal(torch.where(z > 1.5, nan, z), 1.0, validate_args=False), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0 * x, 1.0))

    with pytest.raises(ValueError, match=r"A weight of datum \d+ is NaN or \+∞: the model or the guide has no finite"):
        annealed_importance_sampling(model, guide, torch.zeros(31).double(), num_temperatures=3, num_leapfrog=1)


def test_chains_that_lag_behind_are_spoken_of() -> None:
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg, num_data=23)
    found = annealed_importance_sampling(lg.model, lg.guide, x, num_temperatures=2, num_leapfrog=1)
    for acceptance, stuck in ((0.41, 0), (0.39, 100)):
        text = str(replace(found, acceptance=torch.full_like(found.acceptance, acceptance)))
        assert (f"Less than 40 % of the moves were accepted for {stuck} % of the data" in text) == (stuck > 0)
    one, two = torch.full((2, 23), 0.8).double()  # one datum in 23 is less than 5 %, two are more
    one[:1], two[:2] = 0.1, 0.1
    assert not replace(found, acceptance=one).warnings()
    assert "for 9 % of the data, so that their chains lag behind" in str(replace(found, acceptance=two))


def test_summary_says_when_not_to_believe_it(capsys: pytest.CaptureFixture[str]) -> None:
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg, num_data=31)
    good = annealed_importance_sampling(lg.model, lg.perturbed_guide(), x, num_leapfrog=2)
    good.summary()
    printed = capsys.readouterr().out
    assert "Annealed importance sampling from the guide, 100 temperatures: 31 data, 16 chains each" in printed
    assert "moves accepted" in printed
    assert "Pareto" not in printed  # of 16 weights no tail can be told
    assert f"{good.jackknife.mean().item():.3f}" in next(line for line in printed.splitlines() if "jackknife" in line)
    assert "!" not in printed
    bad = str(annealed_importance_sampling(lg.model, lg.guide, 30 * x, num_temperatures=3, proposal=Prior()))
    assert "3 temperatures are too few for 100 % of the data" in bad
    assert "fewer than a quarter of the 16 chains" in bad


def test_a_uniform_guide_has_no_slope() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(x - 9, x + 9))

    x = torch.randn(13).double()
    found = annealed_importance_sampling(model, guide, x, num_temperatures=50)
    assert (found.log_px - dist.Normal(0.0, sqrt(2)).log_prob(x)).abs().max() < 0.5


def test_the_largest_step_keeps_the_conditional_ess() -> None:
    log_ratio = torch.randn(1009, 3, generator=torch.Generator().manual_seed(1)).double() * torch.tensor([0.01, 2, 300])
    most = torch.ones(3).double()
    rise = _largest_step(log_ratio, most)
    assert rise[0] == 1
    for datum in (1, 2):
        w = (rise[datum] * log_ratio[:, datum]).exp()
        assert w.sum() ** 2 / w.square().sum() / len(w) == pytest.approx(PILOT_CESS, abs=1e-6)
    log_ratio[::2, 1] = -torch.inf  # chains where the model is impossible do not stop the others
    assert _largest_step(log_ratio, most)[1] > 0.01


def test_graphs_of_several_blocks_give_what_an_eager_run_gives(
    graphs_as_recorded: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three blocks of other data and a short one; a graph for each number of chains, the pilot's and the run's."""
    monkeypatch.setattr(annealing, "BLOCK_ROWS", 7 * CHAINS)
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg, num_data=23)

    def log_px(*, compile: bool) -> Tensor:
        return annealed_importance_sampling(
            lg.model, lg.perturbed_guide(), x, num_chains=CHAINS, num_temperatures=3, num_leapfrog=2, compile=compile
        ).log_px

    eager = log_px(compile=False)
    assert (log_px(compile=True) - eager).abs().max() < 1e-9
    assert len(graphs_as_recorded) == 2

    class OfTheFirst(PathGraphs):
        """The mutant: every block is scored by the graph that holds the first block's data."""

        def of(self, at: Any, batch: int) -> Any:
            self.kept = getattr(self, "kept", None) or super().of(at, batch)
            return self.kept

    monkeypatch.setattr(annealing, "PathGraphs", OfTheFirst)
    x = x[:21]
    wrong = log_px(compile=True)
    assert (wrong[:7] - eager[:7]).abs().max() < 1e-9
    assert (wrong[7:] - eager[7:21]).abs().max() > 0.1
