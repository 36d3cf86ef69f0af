"""Densities on the interval [0, 1]."""

from __future__ import annotations

from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import softplus

from ppl_vae.likelihoods.contract import DENSITY_ON_THE_INTERVAL, Likelihood
from ppl_vae.likelihoods.families import Parametric, Refusing, open_uniform


class ContinuousBernoulli(Likelihood):
    """Data on [0, 1]: log p(x given z) = Σ η (x − ½) + log(h / sinh h), h = η/2, the features being the logits η.

    It is the Bernoulli formula with the constant that makes it a density. The constant is computed for all logits:
    that of `torch.distributions.ContinuousBernoulli` comes from clamped probabilities, and from |η| = 15 on lacks up
    to two nats for each pixel and has no gradient. η is the logit of a parameter, not of the mean.

    Shapes:
        features `(..., *data_shape)`, the shape of the data.

    Raises:
        ValueError: when data outside [0, 1] are scored (while Pyro's validation is on).

    Reference:
        Loaiza-Ganem & Cunningham, The continuous Bernoulli: fixing a pervasive error in variational autoencoders,
        2019. https://arxiv.org/abs/1907.06845

    Example:
        >>> p = ContinuousBernoulli()(torch.tensor([0.0, 60.0]))
        >>> p.mean
        tensor([0.5000, 0.9833])
        >>> p.base_dist.log_prob(torch.ones(2))           # a uniform density, and log 60
        tensor([0.0000, 4.0943])
    """

    num_parameters = 1
    measure = DENSITY_ON_THE_INTERVAL

    def forward(self, features: Tensor, event_dim: int = 1) -> dist.TorchDistribution:
        return _ContinuousBernoulli(logits=features).to_event(event_dim)

    def log_mass(self, p: dist.TorchDistribution, low: Tensor, high: Tensor) -> Tensor:
        return p.log_mass(low.clamp(min=0), high.clamp(max=1))

    def bins(self, levels: int) -> tuple[float, float]:
        """The interval in equal bins: level k is (k / levels, (k + 1) / levels)."""
        return 0.0, 1 / levels


class _ContinuousBernoulli(Parametric):
    arg_constraints: ClassVar = {"logits": dist.constraints.real}
    support = dist.constraints.unit_interval
    has_rsample = True
    rule = "A continuous Bernoulli likelihood scores data on [0, 1]"
    remedy = "Divide levels by the largest, or choose a likelihood on the line such as `likelihoods.Gaussian()`."
    logits: Tensor

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return self.logits * (value - 0.5) - _log_sinhc(self.logits / 2)

    def log_mass(self, low: Tensor, high: Tensor) -> Tensor:
        """log P(low < X ≤ high) for 0 ≤ low < high ≤ 1: the density in the middle times a ratio of sinh's."""
        width, half = high - low, self.logits / 2
        return self.logits * ((low + high) / 2 - 0.5) + width.log() + _log_sinhc(half * width) - _log_sinhc(half)

    def cdf(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return self.log_mass(torch.zeros_like(value), value).exp()

    def icdf(self, value: Tensor) -> Tensor:
        steep = self.logits.abs()
        flat = steep < 1e-6  # uniform to rounding, and 0 / 0
        safe = torch.where(flat, 1, steep)
        rise = torch.where(self.logits > 0, 1 - value, value)
        x = -torch.log1p(rise * torch.expm1(-safe)) / safe  # of −|η|; mirrored for positive logits
        x = torch.where(self.logits > 0, 1 - x, x).clamp(0, 1)
        return torch.where(flat, value, x)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.icdf(open_uniform(self.logits, self._extended_shape(sample_shape)))

    @property
    def mean(self) -> Tensor:
        """½ + ½ (coth h − 1/h)."""
        h = self.logits / 2
        small = h.abs() < 0.3
        safe = torch.where(small, 1, h)
        near = torch.where(small, h, 0)
        series = near / 3 - near**3 / 45 + 2 * near**5 / 945
        return 0.5 + 0.5 * torch.where(small, series, 1 / safe.tanh() - 1 / safe)

    @property
    def variance(self) -> Tensor:
        """¼ (1/h² − 1/sinh² h)."""
        h = self.logits / 2
        small = h.abs() < 0.3
        safe = torch.where(small, 1, h)
        series = 1 / 3 - h**2 / 15 + 2 * h**4 / 189
        return 0.25 * torch.where(small, series, safe**-2 - safe.sinh() ** -2)


def _log_sinhc(h: Tensor) -> Tensor:
    """log(sinh h / h), even in h: a series around 0, and elsewhere without overflow.

    Example:
        >>> _log_sinhc(torch.tensor([0.0, 1e-3, 0.5, 1000.0]))
        tensor([0.0000e+00, 1.6667e-07, 4.1325e-02, 9.9240e+02])
    """
    h = h.abs()
    small = h < 0.3
    near, far = torch.where(small, h, 0).square(), torch.where(small, 1, h)
    series = near / 6 - near**2 / 180 + near**3 / 2835
    return torch.where(small, series, far - (2 * far).log() + torch.log1p(-torch.exp(-2 * far)))


class Beta(Likelihood):
    """Data on (0, 1): log p(x given z) = Σ (α − 1) log x + (β − 1) log(1 − x) − log B(α, β).

    α and β are `floor + softplus(feature)`. Below 1 the density is infinite at an end of the interval, so exact zeros
    and ones are refused: dequantise levels, or squeeze the data into the interval.

    Args:
        floor: the smallest α and β.

    Shapes:
        features `(..., 2 * data_shape[0], *data_shape[1:])`: for α, then for β.

    Raises:
        ValueError: when data outside (0, 1), or 0 or 1 themselves, are scored (while Pyro's validation is on).

    Example:
        >>> Beta()(torch.zeros(5, 2 * 3)).mean.shape
        torch.Size([5, 3])
    """

    num_parameters = 2
    measure = DENSITY_ON_THE_INTERVAL

    def __init__(self, *, floor: float = 1e-3) -> None:
        super().__init__()
        if not 0 < floor < float("inf"):
            raise ValueError(f"floor is the smallest α and β and must be positive and finite; got {floor!r}.")
        self.floor = floor

    def forward(self, features: Tensor, event_dim: int = 1) -> dist.TorchDistribution:
        alpha, beta = (self.floor + softplus(self.per_dimension(features, event_dim))).unbind(-1)
        return _Beta(alpha, beta).to_event(event_dim)


class _Beta(Refusing, dist.Beta):
    rule = "A Beta likelihood scores data in the open interval (0, 1), without 0 and 1"
    remedy = (
        "Dequantise levels 0 to n − 1 to (level + u) / n with u uniform on (0, 1), or squeeze data on [0, 1] to "
        "((n − 1) x + ½) / n and add num_dims · log((n − 1) / n) to log p(x); "
        "`likelihoods.ContinuousBernoulli()` takes 0 and 1 as they are."
    )

    def _allowed(self, value: Tensor) -> Tensor:
        return (value > 0) & (value < 1)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        # Differences of lgamma's cancel: float64.
        a, b, x = self.concentration1.double(), self.concentration0.double(), value.double()
        log_beta = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
        density = (a - 1) * x.log() + (b - 1) * torch.log1p(-x) - log_beta
        return density.to(self.concentration1.dtype)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        x = super().rsample(sample_shape)
        return x.clamp(torch.finfo(x.dtype).tiny, 1 - torch.finfo(x.dtype).eps / 2)
