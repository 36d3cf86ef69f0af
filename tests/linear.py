"""The package's neural programs with linear networks set by hand, so that everything about them is known exactly.

With orthogonal loadings every posterior is a diagonal normal whose mean is linear in what it is given and whose scale
is constant, and the posterior of a class is a softmax of linear functions: each guide below can be exact, and is.
"""

from __future__ import annotations

from math import log
from typing import Any

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

import ppl_vae as pv

NOISE = 0.6


def orthogonal(rows: int, columns: int) -> Tensor:
    """A matrix whose columns are orthogonal, of different lengths."""
    g = torch.Generator().manual_seed(7)
    q, _ = torch.linalg.qr(torch.randn(rows, columns, generator=g, dtype=torch.float64))
    return q * torch.linspace(0.7, 1.6, columns, dtype=torch.float64)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def raw(scale: Tensor) -> Tensor:
    """What `DiagonalNormal` makes the standard deviation `scale` of."""
    return torch.expm1(scale - 1e-5).log()


def set_normal(layer: Any, slope: Tensor, loc: Tensor, scale: Tensor) -> None:
    """Makes a linear layer give N(slope · input + loc, diag(scale²))."""
    with torch.no_grad():
        layer.weight.copy_(torch.cat([slope, torch.zeros_like(slope)]))
        layer.bias.copy_(torch.cat([loc, raw(scale)]))


def hierarchical(
    data_dim: int = 7, latent_dims: tuple[int, int] = (3, 2)
) -> tuple[pv.HierarchicalVAE, MultivariateNormal]:
    """z1 = A z2 + a + noise, x = W z1 + b + noise, with the exact posterior for a guide; and the exact p(x)."""
    dim1, dim2 = latent_dims
    w, b, a = orthogonal(data_dim, dim1), randn(data_dim, seed=1), randn(dim1, seed=2)
    loading = torch.zeros(dim1, dim2, dtype=torch.float64)
    loading.diagonal().copy_(torch.linspace(0.5, 0.9, dim2))
    scale1 = torch.linspace(0.4, 0.8, dim1, dtype=torch.float64)
    hvae = pv.HierarchicalVAE(data_dim, latent_dims, hidden_dims=((), ()), likelihood=pv.likelihoods.Gaussian(NOISE))
    hvae = hvae.double()

    set_normal(hvae.model.upper.layers[0], loading, a, scale1)
    with torch.no_grad():
        hvae.model.decoder.layers[0].weight.copy_(w)
        hvae.model.decoder.layers[0].bias.copy_(b)
    of_z1 = (loading @ loading.T).diagonal() + scale1**2  # variances: the loadings make z1's independent
    variance1 = 1 / (1 / of_z1 + (w.T @ w).diagonal() / NOISE**2)
    slope = variance1[:, None] * w.T / NOISE**2
    set_normal(hvae.guide.encoder.layers[0], slope, variance1 * a / of_z1 - slope @ b, variance1.sqrt())
    weighted = loading / scale1[:, None] ** 2
    variance2 = 1 / (1 + (loading.T @ weighted).diagonal())
    slope = variance2[:, None] * weighted.T
    set_normal(hvae.guide.upper.layers[0], slope, -slope @ a, variance2.sqrt())
    covariance = w @ torch.diag(of_z1) @ w.T + NOISE**2 * torch.eye(data_dim, dtype=torch.float64)
    return hvae, MultivariateNormal(w @ a + b, covariance)


def _set_conditional(cvae: pv.ConditionalVAE) -> MultivariateNormal:
    """x = W z + b + V_y + noise, with the exact posterior of z; p(x given y) for each class, `(num_classes,)`."""
    w = orthogonal(cvae.data_shape[0], cvae.latent_dim)
    b, v = randn(len(w), seed=3), 0.7 * randn(cvae.num_classes, len(w), seed=4)
    decoder, encoder = cvae.model.decoder, cvae.guide.encoder
    variance = 1 / (1 + (w.T @ w).diagonal() / NOISE**2)
    slope = variance[:, None] * w.T / NOISE**2
    set_normal(encoder.of_x, slope, -slope @ b, variance.sqrt())
    with torch.no_grad():
        decoder.of_x.weight.copy_(w)
        decoder.of_x.bias.copy_(b)
        decoder.of_y.weight.copy_(v)
        encoder.of_y.weight.copy_(torch.cat([-v @ slope.T, torch.zeros(len(v), cvae.latent_dim)], 1))
    return MultivariateNormal(b + v, w @ w.T + NOISE**2 * torch.eye(len(w), dtype=torch.float64))


def conditional(data_dim: int = 7, num_classes: int = 5, latent_dim: int = 3) -> tuple[Any, MultivariateNormal]:
    """A `ConditionalVAE` with an exact guide, and its exact p(x given y) for each class."""
    cvae = pv.ConditionalVAE(
        data_dim, num_classes, latent_dim, hidden_dims=(), likelihood=pv.likelihoods.Gaussian(NOISE)
    ).double()
    return cvae, _set_conditional(cvae)


def m2(data_dim: int = 7, num_classes: int = 5, latent_dim: int = 3) -> tuple[pv.M2, MultivariateNormal]:
    """An `M2` with an exact guide, classifier and all, and its exact p(x given y) for each class."""
    both = pv.M2(data_dim, num_classes, latent_dim, hidden_dims=(), likelihood=pv.likelihoods.Gaussian(NOISE)).double()
    p = _set_conditional(both)
    # log p(y given x) is linear in x, but for what all classes share, since they share a covariance.
    slope = torch.linalg.solve(p.covariance_matrix, p.mean.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        both.guide.classifier.layers[0].weight.copy_(slope)
        both.guide.classifier.layers[0].bias.copy_(-0.5 * (slope * p.mean).sum(-1))
    return both, p


def log_pxy(p: MultivariateNormal, x: Tensor) -> Tensor:
    """log p(x, y) of `m2` for every class, `(num_classes, batch)`."""
    return p.log_prob(x.unsqueeze(1)).T - log(len(p.mean))
