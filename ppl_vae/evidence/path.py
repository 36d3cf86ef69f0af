"""The path from a proposal to the posterior, the moves along it, and the pilot run that finds its temperatures."""

from __future__ import annotations

from math import log
from typing import NamedTuple

import pyro
import pyro.infer.util
import torch
from torch import Tensor

from ppl_vae.evidence.graphs import PathGraphs
from ppl_vae.proposals import Density
from ppl_vae.scoring import Target

# Of the pilot run: how many chains, what share of its effective sample size a step keeps, what share of the moves is to
# be accepted, how fast step sizes follow, and how many moves find the first of them.
PILOT_CHAINS, PILOT_CESS, ACCEPTANCE, ADAPTATION, WARM_UP = 8, 0.8, 0.8, 0.4, 20
SMALLEST_LOG_STEP = -7.0


class State(NamedTuple):
    """Where chains are, and both ends of the path with their slopes there."""

    u: Tensor  # (chains, batch, dim)
    log_start: Tensor  # (chains, batch), float64
    log_end: Tensor
    slope_start: Tensor  # (chains, batch, dim)
    slope_end: Tensor

    @property
    def log_ratio(self) -> Tensor:
        return self.log_end - self.log_start


class Schedule(NamedTuple):
    """What a pilot run found out for each datum; never changed afterwards."""

    temperatures: Tensor  # (steps + 1, batch), from 0 to 1
    step_sizes: Tensor  # (steps + 1, batch), of the moves at each temperature
    resolved: Tensor  # (batch,), whether the pilot needed no more steps


