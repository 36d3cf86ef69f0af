"""Networks: tensors to tensors, any number of leading dimensions, no probability."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import pyro
from torch import Tensor, nn


def over_leading(module: nn.Module, x: Tensor, event_dim: int) -> Tensor:
    """Applies `module` to `x` with all but the last `event_dim` dimensions flattened into one, then restored.

    Convolutions and batch normalisation take exactly one leading dimension, while a vectorised Pyro program
    hands a decoder `(num_samples, batch, latent_dim)`.

    Args:
        module: takes `(rows, *event)` and gives `(rows, *out)`.
        x: `(*leading, *event)`.
        event_dim: how many of the last dimensions belong to one datum.

    Returns:
        `(*leading, *out)`.

    Example:
        >>> import torch
        >>> over_leading(nn.Conv2d(1, 4, 3), torch.zeros(5, 2, 1, 8, 8), event_dim=3).shape
        torch.Size([5, 2, 4, 6, 6])
    """
    leading = x.shape[: x.dim() - event_dim]
    rows = module(x.reshape(-1, *x.shape[x.dim() - event_dim :]))
    return rows.reshape(*leading, *rows.shape[1:])


def register(name: str, module: nn.Module) -> None:
    """Makes the trainable parameters of `module` known to Pyro under `name`, whatever the store held there before.

    `pyro.module` hands back the tensors of an *earlier* module of the same name and trains those, in silence; a
    notebook cell run twice would train nothing. Here the module that runs is the module that trains.

    Example:
        >>> first, second = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> register("decoder", first)
        >>> register("decoder", second)
        >>> pyro.param("decoder$$$weight") is second.weight
        True
        >>> pyro.clear_param_store()
    """
    store = pyro.get_param_store()
    for key, parameter in module.named_parameters():
        if parameter.requires_grad:
            full_name = f"{name}$$${key}"
            if full_name in store and store[full_name] is not parameter:
                del store[full_name]
            pyro.param(full_name, parameter)


def as_shape(name: str, value: int | Sequence[int]) -> tuple[int, ...]:
    """`value` as a tuple of sizes, each at least 1.

    Raises:
        ValueError: for none, or for anything else; the sentence says `name`.
    """
    shape = (value,) if isinstance(value, int) else tuple(value)
    if not shape or any(not isinstance(size, int) or size < 1 for size in shape):
        raise ValueError(f"{name} must be one or more sizes, each an integer of at least 1; got {value!r}.")
    return shape


def check_batch(x: Tensor, data_shape: tuple[int, ...]) -> None:
    """Refuses what is no floating-point batch of data of that shape.

    Raises:
        ValueError: for another shape.
        TypeError: for integers.
    """
    if x.shape[1:] != data_shape:
        raise ValueError(
            f"This model was built for a batch of shape (batch, {_sizes(data_shape)}); got {tuple(x.shape)}. Reshape "
            "the data, or build the model with their shape."
        )
    if not x.is_floating_point():
        raise TypeError(f"Networks take floating-point data; got {x.dtype}. Convert with x.float().")


class MLP(nn.Module):
    """A multilayer perceptron from tensors of shape `in_shape` to tensors of shape `out_shape`.

    Args:
        in_shape: shape of one input, a number or a tuple such as `(28, 28)`; flattened.
        out_shape: shape of one output.
        hidden_dims: widths of the hidden layers; `()` gives one linear map.
        activation: between the layers (not after the last).

    Shapes:
        `(*leading, *in_shape)` to `(*leading, *out_shape)`.

    Example:
        >>> import torch
        >>> MLP((28, 28), 40, hidden_dims=(200, 200))(torch.zeros(3, 5, 28, 28)).shape
        torch.Size([3, 5, 40])
    """

    def __init__(
        self,
        in_shape: int | Sequence[int],
        out_shape: int | Sequence[int],
        *,
        hidden_dims: Sequence[int] = (400, 400),
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.in_shape = as_shape("in_shape", in_shape)
        self.out_shape = as_shape("out_shape", out_shape)
        self.hidden_dims = as_shape("hidden_dims", hidden_dims) if hidden_dims else ()
        self.activation = nn.ReLU() if activation is None else activation
        dims = (prod(self.in_shape), *self.hidden_dims, prod(self.out_shape))
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(dims))

    def forward(self, x: Tensor) -> Tensor:
        leading = x.shape[: x.dim() - len(self.in_shape)]
        if x.shape[len(leading) :] != self.in_shape:
            raise ValueError(f"MLP expects inputs of shape (..., {_sizes(self.in_shape)}); got {tuple(x.shape)}.")
        h = x.reshape(*leading, -1)
        for layer in self.layers[:-1]:
            h = self.activation(layer(h))
        return self.layers[-1](h).reshape(*leading, *self.out_shape)


class ConditionalMLP(nn.Module):
    """A multilayer perceptron of a tensor and a class: its first layer is W x + V_y, the rest an `MLP`.

    The same as an `MLP` of x beside the one-hot code of y, whose first layer would be (W, V); but W x is computed once
    where the same x is asked about for every class.

    Args:
        in_shape: shape of one x, a number or a tuple; flattened.
        num_classes: how many values y can have, 0 to `num_classes` - 1.
        out_shape: shape of one output.
        hidden_dims: widths of the hidden layers; `()` gives W x + V_y itself.
        activation: between the layers (not after the last).

    Shapes:
        x `(*leading, *in_shape)` and y `(*leading)`, which are broadcast, to `(*leading, *out_shape)`.

    Example:
        >>> import torch
        >>> network = ConditionalMLP((28, 28), 10, 40, hidden_dims=(200,))
        >>> network(torch.zeros(5, 28, 28), torch.arange(10).unsqueeze(1)).shape
        torch.Size([10, 5, 40])
    """

    def __init__(
        self,
        in_shape: int | Sequence[int],
        num_classes: int,
        out_shape: int | Sequence[int],
        *,
        hidden_dims: Sequence[int] = (400, 400),
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.in_shape, self.out_shape = as_shape("in_shape", in_shape), as_shape("out_shape", out_shape)
        self.num_classes = num_classes
        self.hidden_dims = as_shape("hidden_dims", hidden_dims) if hidden_dims else ()
        self.activation = nn.ReLU() if activation is None else activation
        first, *others = (*self.hidden_dims, prod(self.out_shape))
        self.of_x = nn.Linear(prod(self.in_shape), first)
        self.of_y = nn.Embedding(num_classes, first)
        # As the columns of a linear layer of x and y together would start.
        nn.init.uniform_(self.of_y.weight, -(bound := (self.of_x.in_features + num_classes) ** -0.5), bound)
        self.rest = MLP(first, self.out_shape, hidden_dims=others[:-1], activation=self.activation) if others else None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        leading = x.shape[: x.dim() - len(self.in_shape)]
        if x.shape[len(leading) :] != self.in_shape:
            raise ValueError(
                f"ConditionalMLP expects inputs of shape (..., {_sizes(self.in_shape)}); got {tuple(x.shape)}."
            )
        h = self.of_x(x.reshape(*leading, -1)) + self.of_y(y)
        return self.rest(self.activation(h)) if self.rest is not None else h.reshape(*h.shape[:-1], *self.out_shape)


class ConvEncoder(nn.Module):
    """A ReLU convolutional network from images to a vector of features.

    Two 3 × 3 convolutions of stride 2 (each halves height and width), then one hidden linear layer.

    Args:
        data_shape: `(height, width)` or `(channels, height, width)`, of any size.
        out_features: length of the feature vector.
        channels: of the two convolutions.
        hidden_dim: width of the linear layer.

    Shapes:
        `(*leading, *data_shape)` to `(*leading, out_features)`.

    Example:
        >>> import torch
        >>> ConvEncoder((3, 32, 32), 40)(torch.zeros(7, 3, 32, 32)).shape
        torch.Size([7, 40])
    """

    def __init__(
        self,
        data_shape: Sequence[int],
        out_features: int,
        *,
        channels: tuple[int, int] = (32, 64),
        hidden_dim: int = 128,
    ) -> None:
        super().__init__()
        self.data_shape = as_shape("data_shape", data_shape)
        self.out_features, self.channels, self.hidden_dim = out_features, tuple(channels), hidden_dim
        in_channels, _, _, (height, width) = _stages(self.data_shape)
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, channels[0], 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels[0], channels[1], 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(channels[1] * height * width, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, out_features),
        )

    def forward(self, x: Tensor) -> Tensor:
        event_dim = len(self.data_shape)
        if x.shape[-event_dim:] != self.data_shape:
            raise ValueError(
                f"ConvEncoder expects images of shape (..., {_sizes(self.data_shape)}); got {tuple(x.shape)}."
            )
        return over_leading(self.layers, x if event_dim == 3 else x.unsqueeze(-3), event_dim=3)


class ConvDecoder(nn.Module):
    """A ReLU convolutional network from latents to images of parameters, the mirror of `ConvEncoder`.

    Args:
        latent_dim: length of a latent.
        data_shape: `(height, width)` or `(channels, height, width)`, of any size.
        num_parameters: numbers per data dimension (`likelihood.num_parameters`), stacked along the channels.
        channels: of the two transposed convolutions, from the latent's side.
        hidden_dim: width of the first linear layer.

    Shapes:
        `(*leading, latent_dim)` to `(*leading, num_parameters * data_shape[0], *data_shape[1:])`.

    Example:
        >>> import torch
        >>> ConvDecoder(20, (28, 28), num_parameters=2)(torch.zeros(3, 5, 20)).shape
        torch.Size([3, 5, 56, 28])
    """

    def __init__(
        self,
        latent_dim: int,
        data_shape: Sequence[int],
        *,
        num_parameters: int = 1,
        channels: tuple[int, int] = (64, 32),
        hidden_dim: int = 128,
    ) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.data_shape = as_shape("data_shape", data_shape)
        self.num_parameters, self.channels, self.hidden_dim = num_parameters, tuple(channels), hidden_dim
        out_channels, full, half, quarter = _stages(self.data_shape)
        self.layers = nn.Sequential(
            nn.Linear(latent_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, channels[0] * quarter[0] * quarter[1]),
            nn.ReLU(),
            nn.Unflatten(-1, (channels[0], *quarter)),
            _doubling(channels[0], channels[1], half),
            nn.ReLU(),
            _doubling(channels[1], num_parameters * out_channels, full),
        )

    def forward(self, z: Tensor) -> Tensor:
        features = over_leading(self.layers, z, event_dim=1)
        return features.reshape(*z.shape[:-1], self.num_parameters * self.data_shape[0], *self.data_shape[1:])


Size = tuple[int, int]


def _stages(data_shape: tuple[int, ...]) -> tuple[int, Size, Size, Size]:
    """Channels, and the image's size in full, halved once and halved twice (rounded up)."""
    if len(data_shape) not in (2, 3):
        raise ValueError(
            f"A convolution needs data of shape (height, width) or (channels, height, width); got {data_shape}."
        )
    channels, (height, width) = (1 if len(data_shape) == 2 else data_shape[0]), data_shape[-2:]
    full = (height, width)
    half = (-(-height // 2), -(-width // 2))
    quarter = (-(-half[0] // 2), -(-half[1] // 2))
    return channels, full, half, quarter


def _doubling(in_channels: int, out_channels: int, size: Size) -> nn.ConvTranspose2d:
    """A transposed convolution of stride 2 that ends at exactly `size`, even or odd."""
    padding = (1 - size[0] % 2, 1 - size[1] % 2)
    return nn.ConvTranspose2d(in_channels, out_channels, 3, stride=2, padding=1, output_padding=padding)


def _sizes(shape: Sequence[int]) -> str:
    return ", ".join(map(str, shape))
