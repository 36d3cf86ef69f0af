"""The conditional variational autoencoder: p(z) p(x given z, y) and q(z given x, y) for data x of known classes y."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_vae import isolation
from ppl_vae.likelihoods import Bernoulli, Likelihood
from ppl_vae.networks import ConditionalMLP, as_shape, check_batch, register
from ppl_vae.posteriors import DiagonalNormal
from ppl_vae.priors import StandardNormal


class Model(nn.Module):
    """The generative story z ~ N(0, I), x ~ p(x given z, y) of `ConditionalVAE`."""

    def __init__(
        self, data_shape: tuple[int, ...], latent_dim: int, decoder: ConditionalMLP, likelihood: Likelihood
    ) -> None:
        super().__init__()
        self.data_shape, self.num_classes = data_shape, decoder.num_classes
        self.prior, self.decoder, self.likelihood = StandardNormal(latent_dim), decoder, likelihood

    def decode(self, z: Tensor, y: Tensor) -> dist.TorchDistribution:
        """p(x given z, y), for z of shape `(*batch, latent_dim)` and y of shape `(*batch)`."""
        return self.likelihood(self.decoder(z, y), event_dim=len(self.data_shape))

    def forward(self, x: Tensor | None, y: Tensor) -> Tensor:
        """Scores x of shape `(batch, *data_shape)` given y of shape `(batch,)`; without x, draws one for each y."""
        register("model", self)
        if x is not None:
            check_batch(x, self.data_shape)
        check_classes(y, self.num_classes, len(y) if x is None else len(x))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.decode(z, y), obs=x)


class Guide(nn.Module):
    """The approximate posterior q(z given x, y) of `ConditionalVAE`."""

    def __init__(self, encoder: ConditionalMLP, likelihood: Likelihood) -> None:
        super().__init__()
        self.encoder, self.normal = encoder, DiagonalNormal()
        # A method of the likelihood, which itself, with its parameters, belongs to the model.
        self.inputs = likelihood.inputs

    def encode(self, x: Tensor, y: Tensor) -> dist.TorchDistribution:
        """q(z given x, y), for x of shape `(*batch, *data_shape)` and y of shape `(*batch)`."""
        return self.normal(self.encoder(self.inputs(x), y))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Draws z for each datum of x, `(batch, *data_shape)`, of the classes y, `(batch,)`."""
        register("guide", self)
        check_batch(x, self.encoder.in_shape)
        check_classes(y, self.encoder.num_classes, len(x))
        with pyro.plate("data", len(x)):
            return pyro.sample("z", self.encode(x, y))


def check_classes(y: Tensor, num_classes: int, num_data: int, *, lowest: int = 0) -> None:
    """Refuses what are no classes of `num_data` data, each from `lowest` to `num_classes` - 1.

    Raises:
        TypeError: for anything but a tensor of integers.
        ValueError: for another shape, or a class that is none.
    """
    if not isinstance(y, Tensor) or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        got = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"Classes must be a tensor of integers; got {got}. Convert a tensor with .long().")
    if y.shape != (num_data,):
        raise ValueError(f"Expected a class for each of {num_data} data, shape ({num_data},); got {tuple(y.shape)}.")
    if ((y < lowest) | (y >= num_classes)).any():
        missing = ", or -1 where it is not known" if lowest < 0 else ""
        raise ValueError(
            f"Classes go from 0 to {num_classes - 1}{missing}; got some from {int(y.min())} to {int(y.max())}. Number "
            "them from 0."
        )


