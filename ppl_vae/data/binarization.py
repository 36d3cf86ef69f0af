"""Zeros and ones from grey values: drawn once, drawn anew each time, or cut at a threshold."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import TensorDataset


def binarize(images: Tensor, *, seed: int = 0) -> Tensor:
    """One fixed Bernoulli draw per value, with the value as probability, by a generator of its own.

    Source: Salakhutdinov and Murray (2008), "On the quantitative analysis of deep belief networks".

    Args:
        images: Floating point of any shape, values in [0, 1].
        seed: The same seed gives the same bits, on every device.

    Returns:
        Zeros and ones of the shape and type of `images`.

    Raises:
        TypeError: The images are not floating point.
        ValueError: A value lies outside [0, 1].

    Example:
        >>> binarize(torch.tensor([0.0, 1.0, 1.0]))
        tensor([0., 1., 1.])
    """
    return draw(images, torch.Generator().manual_seed(seed))


def threshold(images: Tensor, *, at: float = 0.5) -> Tensor:
    """1 where a value exceeds `at`, else 0.

    Args:
        images: Floating point of any shape, values in [0, 1].
        at: In [0, 1).

    Returns:
        Zeros and ones of the shape and type of `images`.

    Raises:
        TypeError: The images are not floating point.
        ValueError: A value lies outside [0, 1], or `at` outside [0, 1).

    Example:
        >>> threshold(torch.tensor([0.2, 0.5, 0.7]))
        tensor([0., 0., 1.])
    """
    if not 0 <= at < 1:
        raise ValueError(f"Expected a threshold in [0, 1), got {at}. Any other makes all pixels equal.")
    _check_probabilities(images)
    return (images > at).to(images.dtype)


class DynamicBinarization(TensorDataset):
    """Images binarised anew each time they are seen: 1 with the pixel's own grey value as probability.

    Source: Burda, Grosse and Salakhutdinov (2016), https://arxiv.org/abs/1509.00519. The draws come from
    torch's global generator, so that the seed of the training run rules them. `dataset[index]` is a tuple of
    one tensor, as of any `TensorDataset`, for an integer, a slice or a whole tensor of indices;
    `torch.utils.data.DataLoader` takes it as it is. The grey images are `dataset.tensors[0]`.

    Args:
        images: `(N, ...)` floating point, values in [0, 1].

    Raises:
        TypeError: The images are not floating point.
        ValueError: A value lies outside [0, 1].

    Example:
        >>> dataset = DynamicBinarization(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        >>> dataset[torch.tensor([1, 0])]
        (tensor([[1., 0.], [0., 1.]]),)
    """

    def __init__(self, images: Tensor) -> None:
        _check_probabilities(images)
        super().__init__(images)

    def __getitem__(self, index: int | slice | Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.bernoulli(images[index]) for images in self.tensors)


def draw(images: Tensor, generator: torch.Generator) -> Tensor:
    """A Bernoulli draw per value by a generator on the CPU; raises as `binarize` does."""
    _check_probabilities(images)
    uniform = torch.rand(images.shape, generator=generator, dtype=images.dtype)
    return (uniform.to(images.device) < images).to(images.dtype)


def _check_probabilities(images: Tensor) -> None:
    if not images.is_floating_point():
        raise TypeError(
            f"Expected floating point values in [0, 1], got {images.dtype}. Divide the levels by the largest."
        )
    if not ((images >= 0) & (images <= 1)).all():
        raise ValueError(
            "Expected values in [0, 1], which binarising takes for probabilities, but they go from "
            f"{images.min():g} to {images.max():g}. Scale the data first."
        )
