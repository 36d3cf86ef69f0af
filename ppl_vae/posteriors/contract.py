"""What every family of q(z given x) has."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor, nn


class Posterior(nn.Module):
    """What every family of q(z given x) has; see the contract in the docstring of this room."""

    def num_features(self, latent_dim: int) -> int:
        """How many numbers the encoder must give for a latent of that length."""
        raise NotImplementedError

    def forward(self, features: Tensor) -> dist.TorchDistribution:
        raise NotImplementedError


class OfOneLength(Posterior):
    """A family with weights of its own, and so for latents of one length.

    Args:
        latent_dim: length of a latent.
    """

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim

    def check_length(self, latent_dim: int) -> None:
        """Refuses latents of another length."""
        if latent_dim != self.latent_dim:
            raise ValueError(
                f"This {type(self).__name__} was built for latents of {self.latent_dim} dimensions; got {latent_dim}."
            )


def checked_floor(floor: float) -> float:
    """A smallest standard deviation that is one."""
    if not floor >= 0:
        raise ValueError(f"floor is a smallest standard deviation and cannot be negative; got {floor!r}.")
    return floor
