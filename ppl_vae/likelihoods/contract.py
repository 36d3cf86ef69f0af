"""What every family of p(x given z) has."""

from __future__ import annotations

from dataclasses import dataclass

import pyro.distributions as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Measure:
    """What a log-probability of a likelihood is; two results of different measure are never compared.

    Attributes:
        name: in words, for tables.
        levels: how many values one data dimension can take; None for a density, and for counts, which have no end.
    """

    name: str
    levels: int | None


DENSITY_ON_THE_LINE = Measure("density on the line", levels=None)
DENSITY_ON_THE_INTERVAL = Measure("density on [0, 1]", levels=None)
PROBABILITY_OF_COUNTS = Measure("probability on counts 0, 1, 2, ...", levels=None)


def probability_of_levels(levels: int) -> Measure:
    """The measure of families of levels 0 to `levels` - 1.

    Example:
        >>> probability_of_levels(256)
        Measure(name='probability on {0, ..., 255}', levels=256)
    """
    if not isinstance(levels, int) or levels < 2:
        raise ValueError(f"levels is how many values a data dimension can take, at least 2; got {levels!r}.")
    return Measure("probability on {0, 1}" if levels == 2 else f"probability on {{0, ..., {levels - 1}}}", levels)


class Likelihood(nn.Module):
    """What every family of p(x given z) has; see the contract in the docstring of this room."""

    num_parameters: int
    measure: Measure

    def forward(self, features: Tensor, event_dim: int = 1) -> dist.TorchDistribution:
        raise NotImplementedError

    def inputs(self, x: Tensor) -> Tensor:
        """The data on the scale of networks: x itself, levels as x / (levels − 1), counts as log(1 + x)."""
        return x

    @property
    def sees_unit_interval(self) -> bool:
        """Whether `inputs` lie between 0 and 1: for bits, levels and data on the interval."""
        return self.measure.levels is not None or self.measure == DENSITY_ON_THE_INTERVAL

    def per_dimension(self, features: Tensor, event_dim: int) -> Tensor:
        """Features `(*batch, num_parameters * n, *rest)` as a view `(*batch, n, *rest, num_parameters)`.

        Raises:
            ValueError: for features that are no whole number of `num_parameters` along the first data dimension.
        """
        if features.shape[-event_dim] % self.num_parameters:
            raise ValueError(
                f"{type(self).__name__} takes {self.num_parameters} numbers per data dimension, stacked along the "
                f"first; features of shape {tuple(features.shape)} have {features.shape[-event_dim]} there, for data "
                f"of {event_dim} dimensions."
            )
        return features.unflatten(-event_dim, (self.num_parameters, -1)).movedim(-event_dim - 1, -1)

    def log_mass(self, p: dist.TorchDistribution, low: Tensor, high: Tensor) -> Tensor:
        """log P(low < X ≤ high) for each data dimension, of the densities that `Binned` takes.

        Args:
            p: what `forward` gave, before `to_event`.
            low, high: ends of the bins, which may be infinite.
        """
        raise NotImplementedError(f"{type(self).__name__} has no integral over a bin; see Binned for those that have.")

    def bins(self, levels: int) -> tuple[float, float]:
        """Where the bin of level 0 starts on the unit scale, and how wide all are: level / (levels − 1) is centred."""
        return -0.5 / (levels - 1), 1 / (levels - 1)
