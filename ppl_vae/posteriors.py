"""Families of q(z given x): `nn.Module`s, encoder features to a `Distribution` over z."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor, nn
from torch.nn.functional import softplus


class Posterior(nn.Module):
    """What every family of q(z given x) has."""

    def num_features(self, latent_dim: int) -> int:
        """How many numbers the encoder must give for a latent of that length."""
        raise NotImplementedError

    def forward(self, features: Tensor) -> dist.TorchDistribution:
        raise NotImplementedError


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
        if not floor >= 0:
            raise ValueError(f"floor is a smallest standard deviation and cannot be negative; got {floor!r}.")
        self.floor = floor

    def num_features(self, latent_dim: int) -> int:
        """How many numbers the encoder must give: a location and a scale for each latent dimension."""
        return 2 * latent_dim

    def forward(self, features: Tensor) -> dist.TorchDistribution:
        loc, raw = features.chunk(2, dim=-1)
        return dist.Normal(loc, self.floor + softplus(raw)).to_event(1)


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
