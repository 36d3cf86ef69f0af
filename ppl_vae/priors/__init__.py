"""p(z): `nn.Module`s, `()` to a `Distribution` over z of event shape `(latent_dim,)`.

| prior | p(z) |
|---|---|
| `StandardNormal` | N(0, I) |
| `GaussianMixture` | a mixture of diagonal normals |
| `VampPrior` | the mean of q(z given u) over inputs u that are learned |
| `FlowPrior` | noise through affine coupling layers |
| `Flat` | 1 everywhere: an autoencoder |

All but `Flat` can be drawn from and scored at any z, at about the cost of a small network. For a given guide the prior
with the greatest ELBO is the mean of q(z given x) over the data; those that learn are ways to come near it.
"""

from ppl_vae.priors.flow import FlowPrior
from ppl_vae.priors.mixtures import GaussianMixture, VampPrior
from ppl_vae.priors.plain import Flat, StandardNormal

__all__ = ["Flat", "FlowPrior", "GaussianMixture", "StandardNormal", "VampPrior"]
