"""Densities on the line: a location, a scale and a shape."""

from __future__ import annotations

from collections.abc import Callable
from math import expm1, lgamma, log, pi, sqrt
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

from ppl_vae.likelihoods.contract import DENSITY_ON_THE_LINE, Likelihood
from ppl_vae.likelihoods.families import Parametric, Refusing, log_diff_exp, open_uniform

# The standard deviation of the rounding error of 8-bit data on [0, 1].
ROUNDING_SCALE = 1 / (256 * sqrt(12))

# Training starts with a scale of 0.2, about that of images on [0, 1]. A much wider one makes reconstruction seem
# worthless at first, and latent dimensions go unused that are not won back.
RAW_START = log(expm1(0.2))


class LocationScale(Likelihood):
    """Real data: log p(x given z) = Σ log f((x − μ) / s) − log s, a density on the line; f is what a family adds.

    `Gaussian(0.1)` has that fixed scale s, `Gaussian()` one learned scale for all data dimensions, and
    `Gaussian(per_pixel=True)` takes a second number per data dimension from the decoder; so do all the others. A
    learned scale is `floor + softplus(...)`: without a floor the density of data on few levels is unbounded (Mattei &
    Frellsen, 2018) and training runs away. `fix_scale` sets the scale that is best for the training data.

    Args:
        scale: a fixed scale in units of the data, or None to learn it.
        per_pixel: the scale of each data dimension comes from the decoder.
        floor: the smallest learned scale, in units of the data. By default 1/(256 √12) ≈ 0.0011, the standard
            deviation of the rounding error of 8-bit data on [0, 1].

    Shapes:
        features `(..., num_parameters * data_shape[0], *data_shape[1:])`: locations, then (per pixel) scales.

    Raises:
        ValueError: for a scale or a floor that is not positive and finite; and when NaN or infinite data are scored
            (while Pyro's validation is on).

    Reference:
        Mattei & Frellsen, Leveraging the Exact Likelihood of Deep Latent Variable Models, 2018.
        https://arxiv.org/abs/1802.04826
    """

    measure = DENSITY_ON_THE_LINE

    def __init__(self, scale: float | None = None, *, per_pixel: bool = False, floor: float = ROUNDING_SCALE) -> None:
        super().__init__()
        if scale is not None and per_pixel:
            raise ValueError(
                f"A {type(self).__name__} has either a fixed scale or a scale per pixel; give one of them."
            )
        if scale is not None and not 0 < scale < float("inf"):
            raise ValueError(f"scale is in units of the data and must be positive and finite; got {scale!r}.")
        if not 0 < floor < float("inf"):
            raise ValueError(f"floor is the smallest scale and must be positive and finite; got {floor!r}.")
        self.scale, self.per_pixel, self.floor = scale, per_pixel, floor
        self.num_parameters = 2 if per_pixel else 1
        self.raw_scale = nn.Parameter(torch.tensor(RAW_START)) if scale is None and not per_pixel else None

    def distribution(self, loc: Tensor, scale: Any) -> dist.TorchDistribution:
        """The family's member of that location and scale, one for each data dimension."""
        raise NotImplementedError

    def forward(self, features: Tensor, event_dim: int = 1) -> dist.TorchDistribution:
        loc, *from_decoder = self.per_dimension(features, event_dim).unbind(-1)
        raw = from_decoder[0] if self.per_pixel else self.raw_scale
        return self.distribution(loc, self.scale if raw is None else self.floor + softplus(raw)).to_event(event_dim)

    def fix_scale(self, reconstructions: Tensor, x_train: Tensor) -> float:
        """Fixes the scale at the maximum-likelihood value for the residuals of the training data, and returns it.

        For a Gaussian it is the root mean square of x − μ, for a Laplace the mean of |x − μ|; for the others it is
        found by the same iteration, s² ← s² · mean(u ψ(u)) with u = (x − μ) / s and ψ = −(log f)'. From now on the
        scale is a constant. Give the *training* data: a scale computed from the data that are then evaluated makes
        their log p(x) no log-density (it integrates to more than 1).

        Args:
            reconstructions: the means of p(x given z) of the training data, `vae.reconstruct(x_train)`.
            x_train: the training data, in the same shape.

        Raises:
            ValueError: with a scale per pixel, for two shapes, and for residuals that are all 0 or not finite.

        Example:
            >>> likelihood = Gaussian()
            >>> likelihood.fix_scale(torch.zeros(4), torch.tensor([3.0, -3.0, 3.0, 3.0]))
            3.0
            >>> likelihood(torch.zeros(7)).stddev[0]
            tensor(3.)
        """
        if self.per_pixel:
            raise ValueError(f"The scales of this {type(self).__name__} come from the decoder; there is none to fix.")
        if reconstructions.shape != x_train.shape:
            raise ValueError(
                f"Each datum needs its reconstruction; got shapes {tuple(reconstructions.shape)} and "
                f"{tuple(x_train.shape)}."
            )
        residuals = (x_train - reconstructions).detach().double()
        scale = residuals.square().mean().sqrt()
        if not 0 < scale < float("inf"):
            raise ValueError(f"The residuals have a root mean square of {scale.item():.4g}; they fix no scale.")
        with torch.enable_grad():
            for _ in range(200):
                log_scale = scale.log().requires_grad_()
                density = self.distribution(torch.zeros_like(scale), log_scale.exp()).log_prob(residuals)
                (slope,) = torch.autograd.grad(density.mean(), log_scale)  # mean(u ψ(u)) − 1
                if slope.abs() < 1e-9:
                    break
                scale = scale * (1 + slope).sqrt()
        self.scale, self.raw_scale = max(self.floor, scale.item()), None
        return self.scale


