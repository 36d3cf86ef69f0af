"""log p(x) by annealed importance sampling: chains that walk from a proposal to the posterior, or back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import log
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from ppl_vae import scoring
from ppl_vae.evidence.blocks import Block, at_least_one, blocks, gathered, looked_at, root_seed, start_from
from ppl_vae.evidence.record import Evidence
from ppl_vae.evidence.stream import COLUMNS, WeightStream
from ppl_vae.proposals import Density, Guide, Proposal, checked
from ppl_vae.scoring import PROBE_DATA, Pair, Program, Target

# Rows (chains × data) that move at once.
BLOCK_ROWS = 1024
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

    def __init__(self, target: Target, start: Density, num_leapfrog: int) -> None:
        self.target, self.start, self.num_leapfrog = target, start, num_leapfrog
        _, self.scale = start.moments()

    def at(self, u: Tensor) -> State:
        """Both ends of the path at u."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            log_prior, log_end = self.target.log_parts(u)
            log_start = self.start.log_prob(u, log_prior)
            slopes = _slope(log_start, u, retain_graph=True), _slope(log_end, u)
        return State(u.detach(), log_start.detach(), log_end.detach(), *slopes)

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


@dataclass(frozen=True, eq=False, repr=False)
class AnnealedEvidence(Evidence):
    """An `Evidence` whose draws are chains.

    Attributes:
        acceptance: share of the moves that were accepted, `(N,)`.
        resolved: whether there were enough temperatures for the way from the proposal to the posterior, `(N,)`.
        num_temperatures: T, how many steps a chain took.
    """

    acceptance: Tensor
    resolved: Tensor
    num_temperatures: int

    _draws = "chains"

    @property
    def num_chains(self) -> int:
        """K, for each datum."""
        return self.num_samples

    def _smoothed(self) -> list[tuple[str, str, str]]:
        return []  # too few weights to have a tail

    def _quality(self) -> tuple[str, str, str]:
        return "moves accepted", f"{100 * self.acceptance.mean().item():.1f} %", "of all moves, mean over the data"

    def _doubts(self) -> list[str]:
        found = []
        if (bad := 1 - self.resolved.double().mean().item()) > 0:
            found.append(
                f"{self.num_temperatures} temperatures are too few for {100 * bad:.0f} % of the data: log p(x) is a "
                "lower bound that more of them will raise. Take more, or a proposal closer to the posterior."
            )
        possible = self.log_px.isfinite()
        if (stuck := (self.acceptance[possible] < 0.4).double().mean().item()) > 0.05:
            found.append(
                f"Less than 40 % of the moves were accepted for {100 * stuck:.0f} % of the data, so that their chains "
                "lag behind and log p(x) is too low. More leapfrog steps, or more temperatures, help."
            )
        if self.num_samples > 1 and (few := (self.ess[possible] < self.num_samples / 4).double().mean().item()) > 0.05:
            found.append(
                f"For {100 * few:.0f} % of the data fewer than a quarter of the {self.num_samples} chains carry the "
                "estimate. More temperatures bring their weights together."
            )
        return found


