"""Every likelihood with a grid of features and data, extremes included, and its log-probability in mpmath."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from math import exp, log
from typing import Any

import torch
from mpmath import mp, mpf
from torch import Tensor

from ppl_vae import likelihoods as lh

mp.dps = 50
Numbers = Sequence[Any]


@dataclass
class Family:
    """`features` is `(cases, num_parameters)`, for data of one dimension; `reference(features, x)` is exact."""

    make: Callable[[], lh.Likelihood]
    features: Tensor
    data: Tensor
    reference: Callable[[Numbers, Any], Any]

    def scored(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Log-probabilities `(data, cases)`, and their gradients with respect to the features."""
        likelihood = self.make().to(dtype)
        features = self.features.to(dtype).requires_grad_()
        log_prob = likelihood(features).log_prob(self.data.to(dtype)[:, None, None])
        (gradient,) = torch.autograd.grad(log_prob.sum(), features)
        return log_prob.detach(), gradient

    def exact(self) -> Tensor:
        """The same log-probabilities, from mpmath."""
        cases = [[mpf(value) for value in case] for case in self.features.tolist()]
        rows = [[float(self.reference(case, mpf(x))) for case in cases] for x in self.data.tolist()]
        return torch.tensor(rows, dtype=torch.float64)

    def excess(self) -> Tensor:
        """How far the float32 log-probabilities are off, in units of what is allowed: 1e-3 nat or 1e-5 of the value."""
        exact = self.exact()
        return (self.scored()[0].double() - exact).abs() / (1e-3 + 1e-5 * exact.abs())


def grid(*axes: Sequence[float]) -> Tensor:
    return torch.tensor(list(product(*axes)), dtype=torch.float32)


def softplus(x: Any) -> Any:
    return mp.log1p(mp.exp(x))


def log_sigmoid(x: Any) -> Any:
    return -softplus(-x)


def sigmoid(x: Any) -> Any:
    return mp.exp(log_sigmoid(x))


# Binary data and the interval.


def bernoulli(f: Numbers, x: Any) -> Any:
    return x * f[0] - softplus(f[0])


def continuous_bernoulli(f: Numbers, x: Any) -> Any:
    constant = mp.log(f[0] / mp.expm1(f[0])) if f[0] else mpf(0)
    return constant + f[0] * x


def beta(f: Numbers, x: Any) -> Any:
    a, b = (mpf(1e-3) + softplus(raw) for raw in f)
    log_beta = mp.loggamma(a) + mp.loggamma(b) - mp.loggamma(a + b)
    return (a - 1) * mp.log(x) + (b - 1) * mp.log1p(-x) - log_beta


# The line: f is (location, raw scale) with this floor.
FLOOR = float(torch.tensor(exp(-8.0)))
LOCATIONS, RAW_SCALES = [-3.0, 0.0, 0.5, 60.0], [-60.0, -5.0, 0.0, 7.0]


def on_the_line(log_density: Callable[[Any], Any]) -> Callable[[Numbers, Any], Any]:
    def reference(f: Numbers, x: Any) -> Any:
        scale = FLOOR + softplus(f[1])
        return log_density((x - f[0]) / scale) - mp.log(scale)

    return reference


def student_t(df: float) -> Callable[[Any], Any]:
    nu = mpf(df)
    constant = mp.loggamma((nu + 1) / 2) - mp.loggamma(nu / 2) - mp.log(nu * mp.pi) / 2
    return lambda u: constant - (nu + 1) / 2 * mp.log1p(u * u / nu)


def line(family: Callable[..., lh.Likelihood], log_density: Callable[[Any], Any]) -> Family:
    return Family(
        lambda: family(per_pixel=True, floor=FLOOR),
        grid(LOCATIONS, RAW_SCALES),
        torch.tensor([-1.0, 0.0, 0.5, 0.501, 3.0, 1000.0]),
        on_the_line(log_density),
    )


# Bins.


def normal_cdf(u: Any) -> Any:
    return mp.erfc(-u / mp.sqrt(2)) / 2


