"""The Pareto k of importance weights: how heavy their tail is, and so whether their mean can be believed."""

from __future__ import annotations

from math import ceil, log10, sqrt

import numpy as np
import torch
from torch import Tensor

# Weights that differ by no more than rounding have no tail to fit.
CONSTANT = 1e-8


def tail_length(num_samples: int) -> int:
    """How many of the largest weights the fit looks at: ⌈min(S/5, 3 √S)⌉ (Vehtari et al., 2024)."""
    return ceil(min(num_samples / 5, 3 * sqrt(num_samples)))


def threshold(num_samples: int) -> float:
    """The k above which a mean of that many weights is not to be believed: min(1 − 1 / log₁₀ S, 0.7).

    Example:
        >>> threshold(100), threshold(5000)
        (0.5, 0.7)
    """
    return min(1 - 1 / log10(num_samples), 0.7) if num_samples > 1 else -float("inf")


def shape(log_weights: Tensor) -> Tensor:
    """The Pareto k of each column of log weights.

    Below ½ the weights have a finite variance and the standard error of their mean holds; below 0.7 the mean is
    practical; above, it misses mass by an amount that nothing computed from these weights tells. Weights that are
    all equal, as a perfect guide gives, have k = −∞; fewer than 21 samples have no tail to fit, and k = ∞.

    Args:
        log_weights: `(num_samples, batch)`.

    Returns:
        float64 `(batch,)`; the same number as ArviZ's `psislw` on the same weights.

    Reference:
        Vehtari, Simpson, Gelman, Yao & Gabry, Pareto Smoothed Importance Sampling, 2024.
        https://jmlr.org/papers/v25/19-556.html

    Example:
        >>> z = torch.randn(10_000, 2, generator=torch.Generator().manual_seed(0))
        >>> shape(torch.stack([z[:, 0] * 0.1, 2 * z[:, 1].abs() ** 1.5], 1)) < 0.7      # a light and a heavy tail
        tensor([ True, False])
    """
    num_samples = len(log_weights)
    kept = min(tail_length(num_samples) + 1, num_samples)
    largest = log_weights.double().T.topk(kept, dim=1).values
    return smoothed(largest, num_samples)[0]


def smoothed(largest: Tensor, num_samples: int) -> tuple[Tensor, Tensor]:
    """The Pareto k of weights of which only the largest were kept, and those smoothed.

    The largest weights are replaced by the quantiles of the Pareto distribution fitted to them, none above the
    largest that was seen: Pareto-smoothed importance sampling, whose mean varies less and is a little biased.

    Args:
        largest: float64 log weights in descending order, `(batch, tail_length(num_samples) + 1)`.
        num_samples: of how many.

    Returns:
        k, float64 `(batch,)`, and log weights in the shape of `largest`, as they were where there is no tail to fit.
    """
    k = torch.full(largest.shape[:1], float("inf"), dtype=torch.float64, device=largest.device)
    result = largest.clone()
    if largest.shape[1] <= tail_length(num_samples):
        return k, result
    relative = largest - largest[:, :1]
    smallest = float(np.log(np.finfo(float).tiny))
    cutoff = relative[:, -1:].clamp(min=smallest)
    in_tail = relative > cutoff
    sizes = in_tail.sum(1)
    for size in sizes.unique().tolist():
        if size > 4:
            at = sizes == size
            excess = relative[at, :size].flip(1).exp() - cutoff[at].exp()
            k[at], scale = _fit(excess)
            quantiles = torch.log(_quantiles(k[at], scale, size) + cutoff[at].exp()).clamp(max=0.0)
            fitted = torch.where(k[at].isfinite().unsqueeze(1), quantiles.flip(1), relative[at, :size])
            result[at, :size] = largest[at, :1] + fitted
    constant = relative[:, -1] > -CONSTANT
    k[constant] = -float("inf")
    return k, torch.where(constant.unsqueeze(1), largest, result)


def _quantiles(k: Tensor, scale: Tensor, size: int) -> Tensor:
    """Of a generalised Pareto distribution, ascending, `(batch, size)`."""
    p = (torch.arange(size, dtype=torch.float64, device=k.device) + 0.5) / size
    k = torch.where(k.abs() < np.finfo(float).eps, np.finfo(float).eps, k).unsqueeze(1)
    return scale.unsqueeze(1) * torch.expm1(-k * torch.log1p(-p)) / k


def _fit(excess: Tensor) -> tuple[Tensor, Tensor]:
    """Shape and scale of a generalised Pareto distribution for ascending excesses `(batch, size)`.

    The quasi-Bayesian estimate of Zhang & Stephens (2009), drawn a little towards ½ as by Vehtari et al. (2024).
    """
    size = excess.shape[1]
    num_points = 30 + int(sqrt(size))
    points = torch.arange(1, num_points + 1, dtype=torch.float64, device=excess.device)
    quartile, largest = excess[:, int(size / 4 + 0.5) - 1 : int(size / 4 + 0.5)], excess[:, -1:]
    b = (1 - (num_points / (points - 0.5)).sqrt()) / (3 * quartile) + 1 / largest
    k = torch.stack([(-b[:, j : j + 1] * excess).log1p().mean(1) for j in range(num_points)], 1)
    weights = (size * ((-b / k).log() - k - 1)).softmax(1)
    weights = weights.where(weights >= 10 * np.finfo(float).eps, 0)
    b = (b * weights / weights.sum(1, keepdim=True)).sum(1, keepdim=True)
    k_post = (-b * excess).log1p().mean(1)
    return (size * k_post + 5) / (size + 10), -k_post / b.squeeze(1)
