"""Normals and points, one for each datum."""

from __future__ import annotations

from math import isqrt

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import softplus

from ppl_vae.posteriors.contract import Posterior, checked_floor


class DiagonalNormal(Posterior):
    """q(z given x) = N(loc, diag(scale²)), the two halves of the encoder's features (Kingma & Welling, 2014).

    `scale = floor + softplus(feature)`: positive for any feature, and no overflow as with an exponential.

    Args:
        floor: the smallest standard deviation, in units of z.

    Shapes:
        features `(*batch, num_features(latent_dim))` to a distribution of batch shape `batch` and event shape
        `(latent_dim,)`.

    Reference:
        Kingma & Welling, Auto-Encoding Variational Bayes, 2014. https://arxiv.org/abs/1312.6114

    Example:
        >>> import torch
        >>> q = DiagonalNormal()(torch.zeros(5, 2 * 3))
        >>> q.batch_shape, q.event_shape
        (torch.Size([5]), torch.Size([3]))
    """

    def __init__(self, *, floor: float = 1e-5) -> None:
        super().__init__()
        self.floor = checked_floor(floor)

    def num_features(self, latent_dim: int) -> int:
        """How many numbers the encoder must give: a location and a scale for each latent dimension."""
        return 2 * latent_dim

    def forward(self, features: Tensor) -> dist.TorchDistribution:
        loc, raw = features.chunk(2, dim=-1)
        return dist.Normal(loc, self.floor + softplus(raw)).to_event(1)


class FullCovarianceNormal(Posterior):
    """q(z given x) = N(loc, L Lᵀ): an encoder that gives mean and covariance.

    L = diag(scale) (I + N / √latent_dim), `scale = floor + softplus(feature)` as in `DiagonalNormal` and N strictly
    lower triangular: any covariance, and one that can be inverted whatever the features. Features grow with
    latent_dim²: 20 dimensions need 230, 50 need 1,325.

    Args:
        floor: the smallest diagonal entry of L, in units of z.

    Shapes:
        features `(*batch, num_features(latent_dim))`: locations, scales and N row by row, to a distribution of batch
        shape `batch` and event shape `(latent_dim,)`.

    Example:
        >>> q = FullCovarianceNormal()(torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0]))
        >>> q.covariance_matrix / q.variance[0]             # N is 1 where all else is 0
        tensor([[1.0000, 0.7071],
                [0.7071, 1.5000]])
    """

    def __init__(self, *, floor: float = 1e-5) -> None:
        super().__init__()
        self.floor = checked_floor(floor)

    def num_features(self, latent_dim: int) -> int:
        """How many numbers the encoder must give: locations, scales and what is below the diagonal."""
        return 2 * latent_dim + latent_dim * (latent_dim - 1) // 2

    def forward(self, features: Tensor) -> dist.TorchDistribution:
        # num_features solved for latent_dim
        dim = (isqrt(9 + 8 * features.shape[-1]) - 3) // 2
        loc, raw, below = features.split([dim, dim, features.shape[-1] - 2 * dim], dim=-1)
        scale = self.floor + softplus(raw)
        row, column = torch.tril_indices(dim, dim, offset=-1, device=features.device)
        # Over √dim, so that z is as much moved by all that is below the diagonal as by the diagonal.
        lower = torch.diag_embed(torch.ones_like(scale))
        lower[..., row, column] = below / dim**0.5
        return dist.MultivariateNormal(loc, scale_tril=scale.unsqueeze(-1) * lower)


class Point(Posterior):
    """All of q(z given x) at one point, the encoder's features: it makes a plain autoencoder of a VAE.

    It has no density, so nothing that needs log q(z given x), such as `importance_sampling`, accepts it.

    Example:
        >>> import torch
        >>> Point()(torch.ones(5, 3)).sample().shape
        torch.Size([5, 3])
    """

    def num_features(self, latent_dim: int) -> int:
        """How many numbers the encoder must give: the latent itself."""
        return latent_dim

    def forward(self, features: Tensor) -> dist.TorchDistribution:
        return dist.Delta(features).to_event(1)
