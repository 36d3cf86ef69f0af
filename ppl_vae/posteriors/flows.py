"""Normalising flows, one for each datum: a diagonal normal from the encoder, bent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import AffineTransform
from torch.nn.functional import softplus

from ppl_vae.distributions import Couplings, Flow
from ppl_vae.posteriors.contract import OfOneLength, checked_floor


class CouplingFlow(OfOneLength):
    """q(z given x): noise through affine coupling layers that see the datum, then a location and a scale.

    z = loc + scale T(ε; context), loc, scale and context from the encoder; `scale = floor + softplus(feature)`. Before
    training T is the identity, and q is `DiagonalNormal`'s. Draws and densities cost one pass through the layers each.

    Args:
        latent_dim: length of a latent, at least 2.
        num_layers: 2 or more, for every coordinate to be moved.
        hidden_dim: width of each layer's network.
        context_dim: how many numbers of the encoder every layer sees.
        floor: the smallest standard deviation before T has a say, in units of z.

    Shapes:
        features `(*batch, num_features(latent_dim))`: locations, scales and context, to a distribution of batch shape
        `batch` and event shape `(latent_dim,)`.

    References:
        Rezende & Mohamed, Variational Inference with Normalizing Flows, 2015. https://arxiv.org/abs/1505.05770
        Dinh, Sohl-Dickstein & Bengio, Density Estimation using Real NVP, 2017. https://arxiv.org/abs/1605.08803

    Example:
        >>> posterior = CouplingFlow(3)
        >>> q = posterior(torch.randn(7, posterior.num_features(3)))
        >>> q.batch_shape, q.event_shape, q.has_rsample
        (torch.Size([7]), torch.Size([3]), True)
    """

    def __init__(
        self,
        latent_dim: int,
        *,
        num_layers: int = 4,
        hidden_dim: int = 64,
        context_dim: int = 32,
        floor: float = 1e-5,
    ) -> None:
        super().__init__(latent_dim)
        self.num_layers, self.hidden_dim, self.context_dim = num_layers, hidden_dim, context_dim
        self.floor = checked_floor(floor)
        self.couplings = Couplings(latent_dim, num_layers=num_layers, hidden_dim=hidden_dim, context_dim=context_dim)

    def num_features(self, latent_dim: int) -> int:
        """How many numbers the encoder must give: locations, scales and the context."""
        self.check_length(latent_dim)
        return 2 * latent_dim + self.context_dim

    def forward(self, features: Tensor) -> dist.TorchDistribution:
        loc, raw, context = features.split([self.latent_dim, self.latent_dim, self.context_dim], dim=-1)
        return self.couplings(loc, self.floor + softplus(raw), context)


class SplineFlow(OfOneLength):
    """q(z given x): noise through neural splines that see the datum, then a location and a scale.

    As `CouplingFlow`, with monotonic rational-quadratic splines on [−5, 5] in place of shifts and scales: each layer
    bends more. Before training it is `DiagonalNormal`. The layers are those of zuko (`pip install zuko`); the global
    switch of torch's validation, which importing zuko turns off, is put back.

    Args:
        latent_dim: length of a latent.
        num_layers: 2 or more, for every coordinate to be moved.
        hidden_dims: widths of each layer's network.
        num_bins: of each spline.
        context_dim: how many numbers of the encoder every layer sees.
        floor: the smallest standard deviation before the splines have a say, in units of z.

    Shapes:
        features `(*batch, num_features(latent_dim))`: locations, scales and context, to a distribution of batch shape
        `batch` and event shape `(latent_dim,)`.

    Raises:
        ImportError: when zuko is not installed.

    Reference:
        Durkan, Bekasov, Murray & Papamakarios, Neural Spline Flows, 2019. https://arxiv.org/abs/1906.04032
    """

    def __init__(
        self,
        latent_dim: int,
        *,
        num_layers: int = 3,
        hidden_dims: Sequence[int] = (64, 64),
        num_bins: int = 8,
        context_dim: int = 32,
        floor: float = 1e-5,
    ) -> None:
        super().__init__(latent_dim)
        if num_layers < 2 or num_bins < 2 or context_dim < 1:
            raise ValueError(
                "A spline flow needs 2 layers or more, which move the two halves of the coordinates in turn, 2 bins "
                f"and a context; got num_layers={num_layers!r}, num_bins={num_bins!r} and context_dim={context_dim!r}."
            )
        self.num_layers, self.hidden_dims, self.num_bins = num_layers, tuple(hidden_dims), num_bins
        self.context_dim, self.floor = context_dim, checked_floor(floor)
        flow = _zuko().flows.NSF(
            latent_dim,
            context_dim,
            bins=num_bins,
            transforms=num_layers,
            hidden_features=self.hidden_dims,
            passes=2,  # coupling layers, whose inverse is as cheap
        )
        self.splines = flow.transform
        for layer in self.splines.transforms:
            # Equal bins and slopes of 1: the identity.
            nn.init.zeros_(layer.hyper[-1].weight)
            nn.init.zeros_(layer.hyper[-1].bias)

    def num_features(self, latent_dim: int) -> int:
        """How many numbers the encoder must give: locations, scales and the context."""
        self.check_length(latent_dim)
        return 2 * latent_dim + self.context_dim

    def forward(self, features: Tensor) -> dist.TorchDistribution:
        loc, raw, context = features.split([self.latent_dim, self.latent_dim, self.context_dim], dim=-1)
        noise = dist.Normal(torch.zeros_like(loc), torch.ones_like(loc)).to_event(1)
        to_scale = AffineTransform(loc, self.floor + softplus(raw), event_dim=1, cache_size=1)
        return Flow(noise, [self.splines(context).inv, to_scale])  # zuko's layers lead to the noise


def _zuko() -> Any:
    """The package, imported without its side effect."""
    validates = torch.distributions.Distribution._validate_args
    try:
        import zuko
    except ImportError as error:
        raise ImportError(
            "SplineFlow is made of the layers of zuko, which is not installed: pip install zuko. CouplingFlow needs "
            "nothing else."
        ) from error
    finally:
        torch.distributions.Distribution.set_default_validate_args(validates)
    return zuko
