"""Probabilities of counts 0, 1, 2, ...; means are exponentials of features, and differences are taken in float64."""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from ppl_vae.likelihoods.contract import PROBABILITY_OF_COUNTS, Likelihood
from ppl_vae.likelihoods.families import Parametric

# Features beyond are taken as these: e⁶⁰ is beyond any count, and its gradient still finite in float32; with a log θ
# of 20 a negative binomial is a Poisson, and differences of lgamma's are still exact to 1e-6 nats.
LARGEST_LOG_MEAN = 60.0
LARGEST_LOG_DISPERSION = 20.0


class Counts(Likelihood):
    """Data that are counts, floats that hold integers. Networks see log(1 + x)."""

    measure = PROBABILITY_OF_COUNTS

    def inputs(self, x: Tensor) -> Tensor:
        """Counts on a scale that networks can work with, log(1 + x)."""
        return x.log1p()


class Poisson(Counts):
    """Counts: log P(x given z) = Σ x η − e^η − log x!, the features η being the logarithms of the means.

    Shapes:
        features `(..., *data_shape)`, the shape of the data. Beyond ±60 they count as ±60.

    Raises:
        ValueError: when anything but counts is scored (while Pyro's validation is on).

    Example:
        >>> Poisson()(torch.zeros(3)).log_prob(torch.tensor([0.0, 1.0, 0.0]))
        tensor(-3.)
    """

    num_parameters = 1

    def forward(self, features: Tensor, event_dim: int = 1) -> dist.TorchDistribution:
        return _Poisson(log_mean=_log_mean(features)).to_event(event_dim)


class NegativeBinomial(Counts):
    """Counts that scatter more than Poisson's: mean μ = e^η, variance μ + μ²/θ.

    log P(x given z) = Σ log Γ(x + θ) − log Γ(θ) − log x! + θ log(θ / (θ + μ)) + x log(μ / (θ + μ))

    The dispersion θ is fixed (`NegativeBinomial(2.0)`), learned (`NegativeBinomial()`, one for all data dimensions;
    `NegativeBinomial(shape=(2000,))`, one for each gene), or a second number per data dimension from the decoder
    (`per_pixel=True`). To condition on a library size, add its logarithm to the features.

    Args:
        dispersion: a fixed θ, or None to learn it. A learned one starts at 1.
        shape: of the learned θ; the shape of the data, or one that broadcasts with it.
        per_pixel: θ comes from the decoder, as its logarithm.

    Shapes:
        features `(..., num_parameters * data_shape[0], *data_shape[1:])`: log-means, then (per pixel) log θ. Beyond
        ±60 and ±20 they count as these.

    Raises:
        ValueError: for more than one of the three kinds of θ, or one that is not positive; and when anything but
            counts is scored (while Pyro's validation is on).

    Reference:
        Lopez, Regier, Cole, Jordan & Yosef, Deep generative modeling for single-cell transcriptomics, 2018.
        https://doi.org/10.1038/s41592-018-0229-2

    Example:
        >>> p = NegativeBinomial(2.0)(torch.full((3,), log(6.0)))
        >>> p.mean[0], p.variance[0]
        (tensor(6.), tensor(24.))
    """

    num_extra = 0

    def __init__(
        self, dispersion: float | None = None, *, shape: int | Sequence[int] = (), per_pixel: bool = False
    ) -> None:
        super().__init__()
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if (dispersion is not None) + per_pixel + (shape != ()) > 1:
            raise ValueError(
                f"The dispersion of a {type(self).__name__} is either fixed, or learned in some shape, or per pixel; "
                "give one of them."
            )
        if dispersion is not None and not 0 < dispersion < float("inf"):
            raise ValueError(f"dispersion must be positive and finite; got {dispersion!r}.")
        self.dispersion, self.shape, self.per_pixel = dispersion, shape, per_pixel
        self.num_parameters = 1 + per_pixel + self.num_extra
        learned = dispersion is None and not per_pixel
        self.log_dispersion = nn.Parameter(torch.zeros(shape)) if learned else None

    def _negative_binomial(self, numbers: Sequence[Tensor]) -> _NegativeBinomial:
        log_mean = _log_mean(numbers[0])
        raw: Any = numbers[1] if self.per_pixel else self.log_dispersion
        raw = log_mean.new_full((), log(self.dispersion)) if self.dispersion is not None else raw
        limit = LARGEST_LOG_DISPERSION
        return _NegativeBinomial(log_mean=log_mean, log_dispersion=raw.clamp(-limit, limit))

    def forward(self, features: Tensor, event_dim: int = 1) -> dist.TorchDistribution:
        return self._negative_binomial(self.per_dimension(features, event_dim).unbind(-1)).to_event(event_dim)


