"""The variational autoencoder: p(z) p(x given z) and q(z given x), two Pyro programs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from ppl_vae import isolation
from ppl_vae.likelihoods import Bernoulli, Likelihood
from ppl_vae.networks import MLP, check_batch, over_leading, register
from ppl_vae.posteriors import DiagonalNormal, Posterior
from ppl_vae.priors import StandardNormal, VampPrior


class Model(nn.Module):
    """The generative story z ~ p(z), x ~ p(x given z) of `VAE`."""

    def __init__(
        self, data_shape: tuple[int, ...], prior: nn.Module, decoder: nn.Module, likelihood: Likelihood
    ) -> None:
        super().__init__()
        self.data_shape, self.prior, self.decoder, self.likelihood = data_shape, prior, decoder, likelihood

    def decode(self, z: Tensor) -> dist.TorchDistribution:
        """p(x given z), for z of shape `(*batch, latent_dim)`."""
        num_rows = self.likelihood.num_parameters * self.data_shape[0]
        features = over_leading(self.decoder, z, event_dim=1)
        _check_count("decoder", features.shape[z.dim() - 1 :], num_rows * prod(self.data_shape[1:]))
        features = features.reshape(*z.shape[:-1], num_rows, *self.data_shape[1:])
        return self.likelihood(features, event_dim=len(self.data_shape))

    def forward(self, x: Tensor | None = None, *, num_data: int = 1) -> Tensor:
        """Scores x of shape `(batch, *data_shape)` under Pyro's handlers; without x, draws `num_data` of them."""
        register("model", self)
        if x is not None:
            check_batch(x, self.data_shape)
        with pyro.plate("data", num_data if x is None else len(x)):
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.decode(z), obs=x)


