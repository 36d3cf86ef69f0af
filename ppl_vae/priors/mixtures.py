"""Priors that are mixtures: of normals, and of the guide's own answers."""

from __future__ import annotations

from collections.abc import Callable

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ppl_vae.distributions import NormalMixture
from ppl_vae.priors.contract import RAW_ONE, checked_count

# Data start within these, on the scale from 0 to 1, whose ends the logistic function does not reach.
DARKEST, LIGHTEST = 0.02, 0.98


class GaussianMixture(nn.Module):
    """p(z) = Σ_k π_k N(loc_k, diag(scale_k²)), with all of them learned.

    Components start at random places, drawn from N(0, I), with scales of 1.

    Args:
        latent_dim: length of a latent, at least 1.
        num_components: K.
        floor: the smallest standard deviation of a component.

    Example:
        >>> p = GaussianMixture(3, num_components=7)()
        >>> p.sample((5,)).shape, p.event_shape
        (torch.Size([5, 3]), torch.Size([3]))
    """

    def __init__(self, latent_dim: int, num_components: int = 10, *, floor: float = 1e-3) -> None:
        super().__init__()
        self.latent_dim = checked_count("latent_dim", latent_dim)
        self.num_components = checked_count("num_components", num_components)
        if not floor >= 0:
            raise ValueError(f"floor is a smallest standard deviation and cannot be negative; got {floor!r}.")
        self.floor = floor
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.loc = nn.Parameter(torch.randn(num_components, latent_dim))
        self.raw_scale = nn.Parameter(torch.full((num_components, latent_dim), RAW_ONE))

    def forward(self) -> NormalMixture:
        return NormalMixture(self.logits, self.loc, self.floor + softplus(self.raw_scale))


class VampPrior(nn.Module):
    """p(z) = 1/K Σ_k q(z given u_k): the guide's own q at K pseudo-inputs u_k, which are learned.

    For a given encoder the best prior is the mean of q(z given x) over the data; this is such a mean over a few inputs
    instead. `VAE(prior=VampPrior(500))` hands it the encoder, which stays the guide's. For a pair of your own,
    `attach` does.

    Pseudo-inputs are data as the encoder sees them (`likelihood.inputs(x)`): levels and bits between 0 and 1, where the
    logistic function keeps them; numbers without bounds else. They start at random; `start_from` puts them at data,
    from where training is faster.

    Args:
        num_pseudo_inputs: K. Each step runs the encoder on so many rows more.

    Raises:
        RuntimeError: when it is asked for p(z) before it has an encoder.

    Reference:
        Tomczak & Welling, VAE with a VampPrior, 2018. https://arxiv.org/abs/1705.07120

    Example:
        >>> from ppl_vae.vae import VAE
        >>> vae = VAE((8, 8), latent_dim=2, prior=VampPrior(5))
        >>> vae.prior.pseudo_inputs.shape, vae.prior().sample((3,)).shape
        (torch.Size([5, 8, 8]), torch.Size([3, 2]))
    """

    raw: nn.Parameter | None

    def __init__(self, num_pseudo_inputs: int) -> None:
        super().__init__()
        self.num_pseudo_inputs = checked_count("num_pseudo_inputs", num_pseudo_inputs)
        self.register_parameter("raw", None)

    def attach(
        self, encode: Callable[[Tensor], dist.TorchDistribution], data_shape: tuple[int, ...], *, unit_interval: bool
    ) -> None:
        """Gives it an encoder, once.

        Args:
            encode: from inputs `(rows, *data_shape)` to q(z given x), of batch shape `(rows,)`. Its parameters are
                trained where they are registered, not here.
            data_shape: of one input.
            unit_interval: whether inputs lie between 0 and 1.
        """
        if self.raw is not None:
            raise RuntimeError("This VampPrior already belongs to an encoder. Make a new one for another VAE.")
        self.encode, self.unit_interval = encode, unit_interval
        self.raw = nn.Parameter(torch.randn(self.num_pseudo_inputs, *data_shape))

    @property
    def pseudo_inputs(self) -> Tensor:
        """u, `(num_pseudo_inputs, *data_shape)`, as the encoder sees them."""
        raw = self._attached()
        return raw.sigmoid() if self.unit_interval else raw

    def start_from(self, inputs: Tensor) -> None:
        """Puts the pseudo-inputs at data, as the encoder sees them: `likelihood.inputs(x[:num_pseudo_inputs])`."""
        raw = self._attached()
        if inputs.shape != raw.shape:
            raise ValueError(f"The pseudo-inputs have the shape {tuple(raw.shape)}; got data of {tuple(inputs.shape)}.")
        if self.unit_interval and not ((inputs >= 0) & (inputs <= 1)).all():
            raise ValueError(
                "The encoder sees numbers between 0 and 1; got data from "
                f"{inputs.min().item():.4g} to {inputs.max().item():.4g}. Pass likelihood.inputs(x)."
            )
        with torch.no_grad():
            raw.copy_(inputs.clamp(DARKEST, LIGHTEST).logit() if self.unit_interval else inputs)

    def _attached(self) -> nn.Parameter:
        if self.raw is None:
            raise RuntimeError(
                "A VampPrior is made from the encoder of a VAE: VAE(..., prior=VampPrior(500)). In a pair of your own, "
                "call attach first."
            )
        return self.raw

    def forward(self) -> dist.TorchDistribution:
        u = self.pseudo_inputs
        q, logits = self.encode(u), u.new_zeros(len(u))
        if isinstance(q, dist.Independent) and isinstance(q.base_dist, dist.Normal):
            return NormalMixture(logits, q.base_dist.loc, q.base_dist.scale)
        return dist.MixtureSameFamily(dist.Categorical(logits=logits), q)
