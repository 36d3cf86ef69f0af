"""A prior that is a normalising flow."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import nn
from torch.nn.functional import softplus

from ppl_vae.distributions import Couplings
from ppl_vae.priors.contract import RAW_ONE, checked_count


class FlowPrior(nn.Module):
    """p(z): noise through learned affine coupling layers, then a learned location and scale.

    Before training it is N(0, I). Draws and densities cost one pass through the layers each.

    Args:
        latent_dim: length of a latent, at least 2.
        num_layers: 2 or more, for every coordinate to be moved.
        hidden_dim: width of each layer's network.

    Reference:
        Chen et al., Variational Lossy Autoencoder, 2017. https://arxiv.org/abs/1611.02731

    Example:
        >>> p = FlowPrior(3)()
        >>> p.sample((5,)).shape, p.event_shape
        (torch.Size([5, 3]), torch.Size([3]))
    """

    def __init__(self, latent_dim: int, *, num_layers: int = 6, hidden_dim: int = 100) -> None:
        super().__init__()
        self.latent_dim = checked_count("latent_dim", latent_dim)
        self.num_layers, self.hidden_dim = num_layers, hidden_dim
        self.couplings = Couplings(latent_dim, num_layers=num_layers, hidden_dim=hidden_dim)
        self.loc = nn.Parameter(torch.zeros(latent_dim))
        self.raw_scale = nn.Parameter(torch.full((latent_dim,), RAW_ONE))

    def forward(self) -> dist.TorchDistribution:
        return self.couplings(self.loc, softplus(self.raw_scale))
