"""Pareto k: ArviZ's number on the same weights, and the values known in closed form."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest
import torch

from ppl_vae import pareto

NUM_SAMPLES = 100_000


def arviz_k(log_weights: torch.Tensor) -> np.ndarray:
    """Pareto k of `(num_samples, batch)` log weights by whichever ArviZ is installed."""
    samples_last = log_weights.T.double().numpy().copy()
    arviz = pytest.importorskip("arviz")
    if hasattr(arviz, "psislw"):
        return np.asarray(arviz.psislw(samples_last)[1])
    from arviz_stats.base import array_stats

    return np.asarray(array_stats.psislw(-samples_last)[1])  # 1.x takes minus the log weight


# ArviZ 0.23 rounds the length of the tail up, 1.x down: sizes at which both have the same tail.
@pytest.mark.parametrize("num_samples", [50, 100, 1024, 10_000])
@pytest.mark.parametrize("offset", [0.0, -700.0, 5000.0])
def test_equals_arviz(num_samples: int, offset: float) -> None:
    lw = torch.randn(num_samples, 7, dtype=torch.float64) * torch.linspace(0.1, 5, 7) + offset
    np.testing.assert_allclose(pareto.shape(lw).numpy(), arviz_k(lw), rtol=0, atol=1e-9)


@pytest.mark.parametrize("num_samples", [50, 100, 1024, 10_000])
def test_smoothed_weights_equal_arviz(num_samples: int) -> None:
    """The whole set of weights after smoothing, normalised as ArviZ does."""
    lw = torch.randn(num_samples, 7, dtype=torch.float64) * torch.linspace(0.1, 5, 7) - 700
    ordered, order = lw.sort(0, descending=True)
    kept = pareto.tail_length(num_samples) + 1
    smoothed = torch.cat([pareto.smoothed(ordered[:kept].T, num_samples)[1].T, ordered[kept:]])
    ours = torch.empty_like(lw).scatter(0, order, smoothed)
    np.testing.assert_allclose((ours - ours.logsumexp(0)).T.numpy(), arviz_smoothed(lw), rtol=0, atol=1e-9)


def arviz_smoothed(log_weights: torch.Tensor) -> np.ndarray:
    """Pareto-smoothed, normalised log weights `(batch, num_samples)` by whichever ArviZ is installed."""
    samples_last = log_weights.T.double().numpy().copy()
    arviz = pytest.importorskip("arviz")
    if hasattr(arviz, "psislw"):
        return np.asarray(arviz.psislw(samples_last)[0])
    from arviz_stats.base import array_stats

    return np.asarray(array_stats.psislw(-samples_last)[0])


def test_equals_arviz_with_ties_and_underflow() -> None:
    if not hasattr(pytest.importorskip("arviz"), "psislw"):
        pytest.skip("ArviZ 1.x keeps ties and underflowing weights in the tail; 0.23 does not, nor do we")
    ties = torch.randn(1000, 5, dtype=torch.float64).round(decimals=1)
    wide = torch.randn(1000, 5, dtype=torch.float64) * 400
    for lw in (ties, wide):
        np.testing.assert_allclose(pareto.shape(lw).numpy(), arviz_k(lw), rtol=0, atol=1e-9)


def gaussian_log_weights(variance_ratio: float, generator: torch.Generator) -> torch.Tensor:
    """log p/q for p = N(0, 1) and q = N(0, variance_ratio), at draws from q."""
    z = torch.randn(NUM_SAMPLES, 5, generator=generator, dtype=torch.float64) * variance_ratio**0.5
    return -0.5 * z**2 + 0.5 * z**2 / variance_ratio + 0.5 * np.log(variance_ratio)


# The known k is 1 − variance ratio. Estimates of large k are known to fall short.
@pytest.mark.parametrize(("variance_ratio", "known"), [(0.2, 0.8), (0.3, 0.7), (0.5, 0.5), (0.7, 0.3), (0.9, 0.1)])
def test_known_k_of_a_narrow_gaussian(variance_ratio: float, known: float) -> None:
    k = pareto.shape(gaussian_log_weights(variance_ratio, torch.Generator().manual_seed(1)))
    assert abs(k.mean() - known) < 0.15
    if known >= 0.5:
        assert k.mean() < known + 0.02


def test_bounded_weights_have_no_positive_k() -> None:
    """A guide wider than the posterior bounds the weights."""
    k = pareto.shape(gaussian_log_weights(1.5, torch.Generator().manual_seed(1)))
    assert (k < 0.05).all()


def test_mistaken_arguments_are_seen() -> None:
    """Minus the log weight and samples on the other axis give another k: the table above would catch them."""
    lw = gaussian_log_weights(0.3, torch.Generator().manual_seed(1))
    assert abs(pareto.shape(-lw).mean() - 0.7) > 0.15
    assert pareto.shape(lw.T[:, :40]).shape == (40,)


def test_edges() -> None:
    constant = torch.full((1000, 2), -500.0)
    assert (pareto.shape(constant) == -inf).all()
    assert (pareto.shape(torch.randn(20, 3)) == inf).all()
    assert pareto.shape(torch.randn(21, 3)).isfinite().all()
    assert (pareto.shape(torch.randn(1, 3)) == inf).all()
    with_impossible = torch.randn(1000, 3, dtype=torch.float64)
    expected = pareto.shape(with_impossible)
    with_impossible[with_impossible.argmin(0), torch.arange(3)] = -inf
    assert torch.equal(pareto.shape(with_impossible), expected)
    assert (pareto.shape(torch.full((1000, 2), -inf)) == inf).all()


def test_permutation_of_samples_does_nothing() -> None:
    lw = torch.randn(997, 3, dtype=torch.float64)
    assert torch.equal(pareto.shape(lw), pareto.shape(lw[torch.randperm(997)]))


def test_threshold() -> None:
    assert pareto.threshold(10**6) == 0.7
    assert pareto.threshold(100) == pytest.approx(0.5)
    assert pareto.threshold(1) == -inf
    assert [pareto.tail_length(n) for n in (20, 21, 100, 1000)] == [4, 5, 20, 95]