class ZeroInflatedNegativeBinomial(NegativeBinomial):
    """Counts with more zeros: 0 with probability π = σ(γ), and otherwise a `NegativeBinomial`.

    P(0 given z) = π + (1 − π) NB(0), P(x given z) = (1 − π) NB(x), for each data dimension. The mean is (1 − π) μ, the
    variance (1 − π) μ (1 + μ (π + 1/θ)).

    Args:
        dispersion, shape, per_pixel: as of `NegativeBinomial`, with its errors and its source.

    Shapes:
        features `(..., num_parameters * data_shape[0], *data_shape[1:])`: log-means, (per pixel) log θ, then logits γ.

    Example:
        >>> p = ZeroInflatedNegativeBinomial(2.0)(torch.tensor([log(6.0), 0.0]))
        >>> p.mean
        tensor([3.])
    """

    num_extra = 1

    def forward(self, features: Tensor, event_dim: int = 1) -> dist.TorchDistribution:
        numbers = self.per_dimension(features, event_dim).unbind(-1)
        return _ZeroInflated(**self._negative_binomial(numbers)._get(), gate=numbers[-1]).to_event(event_dim)


def _log_mean(features: Tensor) -> Tensor:
    return features.clamp(-LARGEST_LOG_MEAN, LARGEST_LOG_MEAN)


class _OfCounts(Parametric):
    """Counts by the logarithm of the mean; log-probabilities are computed in float64 and given as the parameters."""

    support = dist.constraints.nonnegative_integer
    rule = "A likelihood of counts scores whole numbers from 0"
    remedy = (
        "Give the raw counts, neither normalised nor as logarithms, or choose a likelihood of real numbers such as "
        "`likelihoods.Gaussian()`."
    )
    log_mean: Tensor

    def _log_prob(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        return self._log_prob(value.double()).to(self.log_mean.dtype)

    @property
    def mean(self) -> Tensor:
        return self.log_mean.exp()


class _Poisson(_OfCounts):
    arg_constraints: ClassVar = {"log_mean": dist.constraints.real}

    def _log_prob(self, x: Tensor) -> Tensor:
        log_mean = self.log_mean.double()
        return x * log_mean - log_mean.exp() - torch.lgamma(x + 1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return torch.poisson(self.mean.expand(self._extended_shape(sample_shape)))

    @property
    def variance(self) -> Tensor:
        return self.mean


class _NegativeBinomial(_OfCounts):
    arg_constraints: ClassVar = {"log_mean": dist.constraints.real, "log_dispersion": dist.constraints.real}
    log_dispersion: Tensor

    def _log_prob(self, x: Tensor) -> Tensor:
        log_theta = self.log_dispersion.double()
        theta, logits = log_theta.exp(), self.log_mean.double() - log_theta
        ways = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
        return ways + theta * logsigmoid(-logits) + x * logsigmoid(logits)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            theta = self.log_dispersion.exp().expand(self._extended_shape(sample_shape))
            return torch.poisson(torch._standard_gamma(theta) / theta * self.log_mean.exp())

    @property
    def variance(self) -> Tensor:
        return self.mean * (1 + (self.log_mean - self.log_dispersion).exp())


class _ZeroInflated(_NegativeBinomial):
    arg_constraints: ClassVar = {**_NegativeBinomial.arg_constraints, "gate": dist.constraints.real}
    gate: Tensor

    def _log_prob(self, x: Tensor) -> Tensor:
        gate = self.gate.double()
        counted = logsigmoid(-gate) + super()._log_prob(x)
        return torch.where(x == 0, torch.logaddexp(logsigmoid(gate), counted), counted)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        counted = super().sample(sample_shape)
        return counted * torch.bernoulli((-self.gate.detach()).sigmoid().expand(counted.shape))

    @property
    def mean(self) -> Tensor:
        return (-self.gate).sigmoid() * self.log_mean.exp()

    @property
    def variance(self) -> Tensor:
        share, mean = self.gate.sigmoid(), self.log_mean.exp()
        return self.mean * (1 + mean * share + (self.log_mean - self.log_dispersion).exp())
