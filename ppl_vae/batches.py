"""Training data of any kind as batches: tuples of arguments for both programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from ppl_vae import scoring

Batch = tuple[Any, ...]


class Batches:
    """Data of any kind as batches: in random order when iterated, in their own order from `ordered`.

    Args:
        data: tensors with one row per datum, or one `Dataset`, or one `DataLoader`, which brings its own batches.
        batch_size: of all but the last batch.

    Raises:
        TypeError: for data of another kind, or without a length.
        ValueError: for no data, tensors of different lengths, or NaN in them.

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
            self.num_data, self.size = len(self.source) * (self.source.batch_size or 1), self.source.batch_size or 1
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
        return self._over(torch.randperm)

    def ordered(self) -> Iterator[Batch]:
        return self._over(torch.arange)

    def _over(self, order: Callable[[int], Tensor]) -> Iterator[Batch]:
        if isinstance(self.source, DataLoader):
            yield from map(as_tuple, self.source)
            return
        # All the data in one batch keep their order: an autoguide has a parameter for each datum, in that order.
        indices = order(self.num_data) if self.num_data > self.size else torch.arange(self.num_data)
        for index in indices.split(self.size):
            if isinstance(self.source, TensorDataset):
                yield as_tuple(self.source[index])
            elif self.source is not None:
                yield as_tuple(torch.utils.data.default_collate([self.source[i] for i in index.tolist()]))
            else:
                yield scoring.rows(self.data, index)


def as_tuple(batch: Any) -> Batch:
    """A batch as arguments: a tuple or list of them, or a single one."""
    return tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
