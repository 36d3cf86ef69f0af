"""Training data of any kind as batches: tuples of arguments for both programs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from ppl_vae import processes, scoring
from ppl_vae.data import MemoryMapped
from ppl_vae.scoring import as_tuple

Batch = tuple[Any, ...]
AHEAD = 2  # batches that are read from a file before they are asked for


class Batches:
    """Data of any kind as batches: in random order when iterated, in their own order from `ordered`.

    With several processes (see `processes`) iterating gives each its share of every batch: every n-th datum, or none
    of a batch that is too short. The order is that of the first process. A `DataLoader` with a `DistributedSampler`
    gives each process batches of its own, which together are one.

    Args:
        data: tensors with one row per datum, or one `Dataset`, or one `DataLoader`, which brings its own batches.
            A `Dataset` with a method `__getitems__` (as PyTorch's loader calls it) is asked for a batch at once.
        batch_size: of all but the last batch, in all processes together.

    Raises:
        TypeError: for data of another kind, or without a length.
        ValueError: for no data, tensors of different lengths, or NaN in them; for a `DataLoader` that does not say
            which data are in a batch, when there are several processes.

    Example:
        >>> [len(x) for x, y in Batches((torch.zeros(5, 2), torch.zeros(5)), batch_size=2)]
        [2, 2, 1]
    """

    def __init__(self, data: tuple[Any, ...], batch_size: int) -> None:
        if not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
            raise ValueError(f"batch_size must be an integer of at least 1; got {batch_size!r}.")
        self.source = data[0] if len(data) == 1 else None
        if isinstance(getattr(self.source, "dataset", self.source), IterableDataset):
            raise TypeError("An IterableDataset has no length and no order; give a Dataset with both.")
        if isinstance(self.source, DataLoader):
            if self.source.batch_sampler is None and processes.world_size() > 1:
                raise ValueError(
                    "A DataLoader with batch_size=None does not say which data are in a batch, so that several "
                    "processes cannot share it. Give the DataLoader a batch_size, or pass its data set."
                )
            parts = processes.world_size() if _is_distributed(self.source) else 1
            self.size = (self.source.batch_size or 1) * parts
            self.num_data = len(self.source) * self.size
        elif isinstance(self.source, Dataset):
            self.num_data, self.size = len(self.source), batch_size  # type: ignore[arg-type]
        else:
            self.source = None
            self.data, self.num_data, self.size = data, scoring.check_data(*data), batch_size
        if self.num_data == 0:
            raise ValueError(f"There are no data: the {type(self.source).__name__} is empty.")

    def __len__(self) -> int:
        return len(self.source) if isinstance(self.source, DataLoader) else -(-self.num_data // self.size)

    def __iter__(self) -> Iterator[Batch]:
        share = slice(processes.rank(), None, processes.world_size())
        if isinstance(self.source, DataLoader):
            yield from _shares(self.source, share)
        # All the data in one batch keep their order: an autoguide has a parameter for each datum, in that order.
        elif self.num_data > self.size:
            order = processes.from_first(lambda: torch.randperm(self.num_data))
            indices = order.split(self.size)
            yield from self._each(indices if processes.world_size() == 1 else (index[share] for index in indices))
        else:
            yield self._at(torch.arange(self.num_data)[share])

    def ordered(self) -> Iterator[Batch]:
        """Whole batches, the same in every process unless a `DistributedSampler` deals them out."""
        if isinstance(self.source, DataLoader):
            yield from map(as_tuple, self.source)
        else:
            yield from self._each(torch.arange(self.num_data).split(self.size))

    def dealt(self) -> Iterator[tuple[int, Batch]]:
        """Whole batches with numbers below `len × world_size`, every one of them in one process and no other."""
        first, step = processes.rank(), processes.world_size()
        if isinstance(self.source, DataLoader) and step > 1:
            batches = (
                self.source if _is_distributed(self.source) else _loader(self.source, _plan(self.source)[first::step])
            )
            yield from ((first + step * number, as_tuple(batch)) for number, batch in enumerate(batches))
        elif isinstance(self.source, DataLoader):
            yield from enumerate(self.ordered())
        else:
            indices = torch.arange(self.num_data).split(self.size)
            yield from ((number, self._at(indices[number])) for number in range(first, len(indices), step))

    def _at(self, index: Tensor) -> Batch:
        return scoring.rows(self.data if self.source is None else (self.source,), index)

    def _each(self, indices: Iterable[Tensor]) -> Iterator[Batch]:
        """The data of each index. From a file the next are read while the caller is at work on these."""
        if not isinstance(self.source, MemoryMapped):
            yield from map(self._at, indices)
            return
        with ThreadPoolExecutor(1) as reader:
            read: deque[Future[Batch]] = deque()
            for index in indices:
                if len(read) == AHEAD:
                    yield read.popleft().result()
                read.append(reader.submit(self._at, index))
            while read:
                yield read.popleft().result()


def _is_distributed(loader: DataLoader[Any]) -> bool:
    sampler = getattr(loader.batch_sampler, "sampler", None)
    return processes.world_size() > 1 and isinstance(sampler, DistributedSampler)


def _shares(loader: DataLoader[Any], share: slice) -> Iterator[Batch]:
    """The batches of one epoch, of which this process has a share."""
    if processes.world_size() == 1:
        yield from map(as_tuple, loader)
    elif _is_distributed(loader):
        # Without this, which is easily forgotten, every epoch has the same order.
        loader.batch_sampler.sampler.set_epoch(processes.from_first(lambda: int(torch.randint(2**31, ()))))  # type: ignore[union-attr]
        yield from map(as_tuple, loader)
    else:
        plan = _plan(loader)
        # A batch of nothing cannot be loaded: of one datum, then, none of whose rows are taken.
        loaded = _loader(loader, [batch[share] or batch[:1] for batch in plan])
        for batch, rows in zip(plan, map(as_tuple, loaded), strict=True):
            yield rows if batch[share] else scoring.rows(rows, slice(0))


def _plan(loader: DataLoader[Any]) -> list[list[int]]:
    """Which data are in which batch, as the sampler of the first process has it."""
    return processes.from_first(lambda: [list(batch) for batch in loader.batch_sampler or ()])


def _loader(loader: DataLoader[Any], plan: list[list[int]]) -> DataLoader[Any]:
    """A `DataLoader` with other batches, and all else the same."""
    return DataLoader(
        loader.dataset,
        batch_sampler=plan,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        prefetch_factor=loader.prefetch_factor,
    )