def symmetric_log_mass(
    log_cdf: Callable[[Tensor], Tensor], p: dist.TorchDistribution, low: Tensor, high: Tensor
) -> Tensor:
    """log P(low < X ≤ high) of a symmetric location-scale family, from the log-distribution function of f.

    In float64; a bin in the upper tail is mirrored into the lower, where both terms of the difference are small.
    """
    loc, scale = p.loc.double(), p.scale.double()
    tail = low.isinf() | high.isinf()
    mirror = torch.where(tail, high.isinf(), low + high > 2 * loc)
    near = torch.where(mirror, loc - low, high - loc) / scale
    far = torch.where(tail, 0, torch.where(mirror, loc - high, low - loc)) / scale  # 0: no gradient of infinity
    log_near = log_cdf(near)
    return torch.where(tail, log_near, log_diff_exp(log_near, log_cdf(far)))


class Gaussian(LocationScale):
    """Real data: log p(x given z) = −½ Σ log 2πσ² + (x − μ)²/σ².

    Scale, shapes and errors: see `LocationScale`; here it is the standard deviation. A mean squared error without
    constants is the Gaussian of σ² = ½.

    Example:
        >>> p = Gaussian(per_pixel=True)(torch.zeros(5, 2 * 4))
        >>> p.batch_shape, p.event_shape
        (torch.Size([5]), torch.Size([4]))
    """

    def distribution(self, loc: Tensor, scale: Any) -> dist.TorchDistribution:
        return _Normal(loc, scale)

    def log_mass(self, p: dist.TorchDistribution, low: Tensor, high: Tensor) -> Tensor:
        return symmetric_log_mass(torch.special.log_ndtr, p, low, high)


class Laplace(LocationScale):
    """Real data: log p(x given z) = −Σ log 2b + |x − μ| / b, the absolute error made a likelihood.

    Scale, shapes and errors: see `LocationScale`; the standard deviation is √2 b.

    Example:
        >>> Laplace(0.5)(torch.zeros(3)).log_prob(torch.zeros(3))
        tensor(0.)
    """

    def distribution(self, loc: Tensor, scale: Any) -> dist.TorchDistribution:
        return _Laplace(loc, scale)

    def log_mass(self, p: dist.TorchDistribution, low: Tensor, high: Tensor) -> Tensor:
        return symmetric_log_mass(_laplace_log_cdf, p, low, high)


