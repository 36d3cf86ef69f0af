"""Probabilities of levels 0 to L − 1 from any density that can be integrated over the bin of a level."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ppl_vae.likelihoods.contract import Likelihood
from ppl_vae.likelihoods.levels import Levels, OfLevels
from ppl_vae.likelihoods.line import Gaussian, LocationScale, Logistic


class Binned(Levels):
    """Levels 0 to L − 1 under any density that can be integrated over the bin of a level, exactly.

    P(x given z) = Π F(upper end of the bin) − F(lower end): on the unit scale of the density, level k is the bin of
    width 1 / (L − 1) around k / (L − 1), the lowest and highest reaching to ∓∞; for a density on the interval, the
    k-th of L equal bins. The difference is taken in logarithms, in the tail where both terms are small and in float64,
    so that no bin is too far or too narrow. The mean is that of the levels, 0 to L − 1.

    Args:
        likelihood: `Gaussian`, `Laplace`, `Logistic` or `ContinuousBernoulli`, for data on [0, 1].
        levels: L, at least 2.

    Shapes:
        features as of `likelihood`.

    Raises:
        TypeError: for a likelihood whose integral over a bin is not known.
        ValueError: when anything but levels is scored (while Pyro's validation is on).

    Example:
        >>> from ppl_vae.likelihoods import Laplace
        >>> p = Binned(Laplace(0.1), levels=17)(torch.tensor([0.5]))
        >>> p.mean
        tensor([8.])
        >>> p.log_prob(torch.arange(17.0).unsqueeze(-1)).exp().sum()
        tensor(1.)
    """

    def __init__(self, likelihood: Likelihood, levels: int = 256) -> None:
        super().__init__(levels)
        if type(likelihood).log_mass is Likelihood.log_mass:
            raise TypeError(
                f"The integral of a {type(likelihood).__name__} over a bin is not known here. Give Binned a Gaussian, "
                "a Laplace, a Logistic or a ContinuousBernoulli."
            )
        self.likelihood = likelihood
        self.num_parameters = likelihood.num_parameters

    def forward(self, features: Tensor, event_dim: int = 1) -> dist.TorchDistribution:
        density = self.likelihood(features, event_dim).base_dist
        return BinnedDistribution(self.likelihood, density, self.levels).to_event(event_dim)


# Of the unit scale. A probability is at most 1 however small the scale, so this only keeps gradients in bounds.
FINEST_SCALE = 1e-4


class _Discretised(Binned):
    family: ClassVar[type[LocationScale]]
    likelihood: LocationScale

    def __init__(
        self, levels: int = 256, scale: float | None = None, *, per_pixel: bool = False, floor: float = FINEST_SCALE
    ) -> None:
        super().__init__(self.family(scale, per_pixel=per_pixel, floor=floor), levels)
        self.per_pixel, self.floor = per_pixel, floor

    @property
    def scale(self) -> float | None:
        """The fixed scale, of the unit, or None."""
        return self.likelihood.scale


class DiscretisedGaussian(_Discretised):
    """Levels 0 to L − 1: log P(x given z) = Σ log[Φ(b) − Φ(a)], with a, b = (x ∓ ½ − (L − 1) μ) / ((L − 1) σ).

    The lowest and highest level take the tails. Location and scale are on the unit scale, those of `Gaussian` on
    [0, 1]; see `LocationScale` and `Binned`.

    Args:
        levels: L, at least 2.
        scale, per_pixel, floor: as of `Gaussian`, of the unit scale.

    Example:
        >>> DiscretisedGaussian(scale=0.1)(torch.full((3,), 0.5)).mean
        tensor([127.5000, 127.5000, 127.5000])
    """

    family = Gaussian


class DiscretisedLogistic(_Discretised):
    """Levels 0 to L − 1: log P(x given z) = Σ log[σ(b) − σ(a)], with a, b = (x ∓ ½ − (L − 1) μ) / ((L − 1) s).

    The lowest and highest level take the tails. Location and scale are on the unit scale; see `LocationScale` and
    `Binned`.

    Args:
        levels: L, at least 2.
        scale, per_pixel, floor: as of `Logistic`, of the unit scale.

    References:
        Kingma, Salimans, Jozefowicz, Chen, Sutskever & Welling, Improving Variational Inference with Inverse
        Autoregressive Flow, 2016. https://arxiv.org/abs/1606.04934

    Example:
        >>> p = DiscretisedLogistic(17, scale=0.1)(torch.tensor([0.0, 0.5, 1.0]))
        >>> p.base_dist.log_prob(torch.tensor([0.0, 8.0, 16.0])).exp()
        tensor([0.5775, 0.1550, 0.5775])
    """

    family = Logistic


class BinnedDistribution(OfLevels, dist.TorchDistribution):
    """The bins of `density`, a distribution of independent numbers that `likelihood` can integrate over a bin."""

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, likelihood: Likelihood, density: dist.TorchDistribution, levels: int) -> None:
        self.likelihood, self.density = likelihood, density
        self.start, self.width = likelihood.bins(levels)
        super().__init__(levels, batch_shape=density.batch_shape)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> BinnedDistribution:
        new = copy(self)
        new._batch_shape, new.density = torch.Size(batch_shape), self.density.expand(batch_shape)
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        level = value.double()  # so that the two ends of a bin differ, however wide the scale
        low = torch.where(level == 0, -torch.inf, self.start + self.width * level)
        high = torch.where(level == self.levels - 1, torch.inf, self.start + self.width * (level + 1))
        return self.likelihood.log_mass(self.density, low, high).to(self.density.mean.dtype)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return ((self.density.sample(sample_shape) - self.start) / self.width).floor().clamp(0, self.levels - 1)

    def moment(self, power: int, dtype: torch.dtype) -> Tensor:
        """The mean of X^power, a sum over levels k of (k^power − (k − 1)^power) P(X ≥ k)."""
        total = torch.zeros_like(self.density.mean, dtype=dtype)
        for k in range(1, self.levels):
            # Computed again for a gradient, not kept: there are as many as levels.
            tail = checkpoint(self._tail, k, dtype, use_reentrant=False, preserve_rng_state=False)
            total = total + (k**power - (k - 1) ** power) * tail
        return total

    def _tail(self, k: int, dtype: torch.dtype) -> Tensor:
        return 1 - self.density.cdf(torch.full_like(self.density.mean, self.start + self.width * k, dtype=dtype))

    @property
    def mean(self) -> Tensor:
        return self.moment(1, self.density.mean.dtype)

    @property
    def variance(self) -> Tensor:
        first, second = self.moment(1, torch.float64), self.moment(2, torch.float64)
        return (second - first.square()).to(self.density.mean.dtype)
