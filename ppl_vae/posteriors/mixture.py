"""Mixtures of normals, one for each datum."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ppl_vae import distributions
from ppl_vae.posteriors.contract import Posterior, checked_floor

# A logit for a feature of 1.
SLOWNESS = 0.1


class NormalMixture(Posterior):
    """q(z given x) = Σ_k π_k N(loc_k, diag(scale_k²)), for posteriors of several modes.

    Draws are reparameterised, proportions included (see `distributions.NormalMixture`), so that `Trace_ELBO` trains it
    as it trains a normal. Two choices keep components alive until each has found a mode of its own: where all features
    are 0 they lie apart, two units from first to last, and logits are a tenth of their features, so that proportions
    move more slowly than places.

    Args:
        num_components: K.
        floor: the smallest standard deviation of a component, in units of z.

    Shapes:
        features `(*batch, num_features(latent_dim))`: K for the logits, K locations, K scales, to a distribution of
        batch shape `batch` and event shape `(latent_dim,)`.

    Example:
        >>> posterior = NormalMixture(5)
        >>> q = posterior(torch.randn(7, posterior.num_features(3)))
        >>> q.batch_shape, q.event_shape, q.has_rsample
        (torch.Size([7]), torch.Size([3]), True)
    """

    def __init__(self, num_components: int = 5, *, floor: float = 1e-5) -> None:
        super().__init__()
        if not isinstance(num_components, int) or num_components < 1:
            raise ValueError(f"num_components must be an integer of at least 1; got {num_components!r}.")
        self.num_components, self.floor = num_components, checked_floor(floor)

    def num_features(self, latent_dim: int) -> int:
        """How many numbers the encoder must give: for each component a logit, locations and scales."""
        return self.num_components * (1 + 2 * latent_dim)

    def forward(self, features: Tensor) -> distributions.NormalMixture:
        num = self.num_components
        logits, of_components = features[..., :num], features[..., num:].unflatten(-1, (2, num, -1))
        loc, raw = of_components.unbind(-3)
        apart = torch.linspace(-1, 1, num).to(loc).unsqueeze(-1) if num > 1 else 0.0
        loc = loc + apart / loc.shape[-1] ** 0.5
        return distributions.NormalMixture(SLOWNESS * logits, loc, self.floor + softplus(raw))
