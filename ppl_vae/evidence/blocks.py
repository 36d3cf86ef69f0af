"""Scoring data block by block, with draws that depend on the seed and on a datum's place, and on nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from ppl_vae import isolation, precision, processes, scoring
from ppl_vae.scoring import PROBE_DATA, Pair, Program


@contextmanager
def looked_at(model: Program, guide: Program, *args: Any) -> Iterator[Pair]:
    """The pair, ready to be scored by `precision.fast_and_exact` products, and `untouched` afterwards.

    Of a `Dataset` it looks at the first rows only.
    """
    whole = not scoring.is_dataset(args)
    with untouched(model, guide), precision.fast_and_exact(), _in_words():
        pair = Pair(model, guide, *(args if whole else scoring.rows(args, slice(2 * PROBE_DATA))))
        if not (whole or pair.splits):
            raise ValueError(
                "The pair runs on all its data at once or not at all, and a data set is scored block by block. Give "
                "the data as tensors."
            )
        yield pair


@contextmanager
def untouched(model: Program, guide: Program) -> Iterator[None]:
    """What running the programs does to modules, parameter store and random state is undone."""
    store = pyro.get_param_store()
    with isolation.evaluation(model, guide, seed=0), store.scope(store.get_state()):
        yield


@dataclass(frozen=True)
class Block:
    """Some of the data.

    Attributes:
        start: index of the first.
        args: the data, and what else the programs take.
        width: for how many data random numbers are drawn: every block's the same, so that the first datum has the same
            draws alone and among many.
    """

    start: int
    args: tuple[Any, ...]
    width: int

    def wide(self) -> tuple[Any, ...]:
        """The data, the last of them repeated up to the full width."""
        return scoring.widened(self.args, self.width)


def blocks(pair: Pair, args: tuple[Any, ...], size: int, *, dealt: bool = False) -> Iterator[Block]:
    """The data in blocks of `size`; as one for a pair that runs on all its data or not at all.

    When `dealt`, of several processes each gets every n-th block, and reads no other data.
    """
    num_data = len(args[0])
    first, step = (processes.rank(), processes.world_size()) if dealt else (0, 1)
    if not pair.splits:
        if first == 0:
            yield Block(0, args, num_data)
        return
    for start in range(first * size, num_data, step * size):
        some = scoring.rows(args, slice(start, start + size))
        if scoring.is_dataset(args):
            scoring.check_data(*some)
        yield Block(start, some, int(min(size, pair.layout.most_rows)))


def gathered(
    num_columns: int, args: tuple[Any, ...], parts: Iterator[Block], compute: Callable[[Block], Tensor]
) -> Tensor:
    """What is computed of the blocks dealt out, `(num_columns, its data)`, as float64 `(num_columns, all data)`.

    All of several processes get all: nothing is padded, and only one process adds to a column, so that the result is
    that of one process to the last bit.
    """
    # Made beforehand: small results kept between large temporaries would hold on to the memory of those.
    with processes.summing(num_columns, len(args[0]), device=scoring.rows(args, slice(1))[0].device) as total:
        for block in parts:
            total[:, block.start : block.start + len(block.args[0])] = compute(block)
    return total


def root_seed(seed: int | None) -> int:
    """Any integer as one of 64 bits; None takes one from the global random state."""
    return (processes.from_first(lambda: int(torch.randint(2**62, ()))) if seed is None else seed) % 2**64


def seed_of(root: int, *what: int) -> int:
    """A seed of its own for `what` is drawn, such as a block and a step; different roots have no seeds in common."""
    return int(np.random.SeedSequence((root, *what)).generate_state(1, np.uint64)[0] >> 1)


def start_from(root: int, *what: int) -> None:
    """Starts torch's random numbers from the seed of `what` is drawn."""
    torch.manual_seed(seed_of(root, *what))


def at_least_one(name: str, value: Any) -> int:
    """Refuses what is no count.

    Example:
        >>> at_least_one("num_samples", 3)
        3
    """
    if not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1; got {value!r}.")
    return int(value)


@contextmanager
def _in_words() -> Iterator[None]:
    """Says of parameters that a distribution refuses what it means for the model."""
    try:
        yield
    except ValueError as error:
        if "Expected parameter" not in str(error):
            raise
        what = str(error).split(", but found")[0]
        raise ValueError(
            f"A distribution of the pair got parameters that it cannot have ({what}). Its networks hold NaN, or a "
            "scale is not positive: the model cannot be scored as it is."
        ) from error