class Path:
    """The densities f_β = f₀^(1 − β) f₁^β from a proposal's f₀ to f₁ = p(x, u), and moves that leave them as they are.

    A move is Hamiltonian: `num_leapfrog` leapfrog steps with the proposal's standard deviations as the unit of length,
    then Metropolis' acceptance. For any step size that does not depend on where the chain is, it is reversible.
    """

    def __init__(self, target: Target, start: Density, num_leapfrog: int, graphs: PathGraphs | None = None) -> None:
        self.target, self.start, self.num_leapfrog = target, start, num_leapfrog
        _, self.scale = start.moments()
        self.graph = None if graphs is None else graphs.of(self._at, target.batch)

    def at(self, u: Tensor) -> State:
        """Both ends of the path at u."""
        found = None if self.graph is None or pyro.infer.util.is_validation_enabled() else self.graph(u)
        return State(u, *(self._at(u) if found is None else found))

    def _at(self, u: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            log_prior, log_end = self.target.log_parts(u)
            log_start = self.start.log_prob(u, log_prior)
            slopes = _slope(log_start, u, retain_graph=True), _slope(log_end, u)
        return (log_start.detach(), log_end.detach(), *slopes)

    def begin(self, num_chains: int) -> State:
        """Chains at draws from f₀; here every distribution checks its parameters and its data."""
        with pyro.validation_enabled(True):
            return self.at(self.start.draw(0, num_chains))

    def leapfrog(self, state: State, momentum: Tensor, beta: Tensor, step: Tensor) -> tuple[State, Tensor]:
        """The Hamiltonian flow of f_β in `num_leapfrog` steps: reversible, and it keeps volume."""

        def force(s: State) -> Tensor:
            return self.scale * ((1 - beta) * s.slope_start + beta * s.slope_end)

        new = state
        for _ in range(self.num_leapfrog):
            momentum = momentum + 0.5 * step * force(new)
            u = new.u + step * self.scale * momentum
            # The model need not see where a chain goes that has run away; its momentum has it rejected.
            new = self.at(torch.where(u.isfinite().all(-1, keepdim=True), u, state.u))
            momentum = momentum + 0.5 * step * force(new)
        return new, momentum

    def move(self, state: State, temperature: Tensor, step_size: Tensor) -> tuple[State, Tensor]:
        """One move of every chain at a temperature `(batch,)`, and the share of chains that is accepted `(batch,)`."""
        chains = len(state.u)
        # Trajectories of one length would close up on themselves in a normal posterior.
        step = (step_size.to(self.scale) * (0.5 + self.target.uniform(chains))).unsqueeze(-1)
        before = self.target.normal(chains)
        new, after = self.leapfrog(state, before, temperature.to(self.scale).unsqueeze(-1), step)

        def energy(s: State, momentum: Tensor) -> Tensor:
            log_density = (1 - temperature) * s.log_start + temperature * s.log_end
            return 0.5 * momentum.double().square().sum(-1) - log_density

        log_accept = energy(state, before) - energy(new, after)
        accepted = self.target.uniform(chains).log() < log_accept  # not where it is NaN
        state = State(
            *(
                torch.where(accepted if old.dim() == 2 else accepted.unsqueeze(-1), moved, old)
                for moved, old in zip(new, state, strict=True)
            )
        )
        return state, log_accept.exp().clamp(max=1.0).nan_to_num(0.0).mean(0)

    @pyro.validation_enabled(False)
    def pilot(self, num_steps: int) -> Schedule:
        """Temperatures that share the way evenly among `num_steps`, and step sizes, from chains that are thrown away.

        The pilot goes as far at a time as keeps the conditional effective sample size at `PILOT_CESS`; its steps are
        then divided, so that all of the schedule's cost about the same.
        """
        largest = log(3 / self.num_leapfrog)  # about half an orbit in a standard normal
        state = self.begin(PILOT_CHAINS)
        beta = torch.zeros_like(state.log_end[0])
        log_step = torch.full_like(beta, largest)

        def moved(state: State, log_step: Tensor) -> tuple[State, Tensor]:
            state, accepted = self.move(state, beta, log_step.exp())
            return state, (log_step + ADAPTATION * (accepted - ACCEPTANCE)).clamp(SMALLEST_LOG_STEP, largest)

        for _ in range(WARM_UP):
            state, log_step = moved(state, log_step)
        betas, log_steps, most = [beta], [log_step], max(num_steps, 50)
        while bool((beta < 1).any()) and len(betas) <= most:
            beta = (beta + _largest_step(state.log_ratio, 1 - beta)).clamp(max=1.0)
            if len(betas) == most:
                beta = torch.ones_like(beta)
            state, log_step = moved(state, log_step)
            betas.append(beta)
            log_steps.append(log_step)
        reached = torch.stack(betas)
        length = (reached < 1).sum(0)  # in steps of the pilot
        where = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64, device=beta.device).unsqueeze(1) * length
        below = where.long().clamp(max=len(betas) - 2)

        def between(values: Tensor) -> Tensor:
            low, high = values.gather(0, below), values.gather(0, below + 1)
            return low + (where - below) * (high - low)

        return Schedule(between(reached), between(torch.stack(log_steps)).exp(), length <= num_steps)

    @pyro.validation_enabled(False)
    def forward(self, schedule: Schedule, num_chains: int) -> tuple[Tensor, Tensor, Tensor]:
        """log weights of chains from f₀ to f₁, those before the first move, and the share of moves accepted."""
        state = self.begin(num_chains)
        first, log_w = state.log_ratio, torch.zeros_like(state.log_end)
        accepted = []
        steps = zip(schedule.temperatures.diff(dim=0), schedule.temperatures[1:], schedule.step_sizes[1:], strict=True)
        for number, (rise, temperature, step_size) in enumerate(steps, start=1):
            log_w = log_w + rise * state.log_ratio  # before the move, at the old place
            if number < len(schedule.temperatures) - 1:  # the weight would not see a last move
                state, share = self.move(state, temperature, step_size)
                accepted.append(share)
        return log_w, first, torch.stack(accepted).mean(0) if accepted else torch.ones_like(log_w[0])

    @pyro.validation_enabled(False)
    def backward(self, schedule: Schedule, u: Tensor) -> Tensor:
        """log weights of the same chains run from f₁ to f₀, starting at exact draws from the posterior."""
        state = self.at(u)
        log_w = torch.zeros_like(state.log_end)
        for number in range(len(schedule.temperatures) - 1, 0, -1):
            rise = schedule.temperatures[number] - schedule.temperatures[number - 1]
            log_w = log_w + rise * state.log_ratio
            if number > 1:
                state, _ = self.move(state, schedule.temperatures[number - 1], schedule.step_sizes[number - 1])
        return log_w


def _slope(log_density: Tensor, u: Tensor, *, retain_graph: bool = False) -> Tensor:
    if not log_density.requires_grad:  # a uniform density
        return torch.zeros_like(u)
    (slope,) = torch.autograd.grad(log_density.sum(), u, retain_graph=retain_graph, allow_unused=True)
    return torch.zeros_like(u) if slope is None else slope


def _largest_step(log_ratio: Tensor, most: Tensor) -> Tensor:
    """The rise in temperature, up to `most`, after which the conditional ESS is `PILOT_CESS`; by bisection."""
    finite = log_ratio.isfinite()
    log_ratio, count = torch.where(finite, log_ratio, 0.0), finite.sum(0)

    def keeps_enough(rise: Tensor) -> Tensor:
        lw = torch.where(finite, rise * log_ratio, -torch.inf)
        return (2 * lw.logsumexp(0) - (2 * lw).logsumexp(0)).exp() >= PILOT_CESS * count

    low, high = torch.zeros_like(most), most
    whole = keeps_enough(most) | (count == 0)
    for _ in range(40):
        middle = 0.5 * (low + high)
        enough = keeps_enough(middle)
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return torch.where(whole, most, low)