def annealed_importance_sampling(
    model: Program,
    guide: Program,
    *args: Any,
    num_chains: int = 16,
    num_temperatures: int = 100,
    num_leapfrog: int = 5,
    proposal: Proposal = Guide(),  # noqa: B008 - it holds nothing
    seed: int | None = 0,
) -> AnnealedEvidence:
    """Estimates log p(x) of each datum by annealed importance sampling (Neal, 2001).

    Each chain starts at a draw from f₀ (the proposal) and follows f_β = f₀^(1 − β) p(x, u)^β as β rises from 0 to 1,
    moving by Hamiltonian Monte Carlo in unconstrained coordinates u. Its weight w = Π_t (p(x, u_t) / f₀(u_t))^Δβ_t has
    E[w] = p(x) for *any* temperatures, step sizes and number of chains, so that log p(x) ≈ log mean w is a lower bound
    in expectation, as from importance sampling, and far tighter: with one temperature it *is* importance sampling.

    A pilot run on chains that are thrown away finds, for each datum by itself, temperatures that are equally costly (by
    the conditional effective sample size) and a step size for each. They are frozen before any chain that counts
    starts; steps that adapt to the chains they move would spoil E[w] = p(x).

    Costs `num_chains × num_temperatures × num_leapfrog` gradients of the model for each datum, and half of that again
    for the pilot. Nothing of the pair is changed, and the draws of a datum depend on the seed and on its place among
    the data alone. Of several processes (see `processes`) each scores a part of the data and gets all results, which
    are those of one process to the last bit.

    Args:
        model: p(x, z), a Pyro program whose sites all lie in one plate over the data. Latents are continuous, or
            discrete with few values, which are summed out.
        guide: q(z given x), with the same arguments.
        *args: the data, `(N, ...)`, and what else both programs take.
        num_chains: K, for each datum.
        num_temperatures: T. From a fair guide 100 will do; from the prior 1000 or more.
        num_leapfrog: L, gradients in a move.
        proposal: f₀, where chains start: one of `proposals`. `Prior()` is slow, and a check on modes of the posterior
            that the guide does not know of: see `mode_check`.
        seed: of the draws; None takes them from the global random state.

    Returns:
        An `Evidence`, per datum and in nats, of K weights; `elbo` is that of the proposal, from as few draws.

    Raises:
        ValueError: as `importance_sampling`; and for discrete latents that cannot be summed out, with their names.

    References:
        Neal, Annealed Importance Sampling, 2001. https://doi.org/10.1023/A:1008923215028
        Wu, Burda, Salakhutdinov & Grosse, On the Quantitative Analysis of Decoder-Based Generative Models, 2017.
        https://arxiv.org/abs/1611.04273
        Zhou, Johansen & Aston, Toward Automatic Model Comparison: An Adaptive Sequential Monte Carlo Approach, 2016
        (the conditional effective sample size). https://doi.org/10.1080/10618600.2015.1060885

    Example:
        >>> from ppl_vae.linear_gaussian import LinearGaussian
        >>> lg = LinearGaussian(torch.tensor([[1.0], [2.0], [0.5]]), mean=0.0, noise=0.7)
        >>> x = lg.model(num_data=5)
        >>> wrong = lg.perturbed_guide(shift=3.0, spread=0.5)       # importance sampling is lost here
        >>> evidence = annealed_importance_sampling(lg.model, wrong, x, num_temperatures=30)
        >>> bool(((evidence.log_px - lg.log_px(x)).abs() < 0.5).all())
        True
    """
    work = Work(num_chains, num_temperatures, num_leapfrog, proposal)
    scoring.check_data(*args)
    root = root_seed(seed)
    with looked_at(model, guide, *args) as pair:

        def compute(block: Block) -> Tensor:
            path, schedule = work.prepared(pair, block, root)
            start_from(root, block.start, 2)
            log_w, first, acceptance = path.forward(schedule, work.num_chains)
            return torch.stack([*work.columns(log_w, first, block), acceptance, schedule.resolved.double()])

        *columns, acceptance, resolved = gathered(len(COLUMNS) + 2, args, work.blocks(pair, args), compute)
        strategy = pair.strategy.__name__
    return AnnealedEvidence(
        **dict(zip(COLUMNS, columns, strict=True)),
        num_samples=work.num_chains,
        method=f"Annealed importance sampling from {proposal}, {work.temperatures}",
        strategy=strategy,
        acceptance=acceptance,
        resolved=resolved.bool(),
        num_temperatures=work.num_temperatures,
    )


class Work:
    """What annealing is to do, checked, and how it is cut up."""

    def __init__(self, num_chains: int, num_temperatures: int, num_leapfrog: int, proposal: Proposal) -> None:
        self.num_chains = at_least_one("num_chains", num_chains)
        self.num_temperatures = at_least_one("num_temperatures", num_temperatures)
        self.num_leapfrog = at_least_one("num_leapfrog", num_leapfrog)
        self.proposal = checked(proposal)
        self.temperatures = f"{num_temperatures} temperature{'s' if num_temperatures > 1 else ''}"

    def blocks(self, pair: Pair, args: tuple[Any, ...]) -> Iterator[Block]:
        """The data in blocks, dealt out, whose chains, for each configuration of discrete latents, are rows enough."""
        some = scoring.rows(args, slice(PROBE_DATA)) if pair.splits else args
        rows = self.num_chains * Target(pair, *some).num_configurations
        return blocks(pair, args, max(1, BLOCK_ROWS // rows), dealt=True)

    def prepared(self, pair: Pair, block: Block, root: int) -> tuple[Path, Schedule]:
        """The path of a block and its frozen schedule."""
        with pyro.validation_enabled(True):
            target = Target(pair, *block.args, width=block.width)
        start_from(root, block.start, 0)
        path = Path(target, self.proposal.fitted(target, self.num_chains), self.num_leapfrog)
        start_from(root, block.start, 1)
        return path, path.pilot(self.num_temperatures)

    def columns(self, log_w: Tensor, first: Tensor, block: Block) -> tuple[Tensor, ...]:
        """The columns of an `Evidence`, from the weights of chains and those before their first move."""
        if not (log_w < torch.inf).all():
            datum = int((~(log_w < torch.inf)).any(0).nonzero()[0])
            raise ValueError(
                f"A weight of datum {block.start + datum} is NaN or +∞: the model or the guide has no finite density "
                "where its chain is. Call importance_sampling, which names the site."
            )
        stream = WeightStream(len(log_w), log_w.shape[1], device=log_w.device)
        stream.add(log_w)
        columns = dict(zip(COLUMNS, stream.evidence(), strict=True))
        return tuple((columns | {"elbo": first.mean(0)}).values())
