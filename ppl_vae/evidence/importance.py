"""log p(x) by importance sampling, from the guide or from something better."""

from __future__ import annotations

import time
from collections.abc import Iterator
from math import inf
from typing import Any

import numpy as np
import pyro
import pyro.infer.util
import torch
from torch import Tensor

from ppl_vae import scoring
from ppl_vae.evidence.blocks import Block, at_least_one, blocks, gathered, looked_at, root_seed, start_from
from ppl_vae.evidence.graphs import Graphs
from ppl_vae.evidence.record import Evidence
from ppl_vae.evidence.stream import COLUMNS, WeightStream
from ppl_vae.proposals import Guide, Proposal, checked
from ppl_vae.scoring import Pair, Program, Target, Values

# Random numbers are drawn for a block of data and samples at a time. The blocks' sizes depend on nothing but
# `num_samples`, so that a seed gives the same draws however the scoring of them is cut up. A block that lacks data
# still draws for all of its width, so that it should not be wide.
BLOCK_ROWS = 2**14
MOST_DATA = 128
# How many rows (samples × data) the model may score in one run: the fastest is found out during the first runs. Beyond
# a thousand nothing is won on a processor, whose caches the decoder's output no longer fits.
CANDIDATE_ROWS = (128, 512, 1024)


def importance_sampling(
    model: Program,
    guide: Program,
    *args: Any,
    num_samples: int = 1000,
    proposal: Proposal = Guide(),  # noqa: B008 - it holds nothing
    seed: int | None = 0,
    max_rows: int | None = None,
    compile: bool = False,
) -> Evidence:
    """Estimates log p(x) of each datum by importance sampling, from the guide unless another proposal is given.

    log p(x) ≈ log (1/K) Σ_k w_k with w_k = p(x, z_k) / q(z_k given x) and z_k ~ q: a lower bound in expectation that
    rises to log p(x) with K (Burda et al., 2016), for any q that is fixed before the draws are made. Weights are added
    up in float64 and streamed, so that memory depends neither on the number of samples nor on the number of data; the
    guide runs once per datum, unless it draws one latent given another.

    Nothing of the pair is changed: modules are put in evaluation mode and back, gradients are off, the global random
    state and Pyro's parameter store are restored. The draws of a datum depend on the seed and on its place among the
    data, and on nothing else: not on the data beside it, nor on `max_rows`. (Where torch draws by rejection, as from a
    Gamma, they depend on those data too.)

    Of several processes (see `processes`) each scores a part of the data and gets all results, which do not depend on
    how many there are: to rounding, or to the last bit when `max_rows` is given, because otherwise timing decides how
    sums are cut.

    Inside `torch.autocast` products of matrices are rounded as it says, and so is log p(x), by more than its standard
    error knows of: `rounded_to` says so, and so does the summary.

    Args:
        model: p(x, z), a Pyro program whose sites all lie in one plate over the data: a module, a bound method or a
            function.
        guide: q(z given x), with the same arguments.
        *args: the data, `(N, ...)`, and what else both programs take; or one `Dataset`, such as a `data.MemoryMapped`,
            which is read block by block.
        num_samples: K, draws of z for each datum.
        proposal: what z is drawn from, one of `proposals`: `Guide()`, `Widened()`, `StudentT()`, `Defensive()`,
            `Local()`, or `Prior()`. All but the guide draw in unconstrained coordinates, with discrete latents
            summed out.
        seed: of the draws; None takes them from the global random state.
        max_rows: how many rows (samples × data × configurations of discrete latents that are summed out) the model
            scores in one run; the fastest of a few is found by timing when None.
        compile: record drawing from the guide and scoring to two graphs and compile them, which takes some seconds at
            first. The result is that of an eager run with the same seed, to rounding. What cannot be compiled, as a
            proposal that is fitted to each datum, runs eagerly, with a warning that says why.

    Returns:
        An `Evidence`: per datum log_px, standard_error, ess, pareto_k, elbo and more, and their means over the data.

    Raises:
        TypeError: when the data are neither a tensor nor a `Dataset`.
        ValueError: for no data, NaN in them, or tensors of different lengths; for a pair with no log weight per datum
            (a latent outside the plate, a guide without density, a scaled site, names that differ, a datum whose
            density depends on its batch, ...); for weights that are NaN or +∞; with the site's name.

    References:
        Burda, Grosse & Salakhutdinov, Importance Weighted Autoencoders, 2016. https://arxiv.org/abs/1509.00519
        Vehtari et al., Pareto Smoothed Importance Sampling, 2024. https://jmlr.org/papers/v25/19-556.html

    Example:
        >>> from ppl_vae.linear_gaussian import LinearGaussian
        >>> lg = LinearGaussian(torch.tensor([[1.0], [2.0], [0.5]]), mean=0.0, noise=0.7)
        >>> x = lg.model(num_data=200)
        >>> evidence = importance_sampling(lg.model, lg.perturbed_guide(), x, num_samples=2000)
        >>> bool(((evidence.log_px - lg.log_px(x)).abs() < 4.5 * evidence.standard_error).all())
        True
    """
    num_samples = at_least_one("num_samples", num_samples)
    pace, proposal = _Pace(max_rows), checked(proposal)
    if not scoring.is_dataset(args):  # whose rows are checked as they are read
        scoring.check_data(*args)
    root = root_seed(seed)
    with looked_at(model, guide, *args) as pair:
        graphs = Graphs(pair, proposal, max_rows) if compile else None
        columns = gathered(
            len(COLUMNS),
            args,
            blocks(pair, args, max(16, min(MOST_DATA, BLOCK_ROWS // num_samples)), dealt=True),
            lambda block: torch.stack(_block(pair, proposal, block, num_samples, root, pace, graphs)),
        )
    return Evidence(
        **dict(zip(COLUMNS, columns, strict=True)),
        num_samples=num_samples,
        method=f"Importance sampling from {proposal}",
        strategy=pair.strategy.__name__,
        rounded_to=pair.rounded_to,
    )


def _block(
    pair: Pair, proposal: Proposal, block: Block, num_samples: int, root: int, pace: _Pace, graphs: Graphs | None
) -> tuple[Tensor, ...]:
    """The evidence of one block of data."""
    batch = len(block.args[0])
    with pyro.validation_enabled(True):
        source: _Guided | _Proposed = (
            _Guided(pair, block, graphs)
            if isinstance(proposal, Guide)
            else _Proposed(pair, proposal, block, num_samples, root)
        )
    weights = WeightStream(num_samples, batch, device=block.args[0].device)
    at_once = max(1, BLOCK_ROWS // block.width)
    for first in range(0, num_samples, at_once):
        start_from(root, block.start, first + 1)
        source.draw(first, last := min(first + at_once, num_samples))
        scored = []
        for part in source.parts(last - first, pace):
            # The first run on each datum lets every distribution check its parameters and its data.
            with pyro.validation_enabled(first == 0 and part.start == 0):
                scored.append(source.log_weights(part))
        log_w = torch.cat(scored)
        if not (log_w < inf).all():
            sample, datum = (~(log_w < inf)).nonzero()[0].tolist()
            site = pair.blame(source.latents(sample), *block.args)
            raise ValueError(
                f"A weight of datum {block.start + datum} is NaN or +∞: {site} has no finite density there. Its "
                "parameters have overflowed, or the model has not been trained far enough to be scored."
            )
        weights.add(log_w)
    return weights.evidence()


class _Guided:
    """Draws of all latents from the guide, discrete ones among them, with the densities they were drawn with.

    Draws are as many as the block is wide; scored are those of its data, or all where a graph wants one shape.
    """

    def __init__(self, pair: Pair, block: Block, graphs: Graphs | None) -> None:
        self.pair, self.args, self.wide, self.graphs = pair, block.args, block.wide(), graphs
        self.axis = 1 + pair.layout.nesting + pair.layout.dim
        self.encoded = pair.encode(*self.wide)  # eagerly, so that the guide's distributions check their parameters

    def draw(self, start: int, stop: int) -> None:
        drawn = self.graphs.draw(self.wide, stop - start) if self.graphs else None
        self.z, self.log_q = drawn or self._drawn(stop - start)

    def _drawn(self, num_samples: int) -> tuple[Values, Tensor]:
        return self.pair.draw(self.encoded, *self.wide, num_samples=num_samples)

    def parts(self, num_samples: int, pace: _Pace) -> Iterator[slice]:
        if self.graphs is None or self.graphs.scoring.cause is not None:
            return pace.parts(num_samples, len(self.args[0]))
        return self.graphs.parts(num_samples, len(self.wide[0]))

    def log_weights(self, part: slice) -> Tensor:
        if self.graphs is not None:
            if pyro.infer.util.is_validation_enabled():
                self._log_joint(slice(part.start, part.start + 1))  # one sample of each datum shows what is refused
            found = self.graphs.log_weights(self.wide, self._some(part), self.log_q[part])
            if found is not None:
                return found[:, : len(self.args[0])]
        return self._log_joint(part) - self.log_q[part, : len(self.args[0])]

    def _log_joint(self, part: slice) -> Tensor:
        return self.pair.log_joint(self.latents_of(part), *self.args, num_samples=part.stop - part.start)

    def _some(self, part: slice) -> Values:
        return {name: value[part] for name, value in self.z.items()}

    def latents_of(self, part: slice) -> Values:
        return {name: z.narrow(self.axis, 0, len(self.args[0])) for name, z in self._some(part).items()}

    def latents(self, sample: int) -> Values:
        return self.latents_of(slice(sample, sample + 1))


class _Proposed:
    """Draws of the continuous latents from a proposal, in unconstrained coordinates; discrete ones are summed out."""

    def __init__(self, pair: Pair, proposal: Proposal, block: Block, num_samples: int, root: int) -> None:
        self.target = Target(pair, *block.args, width=block.width)
        self.num_configurations = self.target.num_configurations
        start_from(root, block.start, 0)
        self.density = proposal.fitted(self.target, num_samples)

    def draw(self, start: int, stop: int) -> None:
        self.u = self.density.draw(start, stop)

    def parts(self, num_samples: int, pace: _Pace) -> Iterator[slice]:
        return pace.parts(num_samples, len(self.target.args[0]) * self.num_configurations)

    def log_weights(self, part: slice) -> Tensor:
        log_prior, log_joint = self.target.log_parts(self.u[part])
        return log_joint - self.density.log_prob(self.u[part], log_prior)

    def latents(self, sample: int) -> Values:
        return self.target.latents(self.u[sample : sample + 1])


class _Pace:
    """Cuts samples into runs of the number of rows that scores most rows a second, found by timing the first runs."""

    def __init__(self, max_rows: int | None) -> None:
        if max_rows is not None and not (isinstance(max_rows, (int, np.integer)) and max_rows >= 1):
            raise ValueError(f"max_rows must be an integer of at least 1; got {max_rows!r}.")
        self.rows = max_rows
        # Each size twice: the first run of any size pays for memory not yet allocated.
        self.trials = [] if max_rows else [*CANDIDATE_ROWS, *CANDIDATE_ROWS]
        self.seconds_per_row: dict[int, float] = {}

    def parts(self, num_samples: int, batch: int) -> Iterator[slice]:
        """Slices that cover `num_samples`; the caller scores each before it asks for the next."""
        start = 0
        while start < num_samples:
            rows = self.trials[0] if self.trials else self._fastest()
            part = slice(start, min(num_samples, start + max(1, rows // batch)))
            if not self.trials:
                yield part
            else:
                began = _now()
                yield part
                seconds = (_now() - began) / ((part.stop - part.start) * batch)
                self.seconds_per_row[rows] = min(seconds, self.seconds_per_row.get(rows, inf))
                del self.trials[0]
            start = part.stop

    def _fastest(self) -> int:
        return self.rows or min(self.seconds_per_row, key=self.seconds_per_row.__getitem__)


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
