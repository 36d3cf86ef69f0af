"""What every family of p(x given z) has, and the one currency their probabilities are compared in."""

from __future__ import annotations

from dataclasses import dataclass
from math import log

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


def bits_per_dim(log_px: Tensor, likelihood: Likelihood, num_dims: int) -> Tensor:
    """The bits per dimension −log P(x) / (num_dims log 2) of a probability of levels.

    Args:
        log_px: log-probabilities in nats per datum, of any shape.
        likelihood: one of this room; its `measure` says what the log-probabilities are.
        num_dims: how many dimensions one datum has.

    Returns:
        Bits per dimension, in the shape of `log_px`: 1 for a fair coin, 8 for uniform bytes.

    Raises:
        ValueError: for a density, which on undequantised levels has no bits per dimension (the narrower the density,
            the fewer "bits", without limit); for counts, which have no number of levels to compare with; for a
            `log_px` above 0, which is no log-probability; and for a num_dims below 1.

    Example:
        >>> import torch
        >>> from ppl_vae.likelihoods import Bernoulli
        >>> bits_per_dim(torch.tensor(-64 * log(2.0)), Bernoulli(), num_dims=64)
        tensor(1.)
    """
    name = type(likelihood).__name__
    if likelihood.measure.levels is None:
        raise ValueError(
            f"{name} gives a {likelihood.measure.name}; bits per dimension are defined for probabilities of levels "
            "only. Report nats, or use a likelihood of levels, such as `likelihoods.DiscretisedLogistic(levels=256)`."
        )
    if not isinstance(num_dims, int) or num_dims < 1:
        raise ValueError(f"num_dims is how many dimensions one datum has, at least 1; got {num_dims!r}.")
    if (log_px > 1e-3 * num_dims).any():  # more than rounding and Monte Carlo noise
        raise ValueError(
            f"{name} gives log-probabilities, which are at most 0; got log_px = {log_px.max().item():.4g}. It is the "
            "log-density of another likelihood, and bits per dimension are not defined for it."
        )
    return -log_px / (num_dims * log(2.0))