def laplace_cdf(u: Any) -> Any:
    return mp.exp(u) / 2 if u < 0 else 1 - mp.exp(-u) / 2


def log_bin(cdf: Callable[[Any], Any], loc: Any, scale: Any, x: Any, levels: int) -> Any:
    low = -mp.inf if x == 0 else ((x - mpf(1) / 2) / (levels - 1) - loc) / scale
    high = mp.inf if x == levels - 1 else ((x + mpf(1) / 2) / (levels - 1) - loc) / scale
    low, high = (-high, -low) if low + high > 0 else (low, high)
    return mp.log(cdf(high) - (0 if low == -mp.inf else cdf(low)))


def binned(
    family: Callable[..., lh.Likelihood], cdf: Callable[[Any], Any], data: Sequence[float], levels: int = 256
) -> Family:
    return Family(
        family,
        grid([-1.0, 0.0, 0.2, 0.5, 60.0], [-60.0, -5.0, 0.0, 7.0]),
        torch.tensor(data),
        lambda f, x: log_bin(cdf, f[0], FLOOR + softplus(f[1]), x, levels),
    )


BYTES = [0.0, 1.0, 100.0, 127.0, 128.0, 254.0, 255.0]


def binned_continuous_bernoulli(f: Numbers, x: Any) -> Any:
    if not f[0]:
        return -mp.log(17)
    return mp.log((mp.exp(f[0] * (x + 1) / 17) - mp.exp(f[0] * x / 17)) / mp.expm1(f[0]))


START = mp.log(mp.expm1(mpf("0.2")))


def mixture(f: Numbers, x: Any) -> Any:
    logits, loc, raw = f[:3], f[3:6], f[6:]
    total = mp.log(sum(mp.exp(logit) for logit in logits))
    parts = [
        mp.exp(logit - total + log_bin(sigmoid, mu, FLOOR + softplus(r + START), x, 256))
        for logit, mu, r in zip(logits, loc, raw, strict=True)
    ]
    return mp.log(sum(parts))


# Tables, trials and counts.


def categorical(f: Numbers, x: Any) -> Any:
    return f[int(x)] - mp.log(sum(mp.exp(logit) for logit in f))


def log_binomial(n: int, x: Any) -> Any:
    return mp.loggamma(n + 1) - mp.loggamma(x + 1) - mp.loggamma(n - x + 1)


def binomial(levels: int) -> Callable[[Numbers, Any], Any]:
    n = levels - 1
    return lambda f, x: log_binomial(n, x) + x * log_sigmoid(f[0]) + (n - x) * log_sigmoid(-f[0])


def poisson(f: Numbers, x: Any) -> Any:
    return x * f[0] - mp.exp(f[0]) - mp.loggamma(x + 1)


def negative_binomial(f: Numbers, x: Any) -> Any:
    mu, theta = mp.exp(f[0]), mp.exp(f[1])
    ways = mp.loggamma(x + theta) - mp.loggamma(theta) - mp.loggamma(x + 1)
    return ways + theta * mp.log(theta / (theta + mu)) + x * mp.log(mu / (theta + mu))


def zero_inflated(f: Numbers, x: Any) -> Any:
    probability = sigmoid(-f[2]) * mp.exp(negative_binomial(f, x))
    return mp.log(probability + (sigmoid(f[2]) if x == 0 else 0))


LOGITS = [-100.0, -60.0, -15.0, -1.0, -0.61, -0.59, -1e-4, 0.0, 1e-7, 0.3, 20.0, 60.0, 100.0]
COUNTS = torch.tensor([0.0, 1.0, 7.0, 1000.0, 1e6])
LOG_MEANS = [-60.0, -3.0, 0.0, 2.0, log(1e6), 59.0, 60.0]
LOG_THETAS = [-20.0, -8.0, 0.0, 9.2, log(1e6), 20.0]
MIXED = torch.cat(
    [
        torch.randn(5, 9, generator=torch.Generator().manual_seed(0)),
        torch.tensor([[60.0, -60.0, 0.0, 0.2, 0.9, 0.5, -60.0, 3.0, -5.0], [0.0, 0.0, 0.0, *[60.0] * 3, *[-60.0] * 3]]),
    ]
)

