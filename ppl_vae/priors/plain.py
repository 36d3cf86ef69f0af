"""The priors without anything to learn."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_vae.priors.contract import checked_count


class StandardNormal(nn.Module):
    """The prior N(0, I): `prior()` is a distribution of event shape `(latent_dim,)`.

    Args:
        latent_dim: length of a latent, at least 1.

    Example:
        >>> StandardNormal(3)().log_prob(torch.zeros(3))   # -3/2 log 2π
        tensor(-2.7568)
    """

    zero: Tensor

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = checked_count("latent_dim", latent_dim)
        # Not saved with the weights: it only carries device and dtype.
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def forward(self) -> dist.TorchDistribution:
        return dist.Normal(self.zero, torch.ones_like(self.zero)).expand([self.latent_dim]).to_event(1)


class Flat(nn.Module):
    """The improper prior p(z) = 1 that has no say in where z lies: it makes a plain autoencoder of a VAE.

    Args:
        latent_dim: length of a latent, at least 1.

    Example:
        >>> Flat(3)().log_prob(torch.ones(5, 3))
        tensor([0., 0., 0., 0., 0.])
    """

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = checked_count("latent_dim", latent_dim)

    def forward(self) -> dist.TorchDistribution:
        return _Flat(dist.constraints.real_vector, torch.Size(), torch.Size([self.latent_dim]))


class _Flat(dist.ImproperUniform):
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        raise NotImplementedError(
            "A flat prior integrates to infinity and has no samples, so an autoencoder cannot generate data. "
            "Fit a VAE instead."
        )
