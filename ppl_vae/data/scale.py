"""What the numbers of a data set are: levels, or what became of them, and how densely the levels lie there.

With |∂x/∂level| a density of x becomes one of level + u, u uniform on (0, 1), and the mean of that over u is a
probability of the level. That is how densities get bits per dimension; see `ppl_vae.bits_per_dim`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import log2

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

MOST_LEVELS = 2**16  # with more, float32 would hold a level and too few values of its noise

ENOUGH = 8  # numbers that by chance all have the same noise once in 1e10 cases, or fewer


@dataclass(frozen=True)
class Scale(ABC):
    """What the values of a data set are.

    Attributes:
        levels: L, how many values a data dimension could take when it was loaded; None where that is not known.
    """

    levels: int | None

    @property
    @abstractmethod
    def rule(self) -> str:
        """What lies on this scale, in words."""

    @abstractmethod
    def holds(self, x: Tensor) -> Tensor:
        """Which values of x can lie on this scale."""

    def log_slope(self, x: Tensor) -> Tensor:
        """log |∂x/∂level| of each value."""
        raise ValueError(
            f"The data are {self.rule}, so there is no level to differentiate by. Load them as levels (of type uint8)."
        )

    def log_jacobian(self, x: Tensor) -> Tensor:
        """log |∂x/∂level| of each datum, in nats and float64: `(N, ...)` to `(N,)`."""
        return self.log_slope(x.double()).reshape(len(x), -1).sum(-1)

    def check(self, x: Tensor) -> None:
        """Refuses data that cannot lie on this scale.

        Raises:
            TypeError: for data that are not floating point.
            ValueError: for others, in a sentence with the values that came.
        """
        if not x.is_floating_point():
            raise TypeError(f"Expected floating point data, got {x.dtype}. Convert them with x.float().")
        wrong = ~self.holds(x)
        if wrong.any():
            raise ValueError(
                f"Expected {self.rule}; got values from {x.min().item():.4g} to {x.max().item():.4g}, such as "
                f"{x[wrong][0].item():.6g}. Give the data as they were scored, with the `scale` of the `Data` they are "
                "from."
            )


@dataclass(frozen=True)
class AsIs(Scale):
    """Numbers of which no levels are known."""

    levels: None = None

    @property
    def rule(self) -> str:
        return "numbers as they were loaded"

    def holds(self, x: Tensor) -> Tensor:
        return x.isfinite()


@dataclass(frozen=True)
class OfLevels(Scale):
    """A scale of data that were levels 0 to L − 1."""

    levels: int

    def __post_init__(self) -> None:
        if not isinstance(self.levels, int) or not 2 <= self.levels <= MOST_LEVELS:
            raise ValueError(f"levels is how many values a data dimension can take, 2 to 65536; got {self.levels!r}.")


@dataclass(frozen=True)
class Levels(OfLevels):
    """x = level: whole numbers from 0 to L − 1, zeros and ones among them."""

    @property
    def rule(self) -> str:
        return f"whole numbers from 0 to {self.levels - 1}"

    def holds(self, x: Tensor) -> Tensor:
        return (x == x.round()) & (x >= 0) & (x < self.levels)

    def log_slope(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


@dataclass(frozen=True)
class Unit(OfLevels):
    """x = level / (L − 1), on [0, 1]."""

    @property
    def rule(self) -> str:
        return f"levels divided by {self.levels - 1}"

    def holds(self, x: Tensor) -> Tensor:
        level = x * (self.levels - 1)
        return ((level - level.round()).abs() < 1e-2) & (x >= 0) & (x <= 1)

    def log_slope(self, x: Tensor) -> Tensor:
        return torch.full_like(x, self.levels - 1).log().neg()

    def to_levels(self, x: Tensor) -> Tensor:
        """The levels, without what dividing them has rounded."""
        return (x * (self.levels - 1)).round()


@dataclass(frozen=True)
class Dequantized(OfLevels):
    """x = v = (level + u) / L with u uniform, on (0, 1).

    Example:
        >>> scale = Dequantized(256)
        >>> v = scale.draw(torch.tensor([[0.0, 255.0]]))
        >>> ((v > 0) & (v < 1)).all(), scale.to_levels(v), scale.log_jacobian(v)  # −2 log 256
        (tensor(True), tensor([[  0., 255.]]), tensor([-11.0904], dtype=torch.float64))
    """

    @property
    def rule(self) -> str:
        return f"{self.levels} levels dequantised to (level + u) / {self.levels}, with u drawn for each number"

    def holds(self, x: Tensor) -> Tensor:
        """Those in (0, 1), but for a datum, or one dimension of all data, without noise of its own for each number."""
        v = self.to_unit(x.double())
        rows = v.reshape(len(v), -1) if v.numel() else v.reshape(0, 1)
        shared = torch.zeros_like(rows, dtype=torch.bool)
        for dim in (0, 1):
            if rows.shape[dim] >= ENOUGH:
                noise, place = (rows * self.levels) % 1, rows * (self.levels - 1)
                constant = noise.amax(dim, keepdim=True) - noise.amin(dim, keepdim=True) < 1e-4
                undequantised = (place - place.round()).abs().amax(dim, keepdim=True) < 1e-4  # level / (L − 1)
                shared = shared | constant | undequantised
        return (v > 0) & (v < 1) & ~shared.reshape(v.shape)

    def log_slope(self, x: Tensor) -> Tensor:
        return torch.full_like(x, self.levels).log().neg()

    def draw(self, levels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Levels with noise of their own on this scale, by a generator on the CPU, or else torch's global one.

        u is one of the midpoints of equal parts of (0, 1), so many that floating point holds level + u exactly: no sum
        is rounded up to the next level, and neither 0 nor 1 can occur.
        """
        Levels(self.levels).check(levels)
        digits = round(-log2(torch.finfo(levels.dtype).eps)) - 2  # binary ones; two are spared for rounding
        parts = 2 ** (digits - (self.levels - 1).bit_length())
        device = levels.device if generator is None else "cpu"  # with a seed, the same on every device
        part = torch.randint(parts, levels.shape, generator=generator, dtype=levels.dtype, device=device)
        part = part.to(levels.device)
        return self.from_unit((levels + (part + 0.5) / parts) / self.levels)

    def to_unit(self, x: Tensor) -> Tensor:
        """v = (level + u) / L."""
        return x

    def from_unit(self, v: Tensor) -> Tensor:
        """The inverse of `to_unit`."""
        return v

    def to_levels(self, x: Tensor) -> Tensor:
        """The levels, without their noise."""
        return (self.to_unit(x.double()) * self.levels).floor().to(x.dtype)