FAMILIES: dict[str, Family] = {
    "Bernoulli": Family(lh.Bernoulli, grid(LOGITS), torch.tensor([0.0, 1.0]), bernoulli),
    "ContinuousBernoulli": Family(
        lh.ContinuousBernoulli, grid(LOGITS), torch.tensor([0.0, 1e-3, 0.25, 0.5, 0.999, 1.0]), continuous_bernoulli
    ),
    "Beta": Family(
        lh.Beta,
        grid([-60.0, -3.0, 0.0, 3.0, 1e4, 1e6], [-60.0, -3.0, 0.0, 3.0, 1e4, 1e6]),
        torch.tensor([1e-30, 1e-6, 0.1, 0.5, 0.9, 1 - 2**-24]),
        beta,
    ),
    "Gaussian": line(lh.Gaussian, lambda u: -(u * u + mp.log(2 * mp.pi)) / 2),
    "Laplace": line(lh.Laplace, lambda u: -abs(u) - mp.log(2)),
    "Logistic": line(lh.Logistic, lambda u: log_sigmoid(u) + log_sigmoid(-u)),
    **{
        f"StudentT({df:g})": line(lambda df=df, **options: lh.StudentT(df, **options), student_t(df))
        for df in (0.5, 1.0, 3.0, 30.0, 1e6)
    },
    "DiscretisedGaussian": binned(lambda: lh.DiscretisedGaussian(per_pixel=True, floor=FLOOR), normal_cdf, BYTES),
    "DiscretisedLogistic": binned(lambda: lh.DiscretisedLogistic(per_pixel=True, floor=FLOOR), sigmoid, BYTES),
    "DiscretisedLogistic(17)": binned(
        lambda: lh.DiscretisedLogistic(17, per_pixel=True, floor=FLOOR), sigmoid, [0.0, 1.0, 8.0, 16.0], levels=17
    ),
    "Binned(Laplace)": binned(lambda: lh.Binned(lh.Laplace(per_pixel=True, floor=FLOOR)), laplace_cdf, BYTES),
    "Binned(ContinuousBernoulli)": Family(
        lambda: lh.Binned(lh.ContinuousBernoulli(), 17),
        grid(LOGITS),
        torch.tensor([0.0, 1.0, 8.0, 15.0, 16.0]),
        binned_continuous_bernoulli,
    ),
    "LogisticMixture": Family(lambda: lh.LogisticMixture(3, floor=FLOOR), MIXED, torch.tensor(BYTES), mixture),
    "Categorical": Family(
        lambda: lh.Categorical(5),
        torch.tensor([[0.0] * 5, [60.0, -60.0, 0.0, 1.0, 2.0], [-60.0] * 5, [1e-4, 0.0, 20.0, 0.1, 19.0]]),
        torch.arange(5.0),
        categorical,
    ),
    "Binomial": Family(lh.Binomial, grid(LOGITS), torch.arange(17.0), binomial(17)),
    "Binomial(65536)": Family(
        lambda: lh.Binomial(65536), grid(LOGITS), torch.tensor([0.0, 1.0, 30000.0, 65535.0]), binomial(65536)
    ),
    "Poisson": Family(lh.Poisson, grid(LOG_MEANS), COUNTS, poisson),
    "NegativeBinomial": Family(
        lambda: lh.NegativeBinomial(per_pixel=True), grid(LOG_MEANS, LOG_THETAS), COUNTS, negative_binomial
    ),
    "ZeroInflatedNegativeBinomial": Family(
        lambda: lh.ZeroInflatedNegativeBinomial(per_pixel=True),
        grid(LOG_MEANS, [-8.0, 0.0, log(1e6)], [-60.0, 0.0, 60.0]),
        COUNTS,
        zero_inflated,
    ),
}
