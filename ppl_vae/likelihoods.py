"""p(x given z): `nn.Module`s, decoder features to a `Distribution` over x.

The contract, whatever the family:

* `likelihood.num_parameters` numbers per data dimension come from the decoder, stacked along the first data
  dimension: for a vector of 784 features are `(..., num_parameters * 784)`, for a colour image
  `(..., num_parameters * 3, 32, 32)`.
* `likelihood(features, event_dim=1)` is a distribution of event shape `data_shape`; `event_dim` is
  `len(data_shape)`.
* `likelihood.measure` says what a log-probability of it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import expm1, log, sqrt
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus


@dataclass(frozen=True)
class Measure:
    """What a log-probability of a likelihood is; two results of different measure are never compared.

    Attributes:
        name: in words, for tables.
        levels: how many values one data dimension can take when probabilities are counted, None for a density.
    """

    name: str
    levels: int | None


class Likelihood(nn.Module):
    """What every family of p(x given z) has; see the contract above."""

    num_parameters: int
    measure: Measure

    def forward(self, features: Tensor, event_dim: int = 1) -> dist.TorchDistribution:
        raise NotImplementedError


class Bernoulli(Likelihood):
    """Binary data x in {0, 1}: log p(x given z) = Σ x η − log(1 + e^η), the features being the logits η.

    Logits and not probabilities: in float32 a clamped probability never charges more than 15.9 nats for an
    impossible pixel. Anything but 0 and 1 is refused, because the same formula on grey levels is no log-probability.

    Shapes:
        features `(..., *data_shape)`, the shape of the data.

    Raises:
        ValueError: when data other than 0 and 1 are scored (while Pyro's validation is on; `fit` and
            `importance_sampling` see to it that every datum is checked once).

    Example:
        >>> p = Bernoulli()(torch.zeros(5, 4))
        >>> p.log_prob(torch.ones(5, 4))[0]               # 4 log ½
        tensor(-2.7726)
    """

    num_parameters = 1
    measure = Measure("probability on {0, 1}", levels=2)

    def forward(self, features: Tensor, event_dim: int = 1) -> dist.TorchDistribution:
        return _BinaryBernoulli(logits=features).to_event(event_dim)


class _BinaryBernoulli(dist.Bernoulli):
    """Pyro's Bernoulli, refusing grey levels in words."""

    def _validate_sample(self, value: Tensor) -> None:
        binary = (value == 0) | (value == 1)
        if not binary.all():
            low, high, grey = value.min().item(), value.max().item(), value[~binary][0].item()
            raise ValueError(
                f"A Bernoulli likelihood scores data in {{0, 1}}; got values from {low:.4g} to {high:.4g}, such as "
                f"{grey:.4g}. Binarise the data (static: `data.binarize(x, seed=0)` or `static_binarization()` of a "
                "loaded set; dynamic: `data.DynamicBinarization(x)`), or choose a likelihood of grey levels such as "
                "`likelihoods.Gaussian()`."
            )


# The standard deviation of the rounding error of 8-bit data on [0, 1].
ROUNDING_SCALE = 1 / (256 * sqrt(12))


class Gaussian(Likelihood):
    """Real data: log p(x given z) = −½ Σ log 2πσ² + (x − μ)²/σ², a density on the line.

    `Gaussian(0.1)` has that fixed scale, `Gaussian()` one learned scale for all data dimensions, and
    `Gaussian(per_pixel=True)` takes a second number per data dimension from the decoder. A learned scale is
    `floor + softplus(...)`: without a floor the density of data on few levels is unbounded (Mattei & Frellsen, 2018)
    and training runs away.

    Args:
        scale: a fixed standard deviation, or None to learn it.
        per_pixel: the scale of each data dimension comes from the decoder.
        floor: the smallest learned standard deviation, in units of the data. By default 1/(256 √12) ≈ 0.0011,
            the rounding error of 8-bit data on [0, 1].

    Shapes:
        features `(..., num_parameters * data_shape[0], *data_shape[1:])`: locations, then (per pixel) scales.

    Reference:
        Mattei & Frellsen, Leveraging the Exact Likelihood of Deep Latent Variable Models, 2018.
        https://arxiv.org/abs/1802.04826

    Example:
        >>> p = Gaussian(per_pixel=True)(torch.zeros(5, 2 * 4))
        >>> p.batch_shape, p.event_shape
        (torch.Size([5]), torch.Size([4]))
    """

    measure = Measure("density on the line", levels=None)

    def __init__(self, scale: float | None = None, *, per_pixel: bool = False, floor: float = ROUNDING_SCALE) -> None:
        super().__init__()
        if scale is not None and per_pixel:
            raise ValueError("A Gaussian has either a fixed scale or a scale per pixel; give one of the two.")
        if scale is not None and not 0 < scale < float("inf"):
            raise ValueError(f"scale is a standard deviation and must be positive and finite; got {scale!r}.")
        if not 0 < floor < float("inf"):
            raise ValueError(f"floor is the smallest standard deviation and must be positive; got {floor!r}.")
        self.scale, self.per_pixel, self.floor = scale, per_pixel, floor
        self.num_parameters = 2 if per_pixel else 1
        # Training starts with a scale of 0.2, about that of images on [0, 1]. A much wider one makes reconstruction
        # seem worthless at first, and latent dimensions go unused that are not won back.
        start = torch.tensor(log(expm1(0.2)))
        self.raw_scale = nn.Parameter(start) if scale is None and not per_pixel else None

    def forward(self, features: Tensor, event_dim: int = 1) -> dist.TorchDistribution:
        loc = features
        scale: Any = self.scale
        if self.per_pixel:
            loc, raw = features.chunk(2, dim=-event_dim)
            scale = self.floor + softplus(raw)
        elif self.raw_scale is not None:
            scale = self.floor + softplus(self.raw_scale)
        return dist.Normal(loc, scale).to_event(event_dim)


def bits_per_dim(log_px: Tensor, likelihood: Likelihood, num_dims: int) -> Tensor:
    """The bits per dimension −log P(x) / (num_dims log 2) of a probability.

    Args:
        log_px: log-probabilities in nats per datum, of any shape.
        likelihood: one of this room; its `measure` says what the log-probabilities are.
        num_dims: how many dimensions one datum has.

    Returns:
        Bits per dimension, in the shape of `log_px`.

    Raises:
        ValueError: for a density, which on undequantised levels has no bits per dimension: the narrower the
            density, the fewer "bits", without limit.

    Example:
        >>> bits_per_dim(torch.tensor(-64 * log(2.0)), Bernoulli(), num_dims=64)
        tensor(1.)
    """
    if likelihood.measure.levels is None:
        raise ValueError(
            f"{type(likelihood).__name__} gives a {likelihood.measure.name}; bits per dimension are defined for "
            "probabilities of levels only. Report nats, or use a likelihood of levels."
        )
    return -log_px / (num_dims * log(2.0))
