"""Levels made continuous by uniform noise that is drawn anew each time."""

from __future__ import annotations

from torch import Tensor
from torch.utils.data import TensorDataset

from ppl_vae.data.scale import Dequantized, Levels


class DynamicDequantization(TensorDataset):
    """Levels with uniform noise drawn anew each time they are seen: (level + u) / L, or its logit.

    The draws come from torch's global generator, so that the seed of the training run rules them. `dataset[index]` is a
    tuple of one tensor, as of any `TensorDataset`, for an integer, a slice or a whole tensor of indices;
    `torch.utils.data.DataLoader` takes it as it is. The levels are `dataset.tensors[0]`.

    Source: Theis, van den Oord and Bethge (2016), https://arxiv.org/abs/1511.01844.

    Args:
        levels: `(N, ...)` floating point, whole numbers from 0 to L - 1.
        scale: `Dequantized(L)`, or `Logit(L, margin)`.

    Raises:
        TypeError: The levels are not floating point.
        ValueError: A value is none of these levels.

    Example:
        >>> import torch
        >>> dataset = DynamicDequantization(torch.tensor([[0.0, 255.0], [7.0, 8.0]]), Dequantized(256))
        >>> (v,) = dataset[torch.tensor([1, 0])]
        >>> (v * 256).floor()
        tensor([[  7.,   8.],
                [  0., 255.]])
    """

    def __init__(self, levels: Tensor, scale: Dequantized) -> None:
        Levels(scale.levels).check(levels)
        super().__init__(levels)
        self.scale = scale

    def __getitem__(self, index: int | slice | Tensor) -> tuple[Tensor, ...]:
        return tuple(self.scale.draw(levels[index]) for levels in self.tensors)
