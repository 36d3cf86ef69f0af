"""log p(x) by annealed importance sampling: chains that walk from a proposal to the posterior, or back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from ppl_vae import scoring
from ppl_vae.evidence.blocks import Block, at_least_one, blocks, gathered, looked_at, root_seed, start_from
from ppl_vae.evidence.graphs import PathGraphs
from ppl_vae.evidence.path import Path, Schedule
from ppl_vae.evidence.record import Evidence
from ppl_vae.evidence.stream import COLUMNS, WeightStream
from ppl_vae.proposals import Guide, Proposal, checked
from ppl_vae.scoring import PROBE_DATA, Pair, Program, Target

# Rows (chains × data) that move at once.
BLOCK_ROWS = 1024


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
    compile: bool = False,
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
        compile: record the gradients along the path to a graph and compile it, which takes some seconds at first. The
            result is that of an eager run with the same seed, to rounding, which chains amplify as they go. What cannot
            be compiled runs eagerly, with a warning that says why.

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
    work = Work(num_chains, num_temperatures, num_leapfrog, proposal, compile=compile)
    scoring.check_data(*args)
    root = root_seed(seed)
    with looked_at(model, guide, *args) as pair:

        def compute(block: Block) -> Tensor:
            path, schedule = work.prepared(pair, block, root)
            start_from(root, block.start, 2)
            log_w, first, acceptance = path.forward(schedule, work.num_chains)
            return torch.stack([*work.columns(log_w, first, block), acceptance, schedule.resolved.double()])

        *columns, acceptance, resolved = gathered(len(COLUMNS) + 2, args, work.blocks(pair, args), compute)
    return AnnealedEvidence(
        **dict(zip(COLUMNS, columns, strict=True)),
        num_samples=work.num_chains,
        method=f"Annealed importance sampling from {proposal}, {work.temperatures}",
        strategy=pair.strategy.__name__,
        acceptance=acceptance,
        resolved=resolved.bool(),
        num_temperatures=work.num_temperatures,
        rounded_to=pair.rounded_to,
    )


class Work:
    """What annealing is to do, checked, and how it is cut up."""

    def __init__(
        self, num_chains: int, num_temperatures: int, num_leapfrog: int, proposal: Proposal, *, compile: bool = False
    ) -> None:
        self.num_chains = at_least_one("num_chains", num_chains)
        self.num_temperatures = at_least_one("num_temperatures", num_temperatures)
        self.num_leapfrog = at_least_one("num_leapfrog", num_leapfrog)
        self.proposal = checked(proposal)
        self.graphs = PathGraphs() if compile else None
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
        path = Path(target, self.proposal.fitted(target, self.num_chains), self.num_leapfrog, self.graphs)
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
