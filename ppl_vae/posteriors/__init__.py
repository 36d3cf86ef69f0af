"""Families of q(z given x): `nn.Module`s, encoder features to a `Distribution` over z.

    posterior.num_features(latent_dim)    how many numbers the encoder gives for each datum
    posterior(features)                   a distribution of event shape (latent_dim,)

| family | q(z given x) | numbers from the encoder, D = latent_dim |
|---|---|---|
| `DiagonalNormal` | a normal with independent coordinates | 2 D |
| `FullCovarianceNormal` | any normal | 2 D + D (D − 1) / 2 |
| `NormalMixture` | a mixture of diagonal normals: several modes | K (2 D + 1) |
| `CouplingFlow` | a diagonal normal bent by affine coupling layers | 2 D + context_dim |
| `SplineFlow` | a diagonal normal bent by neural splines, of the package zuko | 2 D + context_dim |
| `Point` | all at one point: an autoencoder | D |

All but `Point` have reparameterised draws, so that `Trace_ELBO` trains them, and a density at any z, so that every
estimate of log p(x) takes them.
"""

from ppl_vae.posteriors.contract import Posterior
from ppl_vae.posteriors.flows import CouplingFlow, SplineFlow
from ppl_vae.posteriors.mixture import NormalMixture
from ppl_vae.posteriors.normal import DiagonalNormal, FullCovarianceNormal, Point

__all__ = [
    "CouplingFlow",
    "DiagonalNormal",
    "FullCovarianceNormal",
    "NormalMixture",
    "Point",
    "Posterior",
    "SplineFlow",
]
