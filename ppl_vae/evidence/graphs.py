"""Drawing from the guide, scoring what was drawn, and the gradients along a path, as compiled graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppl_vae.proposals import Guide, Proposal
from ppl_vae.scoring import Pair, Values

if TYPE_CHECKING:
    from ppl_vae.compiling import Compiled, Outputs

# Samples × data that a graph scores in one run: what a decoder makes of so many fits a processor's cache.
ROWS = 512


class Graphs:
    """Drawing and scoring, for blocks of one width; None where draws or weights have to be found eagerly.

    Args:
        pair: that was looked at.
        proposal: only the guide has a graph that is the same for all data.
        max_rows: in one run.
    """

    def __init__(self, pair: Pair, proposal: Proposal, max_rows: int | None) -> None:
        self.pair, self.rows = pair, max_rows or ROWS
        self.programs = pair.model, pair.guide
        self.scoring = _compiled(self._log_weights, what="scoring", programs=self.programs)
        self.drawing: dict[int, Compiled] = {}
        self.names: list[str] = []
        self.others: tuple[Any, ...] = ()
        if not isinstance(proposal, Guide):
            self.scoring.give_up(f"{proposal} is fitted to each block of data")
        elif pair.layout.most_rows != inf:
            self.scoring.give_up("its plate draws a subsample of the data by itself")

    def draw(self, wide: tuple[Any, ...], num_samples: int) -> tuple[Values, Tensor] | None:
        """Latents in canonical form and their log q, as `Pair.draw`."""
        if self.scoring.cause is not None or any(graph.cause is not None for graph in self.drawing.values()):
            return None
        self.others = wide
        draw = _compiled(partial(self._draw, num_samples), what="drawing", programs=self.programs)
        graph = self.drawing.setdefault(num_samples, draw)
        found = graph(*_tensors(wide))
        if found is None:
            return None
        *values, log_q = found
        return dict(zip(self.names, values, strict=True)), log_q

    def log_weights(self, wide: tuple[Any, ...], z: Values, log_q: Tensor) -> Tensor | None:
        """log p(x, z) − log q(z given x) for all of the block's width."""
        self.names, self.others = list(z), wide
        found = self.scoring(*z.values(), log_q, *_tensors(wide))
        return None if found is None else found[0]

    def parts(self, num_samples: int, width: int) -> Iterator[slice]:
        """Slices of one length that cover `num_samples`, where there is such a length; else the last is shorter."""
        most = max(1, self.rows // width)
        length = next((n for n in range(most, most // 2, -1) if num_samples % n == 0), most)
        return (slice(start, min(start + length, num_samples)) for start in range(0, num_samples, length))

    def _draw(self, num_samples: int, *tensors: Tensor) -> Outputs:
        args = self._args(tensors)
        with _Still(args[0].device):
            encoded = self.pair.encode(*args)
        z, log_q = self.pair.draw(encoded, *args, num_samples=num_samples)
        self.names = list(z)
        return (*z.values(), log_q)

    def _log_weights(self, *tensors: Tensor) -> Outputs:
        z = dict(zip(self.names, tensors, strict=False))
        log_q, *data = tensors[len(z) :]
        log_joint = self.pair.log_joint(z, *self._args(tuple(data)), num_samples=len(log_q))
        return (log_joint - log_q,)

    def _args(self, tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
        """The programs' arguments, with these tensors in the places of theirs."""
        given = iter(tensors)
        return tuple(next(given) if isinstance(other, Tensor) else other for other in self.others)


class PathGraphs:
    """The ends of a path and their slopes, for the blocks of one call.

    A block's graph holds its data, so each block is recorded; compiled and verified is the first, which all that comes
    after has in common. A last block that is shorter runs eagerly, as it would not be worth a graph of its own.
    """

    def __init__(self) -> None:
        self.batch: int | None = None
        self.stopped = False
        self.verified: set[int] = set()

    def of(self, at: Callable[[Tensor], Outputs], batch: int) -> Callable[[Tensor], Outputs | None] | None:
        """`at` as a graph for each number of chains, which returns None where it has to run eagerly."""
        self.batch = self.batch or batch
        if self.stopped or batch != self.batch:
            return None
        graphs: dict[int, Compiled] = {}

        def run(u: Tensor) -> Outputs | None:
            if self.stopped:
                return None
            if len(u) not in graphs:
                graphs[len(u)] = _compiled(at, what="annealing", verified=len(u) in self.verified)
            graph = graphs[len(u)]
            found = graph(u)
            self.verified.add(len(u))
            self.stopped = graph.cause is not None
            return found

        return run


def _compiled(function: Callable[..., Outputs], **options: Any) -> Compiled:
    from ppl_vae.compiling import Compiled  # here: PyTorch's compiler takes a second to import

    return Compiled(function, **options)


class _Still(Messenger):
    """Lets the guide say what it has to say of the data without a draw, which nobody wants, and which takes numbers."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is None and not site_is_subsample(msg):
            msg["value"] = torch.zeros(msg["fn"].shape(), device=self.device)


def _tensors(args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    return tuple(a for a in args if isinstance(a, Tensor))
