"""A variational autoencoder of two layers of latents: p(z2) p(z1 given z2) p(x given z1), and a guide upwards."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from ppl_vae import isolation
from ppl_vae.likelihoods import Bernoulli, Likelihood
from ppl_vae.networks import MLP, as_shape, check_batch, register
from ppl_vae.posteriors import DiagonalNormal
from ppl_vae.priors import StandardNormal


class Model(nn.Module):
    """The generative story z2 ~ N(0, I), z1 ~ p(z1 given z2), x ~ p(x given z1) of `HierarchicalVAE`."""

    def __init__(
        self, data_shape: tuple[int, ...], prior: StandardNormal, upper: MLP, decoder: MLP, likelihood: Likelihood
    ) -> None:
        super().__init__()
        self.data_shape, self.prior, self.upper, self.decoder = data_shape, prior, upper, decoder
        self.likelihood, self.normal = likelihood, DiagonalNormal()

    def descend(self, z2: Tensor) -> dist.TorchDistribution:
        """p(z1 given z2), for z2 of shape `(*batch, latent_dims[1])`."""
        return self.normal(self.upper(z2))

    def decode(self, z1: Tensor) -> dist.TorchDistribution:
        """p(x given z1), for z1 of shape `(*batch, latent_dims[0])`."""
        return self.likelihood(self.decoder(z1), event_dim=len(self.data_shape))

    def forward(self, x: Tensor | None = None, *, num_data: int = 1) -> Tensor:
        """Scores x of shape `(batch, *data_shape)` under Pyro's handlers; without x, draws `num_data` of them."""
        register("model", self)
        if x is not None:
            check_batch(x, self.data_shape)
        with pyro.plate("data", num_data if x is None else len(x)):
            z2 = pyro.sample("z2", self.prior())
            z1 = pyro.sample("z1", self.descend(z2))
            return pyro.sample("x", self.decode(z1), obs=x)


class Guide(nn.Module):
    """The approximate posterior q(z1 given x) q(z2 given z1) of `HierarchicalVAE`."""

    def __init__(self, data_shape: tuple[int, ...], encoder: MLP, upper: MLP, likelihood: Likelihood) -> None:
        super().__init__()
        self.data_shape, self.encoder, self.upper = data_shape, encoder, upper
        # A method of the likelihood, which itself, with its parameters, belongs to the model.
        self.inputs, self.normal = likelihood.inputs, DiagonalNormal()

    def encode(self, x: Tensor) -> dist.TorchDistribution:
        """q(z1 given x), for x of shape `(*batch, *data_shape)`."""
        return self.normal(self.encoder(self.inputs(x)))

    def ascend(self, z1: Tensor) -> dist.TorchDistribution:
        """q(z2 given z1), for z1 of shape `(*batch, latent_dims[0])`."""
        return self.normal(self.upper(z1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Draws z1 and z2 for each datum of x, `(batch, *data_shape)`."""
        register("guide", self)
        check_batch(x, self.data_shape)
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", self.encode(x))
            return z1, pyro.sample("z2", self.ascend(z1))


class HierarchicalVAE(nn.Module):
    """A variational autoencoder of two stochastic layers as a Pyro pair.

    p(x, z1, z2) = p(z2) p(z1 given z2) p(x given z1) with p(z2) = N(0, I), and q(z1, z2 given x) = q(z1 given x)
    q(z2 given z1). All conditionals of latents are diagonal normals, each given by a network of its own. By default
    the architecture of Burda et al. (2016): 784-200-200-100-100-100-50 and its mirror image, tanh.

    Args:
        data_shape: shape of one datum, such as `(28, 28)`, `(3, 32, 32)` or `784`.
        latent_dims: lengths of z1, the latent next to the data, and of z2.
        hidden_dims: widths of the hidden layers between x and z1, and between z1 and z2, as the guide passes through
            them; the model has them in the opposite order.
        activation: of the hidden layers; tanh by default.
        likelihood: p(x given z1), of `ppl_vae.likelihoods`; Bernoulli by default.

    Raises:
        ValueError: for an empty shape, sizes below 1, or any number of layers but two.

    Reference:
        Burda, Grosse & Salakhutdinov, Importance Weighted Autoencoders, 2016. https://arxiv.org/abs/1509.00519

    Example:
        >>> import torch
        >>> hvae = HierarchicalVAE((8, 8), latent_dims=(5, 2), hidden_dims=((30,), (10,)))
        >>> x = hvae.sample(7, seed=0)
        >>> z1, z2 = hvae.guide(x)
        >>> x.shape, z1.shape, z2.shape
        (torch.Size([7, 8, 8]), torch.Size([7, 5]), torch.Size([7, 2]))
    """

    def __init__(
        self,
        data_shape: int | Sequence[int],
        latent_dims: tuple[int, int] = (100, 50),
        *,
        hidden_dims: tuple[Sequence[int], Sequence[int]] = ((200, 200), (100, 100)),
        activation: nn.Module | None = None,
        likelihood: Likelihood | None = None,
    ) -> None:
        super().__init__()
        self.data_shape = shape = as_shape("data_shape", data_shape)
        self.latent_dims = as_shape("latent_dims", latent_dims)
        self.hidden_dims = tuple(tuple(widths) for widths in hidden_dims)
        for name, layers in (("latent_dims", self.latent_dims), ("hidden_dims", self.hidden_dims)):
            if len(layers) != 2:
                raise ValueError(f"{name} must be for two layers, the one next to the data first; got {layers}.")
        self.activation = activation = nn.Tanh() if activation is None else activation
        likelihood = Bernoulli() if likelihood is None else likelihood
        (dim1, dim2), (below, above) = self.latent_dims, self.hidden_dims
        features = likelihood.num_parameters * shape[0], *shape[1:]
        self.model = Model(
            shape,
            StandardNormal(dim2),
            MLP(dim2, 2 * dim1, hidden_dims=above[::-1], activation=activation),
            MLP(dim1, features, hidden_dims=below[::-1], activation=activation),
            likelihood,
        )
        self.guide = Guide(
            shape,
            MLP(shape, 2 * dim1, hidden_dims=below, activation=activation),
            MLP(dim1, 2 * dim2, hidden_dims=above, activation=activation),
            likelihood,
        )

    @property
    def likelihood(self) -> Likelihood:
        return self.model.likelihood

    def encode(self, x: Tensor) -> dist.TorchDistribution:
        """q(z1 given x), for x of shape `(*batch, *data_shape)`."""
        return self.guide.encode(x)

    def decode(self, z1: Tensor) -> dist.TorchDistribution:
        """p(x given z1), for z1 of shape `(*batch, latent_dims[0])`."""
        return self.model.decode(z1)

    def sample(self, num_samples: int, *, seed: int | None = 0, mean: bool = False) -> Tensor:
        """New data: z2, then z1, then x from p(x given z1), or the mean of p(x given z1).

        Returns:
            `(num_samples, *data_shape)`. The same seed gives the same data; None uses the global random state.
        """
        with isolation.evaluation(self, seed=seed):
            z2 = self.model.prior().sample((num_samples,))
            p = self.decode(self.model.descend(z2).sample())
            return p.mean if mean else p.sample()

    def reconstruct(self, x: Tensor) -> Tensor:
        """The mean of p(x given z1) at the mean z1 of q(z1 given x): `(*batch, *data_shape)`, in the data's units."""
        with isolation.evaluation(self):
            return self.decode(self.encode(x).mean).mean