class ConditionalVAE(nn.Module):
    """A variational autoencoder of x given its class y (Sohn et al., 2015), as a Pyro pair.

    The class is an argument of both programs, `model(x, y)` and `guide(x, y)`, and no site of them: log p of this pair
    is log p(x given y). Train it with `fit(cvae.model, cvae.guide, x, y)`.

    Args:
        data_shape: shape of one datum, such as `(28, 28)` or `784`.
        num_classes: how many values y can have, 0 to `num_classes` - 1.
        latent_dim: length of z, which is left to say what the class does not: in digits, the handwriting.
        hidden_dims: widths of the hidden layers of the encoder; the decoder has them in the opposite order.
        activation: of the hidden layers; ReLU by default.
        likelihood: p(x given z, y), of `ppl_vae.likelihoods`; Bernoulli by default.

    Raises:
        ValueError: for an empty shape or sizes below 1; and when they run, for classes out of range.
        TypeError: when they run, for classes that are not integers.

    References:
        Kingma, Rezende, Mohamed & Welling, Semi-supervised Learning with Deep Generative Models, 2014.
        https://arxiv.org/abs/1406.5298
        Sohn, Lee & Yan, Learning Structured Output Representation using Deep Conditional Generative Models, 2015.
        https://papers.nips.cc/paper/5775

    Example:
        >>> cvae = ConditionalVAE((8, 8), num_classes=10, latent_dim=2)
        >>> y = torch.tensor([0, 1, 1])
        >>> x = cvae.sample(y, seed=0)
        >>> x.shape, cvae.encode(x, y).event_shape, cvae.decode(torch.zeros(3, 2), y).event_shape
        (torch.Size([3, 8, 8]), torch.Size([2]), torch.Size([8, 8]))
    """

    model: Model
    guide: Guide

    def __init__(
        self,
        data_shape: int | Sequence[int],
        num_classes: int,
        latent_dim: int,
        *,
        hidden_dims: Sequence[int] = (400, 400),
        activation: nn.Module | None = None,
        likelihood: Likelihood | None = None,
    ) -> None:
        super().__init__()
        self.data_shape = shape = as_shape("data_shape", data_shape)
        for name, size in (("num_classes", num_classes), ("latent_dim", latent_dim)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be an integer of at least 1; got {size!r}.")
        self.num_classes, self.latent_dim, self.hidden_dims = num_classes, latent_dim, tuple(hidden_dims)
        self.activation = nn.ReLU() if activation is None else activation
        likelihood = Bernoulli() if likelihood is None else likelihood
        features = likelihood.num_parameters * shape[0], *shape[1:]
        decoder = self._network(latent_dim, features, self.hidden_dims[::-1])
        self.model = Model(shape, latent_dim, decoder, likelihood)
        self.guide = Guide(self._network(shape, 2 * latent_dim, self.hidden_dims), likelihood)

    def _network(
        self, in_shape: int | Sequence[int], out_shape: int | Sequence[int], hidden_dims: Sequence[int]
    ) -> ConditionalMLP:
        return ConditionalMLP(
            in_shape, self.num_classes, out_shape, hidden_dims=hidden_dims, activation=self.activation
        )

    @property
    def likelihood(self) -> Likelihood:
        return self.model.likelihood

    def encode(self, x: Tensor, y: Tensor) -> dist.TorchDistribution:
        """q(z given x, y), for x of shape `(*batch, *data_shape)` and y of shape `(*batch)`."""
        return self.guide.encode(x, y)

    def decode(self, z: Tensor, y: Tensor) -> dist.TorchDistribution:
        """p(x given z, y), for z of shape `(*batch, latent_dim)` and y of shape `(*batch)`."""
        return self.model.decode(z, y)

    def sample(self, y: Tensor, *, seed: int | None = 0, mean: bool = False) -> Tensor:
        """New data of given classes, `(num_samples,)`: z from the prior, then x, or the mean of p(x given z, y).

        Returns:
            `(num_samples, *data_shape)`. The same seed gives the same data; None uses the global random state.
        """
        check_classes(y, self.num_classes, len(y))
        with isolation.evaluation(self, seed=seed):
            p = self.decode(self.model.prior().sample(y.shape), y)
            return p.mean if mean else p.sample()

    def reconstruct(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean of p(x given z, y) at the mean z of q(z given x, y), in the shape and units of the data.

        With another class than its own, x is written anew in the same hand.
        """
        with isolation.evaluation(self):
            return self.decode(self.encode(x, y).mean, y).mean