class Guide(nn.Module):
    """The approximate posterior q(z given x) of `VAE`."""

    def __init__(
        self,
        data_shape: tuple[int, ...],
        latent_dim: int,
        encoder: nn.Module,
        posterior: Posterior,
        inputs: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.data_shape, self.latent_dim, self.encoder, self.posterior = data_shape, latent_dim, encoder, posterior
        # A method of the likelihood, which itself, with its parameters, belongs to the model.
        self.inputs = inputs

    def encode(self, x: Tensor) -> dist.TorchDistribution:
        """q(z given x), for x of shape `(*batch, *data_shape)`."""
        return self.encode_inputs(self.inputs(x))

    def encode_inputs(self, inputs: Tensor) -> dist.TorchDistribution:
        """q(z given x), for x as the encoder sees it."""
        event_dim = len(self.data_shape)
        features = over_leading(self.encoder, inputs, event_dim)
        start = inputs.dim() - event_dim
        _check_count("encoder", features.shape[start:], self.posterior.num_features(self.latent_dim))
        return self.posterior(features.flatten(start))

    def forward(self, x: Tensor) -> Tensor:
        """Draws z for each datum of x, `(batch, *data_shape)`."""
        register("guide", self)
        check_batch(x, self.data_shape)
        with pyro.plate("data", len(x)):
            return pyro.sample("z", self.encode(x))


def _check_count(network: str, shape: Sequence[int], expected: int) -> None:
    if prod(shape) != expected:
        raise ValueError(
            f"The {network} must give {expected} numbers for each datum; it gives {prod(shape)}, in the shape "
            f"{tuple(shape)}."
        )


class VAE(nn.Module):
    """A variational autoencoder (Kingma & Welling, 2014; Rezende et al., 2014) as a Pyro pair.

    `vae.model` and `vae.guide` are `nn.Module`s and Pyro programs; `fit`, `pyro.infer.SVI` and
    `Trace_ELBO()(vae.model, vae.guide)` train the same weights.

    Args:
        data_shape: shape of one datum, such as `(28, 28)`, `(3, 32, 32)` or `784`.
        latent_dim: length of z.
        likelihood: p(x given z), of `ppl_vae.likelihoods`; Bernoulli by default.
        prior: p(z), of `ppl_vae.priors`; N(0, I) by default.
        posterior: the family of q(z given x), of `ppl_vae.posteriors`; diagonal normal by default.
        encoder: any `nn.Module` from `(rows, *data_shape)` to `posterior.num_features(latent_dim)` numbers a row;
            an `MLP` by default. It is given `likelihood.inputs(x)`: x itself, levels on the unit scale, log(1 + x)
            of counts.
        decoder: any `nn.Module` from `(rows, latent_dim)` to `likelihood.num_parameters` numbers a data dimension;
            an `MLP` by default.

    Raises:
        ValueError: for an empty shape, a latent_dim below 1, a prior or a posterior of another latent_dim; and when
            they first run, for networks that give another count of numbers.

    References:
        Kingma & Welling, Auto-Encoding Variational Bayes, 2014. https://arxiv.org/abs/1312.6114
        Rezende, Mohamed & Wierstra, Stochastic Backpropagation and Approximate Inference in Deep Generative Models,
        2014. https://arxiv.org/abs/1401.4082

    Example:
        >>> import torch
        >>> vae = VAE((8, 8), latent_dim=2)
        >>> x = vae.sample(5, seed=0)
        >>> x.shape, vae.encode(x).event_shape, vae.decode(torch.zeros(3, 2)).event_shape
        (torch.Size([5, 8, 8]), torch.Size([2]), torch.Size([8, 8]))
    """

    def __init__(
        self,
        data_shape: int | Sequence[int],
        latent_dim: int,
        *,
        likelihood: Likelihood | None = None,
        prior: nn.Module | None = None,
        posterior: Posterior | None = None,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.data_shape = (data_shape,) if isinstance(data_shape, int) else tuple(data_shape)
        if not self.data_shape or any(size < 1 for size in self.data_shape):
            raise ValueError(f"data_shape must be the sizes of one datum, each at least 1; got {data_shape!r}.")
        if not isinstance(latent_dim, int) or latent_dim < 1:
            raise ValueError(f"latent_dim must be an integer of at least 1; got {latent_dim!r}.")
        prior = StandardNormal(latent_dim) if prior is None else prior
        if getattr(prior, "latent_dim", latent_dim) != latent_dim:
            raise ValueError(f"The prior is over {prior.latent_dim} dimensions, where latent_dim is {latent_dim}.")
        likelihood = Bernoulli() if likelihood is None else likelihood
        posterior = DiagonalNormal() if posterior is None else posterior
        self.latent_dim = latent_dim
        num_features = posterior.num_features(latent_dim)
        if encoder is None:
            encoder = MLP(self.data_shape, num_features)
        if decoder is None:
            decoder = MLP(latent_dim, (likelihood.num_parameters * self.data_shape[0], *self.data_shape[1:]))
        self.model = Model(self.data_shape, prior, decoder, likelihood)
        self.guide = Guide(self.data_shape, latent_dim, encoder, posterior, likelihood.inputs)
        if isinstance(prior, VampPrior):
            # A method of the guide, which itself, with its parameters, stays no part of the model.
            prior.attach(self.guide.encode_inputs, self.data_shape, unit_interval=likelihood.sees_unit_interval)

    @property
    def prior(self) -> nn.Module:
        return self.model.prior

    @property
    def likelihood(self) -> Likelihood:
        return self.model.likelihood

    @property
    def decoder(self) -> nn.Module:
        return self.model.decoder

    @property
    def encoder(self) -> nn.Module:
        return self.guide.encoder

    @property
    def posterior(self) -> Posterior:
        return self.guide.posterior

    def encode(self, x: Tensor) -> dist.TorchDistribution:
        """q(z given x), for x of shape `(*batch, *data_shape)`."""
        return self.guide.encode(x)

    def decode(self, z: Tensor) -> dist.TorchDistribution:
        """p(x given z), for z of shape `(*batch, latent_dim)`."""
        return self.model.decode(z)

    def sample(self, num_samples: int, *, seed: int | None = 0, mean: bool = False) -> Tensor:
        """New data: z from the prior, then x from p(x given z), or the mean of p(x given z).

        Returns:
            `(num_samples, *data_shape)`. The same seed gives the same data; None uses the global random state.
        """
        with isolation.evaluation(self, seed=seed):
            p = self.decode(self.prior().sample((num_samples,)))
            return p.mean if mean else p.sample()

    def reconstruct(self, x: Tensor) -> Tensor:
        """The mean of p(x given z) at the mean z of q(z given x): `(*batch, *data_shape)`, in the units of the data."""
        with isolation.evaluation(self):
            return self.decode(self.encode(x).mean).mean
