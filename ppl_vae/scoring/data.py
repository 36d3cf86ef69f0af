"""Arguments of a pair: which of them have one row per datum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset, default_collate


def check_data(*args: Any) -> int:
    """The number of data, after checking that there are some, one row for each in every tensor, and all finite.

    Tensors without dimensions and arguments of other types say nothing of single data and pass unchecked.

    Raises:
        TypeError: when the first argument is not a tensor.
        ValueError: for no data, tensors of different lengths, or NaN or infinite values.

    Example:
        >>> check_data(torch.zeros(5, 2), torch.arange(5), 0.5)
        5
    """
    if not args or not isinstance(args[0], Tensor):
        got = type(args[0]).__name__ if args else "nothing: the data come after both the model and the guide"
        raise TypeError(f"The data must be a tensor with one row per datum; got {got}.")
    x = args[0]
    if x.numel() == 0 or x.dim() == 0:
        raise ValueError(f"There are no data: expected one row per datum; got a tensor of shape {tuple(x.shape)}.")
    for position, argument in enumerate(args, start=1):
        if not is_per_datum(argument):
            continue
        if len(argument) != len(x):
            raise ValueError(
                f"Every tensor must have one row per datum; argument {position} of the programs has {len(argument)} "
                f"rows, the first has {len(x)}. What all data share belongs into the programs themselves."
            )
        # Part by part: a mask of all the data would be as large as they are.
        finite = torch.cat([torch.isfinite(part).reshape(len(part), -1).all(1) for part in argument.split(1024)])
        if not finite.all():
            first = int((~finite).nonzero()[0])
            raise ValueError(
                f"The data must be finite; {int((~finite).sum())} of {len(x)} data hold NaN or infinite values, datum "
                f"{first} the first. Fill missing values first: NaN spreads to every weight it meets."
            )
    return len(x)


def is_dataset(args: tuple[Any, ...]) -> bool:
    """Whether the data are one `Dataset`, whose rows become the arguments when they are asked for."""
    return len(args) == 1 and isinstance(args[0], Dataset) and not isinstance(args[0], IterableDataset)


def rows(args: tuple[Any, ...], index: slice | Tensor) -> tuple[Any, ...]:
    """The data `index` of every tensor with rows, or of a `Dataset`; other arguments as they are.

    Example:
        >>> rows((torch.arange(3.0), torch.ones(3, 2), 0.5), slice(1))
        (tensor([0.]), tensor([[1., 1.]]), 0.5)
    """
    if not is_dataset(args):
        return tuple(_taken(a, index) if is_per_datum(a) else a for a in args)
    (dataset,) = args
    if isinstance(dataset, TensorDataset):
        return dataset[index]
    places = list(range(len(dataset))[index]) if isinstance(index, slice) else index.tolist()
    if not places:
        return rows(as_tuple(default_collate([dataset[0]])), slice(0))
    at_once = getattr(dataset, "__getitems__", None) or (lambda places: [dataset[place] for place in places])
    return as_tuple(default_collate(at_once(places)))


def _taken(x: Tensor, index: slice | Tensor) -> Tensor:
    return x[index] if isinstance(index, slice) else x.index_select(0, index.to(x.device))  # faster than x[index]


def as_tuple(batch: Any) -> tuple[Any, ...]:
    """A batch as arguments: a tuple or list of them, or a single one."""
    return tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)


def widened(args: tuple[Any, ...], width: int) -> tuple[Any, ...]:
    """The data with the last of them repeated until there are `width`.

    Example:
        >>> widened((torch.tensor([1.0, 2.0]), 0.5), 4)
        (tensor([1., 2., 2., 2.]), 0.5)
    """
    index = torch.arange(width, device=args[0].device).clamp(max=len(args[0]) - 1)
    return rows(args, index) if width > len(args[0]) else args


def is_per_datum(argument: Any) -> bool:
    """Whether an argument has a row for each datum: every tensor of one or more dimensions does."""
    return isinstance(argument, Tensor) and argument.dim() > 0
