"""The plain autoencoder, written as a pair, so that everything that trains or plots a VAE takes it too."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ppl_vae.likelihoods import Gaussian
from ppl_vae.posteriors import Point
from ppl_vae.priors import Flat
from ppl_vae.vae import VAE


class Autoencoder(VAE):
    """An autoencoder is a VAE without its probabilities: a flat prior, a point for q(z given x), unit variance.

    `fit` reports ½‖x − x̂‖² + ½ P log 2π per datum, the L2 loss up to a constant, P being the number of data
    dimensions. It has no log p(x): `importance_sampling` refuses it, and `sample` has no prior to sample from.

    Args:
        data_shape: shape of one datum.
        latent_dim: length of the code z.
        encoder: any `nn.Module` from `(rows, *data_shape)` to `(rows, latent_dim)`; an `MLP` by default.
        decoder: any `nn.Module` from `(rows, latent_dim)` to `(rows, *data_shape)`; an `MLP` by default.

    Example:
        >>> import torch
        >>> from ppl_vae.networks import MLP
        >>> classical = Autoencoder(
        ...     (8, 8),
        ...     latent_dim=3,
        ...     encoder=MLP((8, 8), 3, activation=nn.Sigmoid()),
        ...     decoder=nn.Sequential(MLP(3, (8, 8), activation=nn.Sigmoid()), nn.Sigmoid()),
        ... )
        >>> classical.reconstruct(torch.zeros(5, 8, 8)).shape
        torch.Size([5, 8, 8])
    """

    def __init__(
        self,
        data_shape: int | Sequence[int],
        latent_dim: int,
        *,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
    ) -> None:
        super().__init__(
            data_shape,
            latent_dim,
            likelihood=Gaussian(1.0),
            prior=Flat(latent_dim),
            posterior=Point(),
            encoder=encoder,
            decoder=decoder,
        )
