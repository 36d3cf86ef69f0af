"""Normalising flows of affine coupling layers: cheap to draw from, and cheap to score at any point."""

from __future__ import annotations

from functools import partial

import pyro.distributions as dist
import torch
from pyro.distributions.transforms import AffineCoupling, Permute
from torch import Tensor, nn
from torch.distributions import AffineTransform
from torch.nn.functional import silu

from ppl_vae import isolation

# A layer stretches by at most e²: with more, a step that is too large makes densities that no number format resolves.
MOST_LOG_SCALE = 2.0
# Pairs of draws for a mean that has no closed form.
MEAN_PAIRS = 50


class Flow(dist.TransformedDistribution):
    """z = T(ε) for normal noise ε, with log p(z) = log p(ε) − log|dT/dε| at ε = T⁻¹(z) for any z."""

    @property
    def mean(self) -> Tensor:
        """Of 100 draws with a fixed seed, for there is no closed form; exact where T is affine.

        The noise comes in pairs ε, −ε, so that only what is curved in T leaves an error.
        """
        with isolation.seeded(0), torch.no_grad():
            noise = self.base_dist.sample((MEAN_PAIRS,))
            z = torch.cat([noise, 2 * self.base_dist.mean - noise])
            for transform in self.transforms:
                z = transform(z)
            return z.mean(0)


class Couplings(nn.Module):
    """Affine coupling layers between standard normal noise and a location and scale: a map to `Flow`s.

    Each layer keeps one half of the coordinates, and gives the other a shift and a scale by a network of the first half
    and a context; the halves take turns. Untrained layers do nothing, and the flow is N(loc, diag(scale²)).

    Args:
        dim: length of z, at least 2.
        num_layers: 2 or more, for every coordinate to be moved.
        hidden_dim: width of each layer's network, which has one hidden layer.
        context_dim: length of the context; 0 for none.

    Shapes:
        loc and scale `(*batch, dim)`, context `(*batch, context_dim)`, to a distribution of batch shape `batch` and
        event shape `(dim,)`.

    Reference:
        Dinh, Sohl-Dickstein & Bengio, Density Estimation using Real NVP, 2017. https://arxiv.org/abs/1605.08803

    Example:
        >>> flow = Couplings(3, context_dim=2)(torch.zeros(5, 3), torch.ones(5, 3), torch.randn(5, 2))
        >>> flow.batch_shape, flow.rsample((7,)).shape, flow.log_prob(torch.zeros(3))[0]  # −3/2 log 2π
        (torch.Size([5]), torch.Size([7, 5, 3]), tensor(-2.7568, grad_fn=<SelectBackward0>))
    """

    order: Tensor

    def __init__(self, dim: int, *, num_layers: int = 4, hidden_dim: int = 64, context_dim: int = 0) -> None:
        super().__init__()
        if not isinstance(dim, int) or dim < 2:
            raise ValueError(
                "Coupling layers move one half of the coordinates given the other, and need a latent_dim of at least "
                f"2; got {dim!r}. In one dimension, take a mixture of normals."
            )
        if num_layers < 2 or hidden_dim < 1 or context_dim < 0:
            raise ValueError(
                "A flow needs 2 layers or more, which move the two halves of the coordinates in turn, and a hidden "
                f"unit; got num_layers={num_layers!r}, hidden_dim={hidden_dim!r} and context_dim={context_dim!r}."
            )
        # The order of the coordinates is reversed between layers, so that each keeps what the one before it moved.
        halves = [(dim // 2, dim - dim // 2), (dim - dim // 2, dim // 2)]
        self.layers = nn.ModuleList(
            _Network(*halves[index % 2], hidden_dim=hidden_dim, context_dim=context_dim) for index in range(num_layers)
        )
        self.register_buffer("order", torch.arange(dim - 1, -1, -1), persistent=False)

    def forward(self, loc: Tensor, scale: Tensor, context: Tensor | None = None) -> Flow:
        transforms: list[torch.distributions.Transform] = []
        for layer in self.layers:
            # Made anew each time: a transform remembers the last value it saw, which is no part of a module.
            transforms += [AffineCoupling(layer.kept, partial(layer, context=context)), Permute(self.order)]
        transforms[-1] = AffineTransform(loc, scale, event_dim=1, cache_size=1)
        noise = dist.Normal(torch.zeros_like(loc), torch.ones_like(loc)).to_event(1)
        return Flow(noise, transforms)


class _Network(nn.Module):
    """Shift and log scale of the moved coordinates, given the kept ones and a context."""

    def __init__(self, kept: int, moved: int, *, hidden_dim: int, context_dim: int) -> None:
        super().__init__()
        self.kept = kept
        self.of_kept = nn.Linear(kept, hidden_dim)
        self.of_context = nn.Linear(context_dim, hidden_dim, bias=False) if context_dim else None
        self.out = nn.Linear(hidden_dim, 2 * moved)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, kept: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        hidden = self.of_kept(kept)
        if self.of_context is not None:
            hidden = hidden + self.of_context(context)
        shift, raw = self.out(silu(hidden)).chunk(2, dim=-1)
        return shift, MOST_LOG_SCALE * (raw / MOST_LOG_SCALE).tanh()