class Logistic(LocationScale):
    """Real data: log p(x given z) = Σ log σ(u) + log σ(−u) − log s, with u = (x − μ) / s and σ the sigmoid.

    Scale, shapes and errors: see `LocationScale`; the standard deviation is π s / √3.

    Example:
        >>> Logistic(0.25)(torch.zeros(3)).log_prob(torch.zeros(3))
        tensor(0.)
    """

    def distribution(self, loc: Tensor, scale: Any) -> dist.TorchDistribution:
        return _Logistic(loc, scale)

    def log_mass(self, p: dist.TorchDistribution, low: Tensor, high: Tensor) -> Tensor:
        return symmetric_log_mass(logsigmoid, p, low, high)


class StudentT(LocationScale):
    """Real data with outliers: Student's t with ν degrees of freedom, location μ and scale s.

    log p(x given z) = Σ log Γ((ν+1)/2) − log Γ(ν/2) − ½ log νπ − log s − (ν+1)/2 · log(1 + u²/ν), u = (x − μ) / s.

    Args:
        df: ν, fixed. The mean exists for ν > 1, and the variance, s² ν / (ν − 2), for ν > 2.
        scale, per_pixel, floor: as of `LocationScale`, with its shapes and errors.

    Example:
        >>> StudentT(5.0, scale=3.0)(torch.zeros(2)).variance
        tensor([15., 15.])
    """

    def __init__(
        self, df: float = 5.0, scale: float | None = None, *, per_pixel: bool = False, floor: float = ROUNDING_SCALE
    ) -> None:
        super().__init__(scale, per_pixel=per_pixel, floor=floor)
        if not 0 < df < float("inf"):
            raise ValueError(f"df, the degrees of freedom, must be positive and finite; got {df!r}.")
        self.df = df

    def distribution(self, loc: Tensor, scale: Any) -> dist.TorchDistribution:
        return _StudentT(self.df, loc, scale)


class _Real(Refusing):
    rule = "A likelihood on the line scores finite real numbers"
    remedy = "Fill or drop missing entries before, and mask them in the model."

    def _allowed(self, value: Tensor) -> Tensor:
        return value.isfinite()


class _Normal(_Real, dist.Normal):
    pass


class _Laplace(_Real, dist.Laplace):
    pass


def _laplace_log_cdf(u: Tensor) -> Tensor:
    return torch.where(u < 0, u - log(2), torch.log1p(-0.5 * torch.exp(-u.clamp(min=0))))


class _Logistic(_Real, dist.Logistic):
    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.icdf(open_uniform(self.loc, self._extended_shape(sample_shape)))


class _StudentT(_Real, Parametric):
    arg_constraints = {"loc": dist.constraints.real, "scale": dist.constraints.positive}  # noqa: RUF012
    support = dist.constraints.real
    has_rsample = True
    loc: Tensor
    scale: Tensor

    def __init__(self, df: float, loc: Tensor, scale: Any) -> None:
        self.df = df
        super().__init__(loc=loc, scale=torch.as_tensor(scale, dtype=loc.dtype, device=loc.device))

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        u = (value - self.loc) / self.scale
        constant = lgamma((self.df + 1) / 2) - lgamma(self.df / 2) - 0.5 * log(self.df * pi)
        return constant - self.scale.log() - (self.df + 1) / 2 * torch.log1p(u.square() / self.df)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(sample_shape)
        gamma = torch._standard_gamma(self.loc.new_full(shape, self.df / 2))
        return self.loc + self.scale * torch.randn_like(gamma) * (self.df / (2 * gamma)).sqrt()

    @property
    def mean(self) -> Tensor:
        return self.loc if self.df > 1 else torch.full_like(self.loc, torch.nan)

    @property
    def variance(self) -> Tensor:
        if self.df <= 2:
            return torch.full_like(self.loc, torch.inf if self.df > 1 else torch.nan)
        return self.scale.square() * (self.df / (self.df - 2))