@dataclass(frozen=True)
class Logit(Dequantized):
    """x = logit(λ + (1 − 2λ) v), v = (level + u) / L: dequantised levels on the line, λ being the `margin`.

    log |∂x/∂v| = log(1 − 2λ) − log σ(x) − log σ(−x).

    Reference:
        Dinh, Sohl-Dickstein & Bengio, Density estimation using Real NVP, 2017. https://arxiv.org/abs/1605.08803

    Example:
        >>> scale = Logit(256, margin=0.05)
        >>> scale.from_unit(torch.tensor([0.0, 0.5, 1.0]))
        tensor([-2.9444,  0.0000,  2.9444])
    """

    margin: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.margin < 0.5:
            raise ValueError(
                f"margin is how far from 0 and 1 the logit is taken, between 0 and ½; got {self.margin!r}."
            )

    @property
    def rule(self) -> str:
        return f"logits of {self.margin:g} + {1 - 2 * self.margin:g} v, v being {super().rule}"

    def log_slope(self, x: Tensor) -> Tensor:
        stretch = torch.full_like(x, 1 - 2 * self.margin).log()
        return super().log_slope(x) + stretch - logsigmoid(x) - logsigmoid(-x)

    def to_unit(self, x: Tensor) -> Tensor:
        return (x.sigmoid() - self.margin) / (1 - 2 * self.margin)

    def from_unit(self, v: Tensor) -> Tensor:
        stretch = 1 - 2 * self.margin  # of 1 − v too, so that nothing is lost near 1
        return (self.margin + stretch * v).log() - (self.margin + stretch * (1 - v)).log()
