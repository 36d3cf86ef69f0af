"""log p(x) by importance sampling, from the guide or from something better."""

from __future__ import annotations

import time
from collections.abc import Iterator
from math import inf
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from ppl_vae import scoring
from ppl_vae.evidence.blocks import Block, at_least_one, blocks, gathered, looked_at, root_seed, start_from
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
        columns = gathered(
            len(COLUMNS),
            args,
            blocks(pair, args, max(16, min(MOST_DATA, BLOCK_ROWS // num_samples)), dealt=True),
            lambda block: torch.stack(_block(pair, proposal, block, num_samples, root, pace)),
        )
        strategy = pair.strategy.__name__
    return Evidence(
        **dict(zip(COLUMNS, columns, strict=True)),
        num_samples=num_samples,
        method=f"Importance sampling from {proposal}",
        strategy=strategy,
    )


def _block(
    pair: Pair, proposal: Proposal, block: Block, num_samples: int, root: int, pace: _Pace
) -> tuple[Tensor, ...]:
    """The evidence of one block of data."""
    batch = len(block.args[0])
    with pyro.validation_enabled(True):
        source = (
            _Guided(pair, block) if isinstance(proposal, Guide) else _Proposed(pair, proposal, block, num_samples, root)
        )
    weights = WeightStream(num_samples, batch, device=block.args[0].device)
    at_once = max(1, BLOCK_ROWS // block.width)
    for first in range(0, num_samples, at_once):
        start_from(root, block.start, first + 1)
        source.draw(first, last := min(first + at_once, num_samples))
        for part in pace.parts(last - first, batch * source.num_configurations):
            # The first run on each datum lets every distribution check its parameters and its data.
            with pyro.validation_enabled(first == 0 and part.start == 0):
                log_w = source.log_weights(part)
            weights.add(log_w)
            if not (log_w < inf).all():
                sample, datum = (~(log_w < inf)).nonzero()[0].tolist()
                site = pair.blame(source.latents(part.start + sample), *block.args)
                raise ValueError(
                    f"A weight of datum {block.start + datum} is NaN or +∞: {site} has no finite density there. Its "
                    "parameters have overflowed, or the model has not been trained far enough to be scored."
                )
    return weights.evidence()


class _Guided:
    """Draws of all latents from the guide, discrete ones among them, with the densities they were drawn with."""

    num_configurations = 1

    def __init__(self, pair: Pair, block: Block) -> None:
        self.pair, self.args, self.wide = pair, block.args, block.wide()
        self.axis = 1 + pair.layout.nesting + pair.layout.dim
        self.encoded = pair.encode(*self.wide)

    def draw(self, start: int, stop: int) -> None:
        z, log_q = self.pair.draw(self.encoded, *self.wide, num_samples=stop - start)
        batch = len(self.args[0])
        self.z = {name: value.narrow(self.axis, 0, batch) for name, value in z.items()}
        self.log_q = log_q[:, :batch]

    def log_weights(self, part: slice) -> Tensor:
        some = {name: value[part] for name, value in self.z.items()}
        return self.pair.log_joint(some, *self.args, num_samples=part.stop - part.start) - self.log_q[part]

    def latents(self, sample: int) -> Values:
        return {name: value[sample : sample + 1] for name, value in self.z.items()}


class _Proposed:
    """Draws of the continuous latents from a proposal, in unconstrained coordinates; discrete ones are summed out."""

    def __init__(self, pair: Pair, proposal: Proposal, block: Block, num_samples: int, root: int) -> None:
        self.target = Target(pair, *block.args, width=block.width)
        self.num_configurations = self.target.num_configurations
        start_from(root, block.start, 0)
        self.density = proposal.fitted(self.target, num_samples)

    def draw(self, start: int, stop: int) -> None:
        self.u = self.density.draw(start, stop)

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
