"""The conditional VAE of data some of which have a label: p(y) p(z) p(x given z, y), called M2."""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_vae import conditional
from ppl_vae.conditional import ConditionalVAE, check_classes
from ppl_vae.likelihoods import Likelihood
from ppl_vae.networks import MLP, ConditionalMLP, check_batch, register


class Model(conditional.Model):
    """The generative story y ~ uniform, z ~ N(0, I), x ~ p(x given z, y) of `M2`, and a label where y was seen."""

    zeros: Tensor

    def __init__(
        self, data_shape: tuple[int, ...], latent_dim: int, decoder: ConditionalMLP, likelihood: Likelihood
    ) -> None:
        super().__init__(data_shape, latent_dim, decoder, likelihood)
        # Not saved with the weights: it only carries device and dtype.
        self.register_buffer("zeros", torch.zeros(self.num_classes), persistent=False)

    def forward(self, x: Tensor | None = None, label: Tensor | None = None, *, num_data: int = 1) -> Tensor:
        """Scores x `(batch, *data_shape)` and labels `(batch,)`, -1 where missing; without x, draws `num_data` x."""
        register("model", self)
        if x is not None:
            check_batch(x, self.data_shape)
        num_data = num_data if x is None else len(x)
        with pyro.plate("data", num_data):
            y = pyro.sample("y", dist.Categorical(logits=self.zeros))
            if label is not None:
                check_classes(label, self.num_classes, num_data, lowest=-1)
                pyro.sample("label", dist.Delta(y).mask(label >= 0), obs=label)
            z = pyro.sample("z", self.prior())
            return pyro.sample("x", self.decode(z, y), obs=x)


class Guide(conditional.Guide):
    """The approximate posterior q(y given x) q(z given x, y) of `M2`; where there is a label, y is certain."""

    def __init__(self, encoder: ConditionalMLP, classifier: MLP, likelihood: Likelihood) -> None:
        super().__init__(encoder, likelihood)
        self.classifier = classifier

    def classify(self, x: Tensor, label: Tensor | None = None) -> dist.TorchDistribution:
        """q(y given x), or all of it on the label where that is not -1; for x of shape `(*batch, *data_shape)`."""
        logits = self.classifier(self.inputs(x))
        if label is not None:
            is_label = label.unsqueeze(-1) == torch.arange(logits.shape[-1], device=label.device)
            logits = logits.masked_fill(~is_label & (label >= 0).unsqueeze(-1), -torch.inf)
        return dist.Categorical(logits=logits)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """Draws y and z for each datum of x, `(batch, *data_shape)`, with labels `(batch,)`, -1 where missing."""
        register("guide", self)
        check_batch(x, self.encoder.in_shape)
        if label is not None:
            check_classes(label, self.encoder.num_classes, len(x), lowest=-1)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", self.classify(x, label))
            return pyro.sample("z", self.encode(x, y))


class M2(ConditionalVAE):
    """The model M2 of Kingma et al. (2014) as a Pyro pair: a conditional VAE whose classes are latent but for labels.

    p(x, y, z) = p(y) p(z) p(x given z, y) with p(y) uniform, and q(y, z given x) = q(y given x) q(z given x, y). Both
    programs take labels beside x, -1 where there is none: `model(x, label)`, `guide(x, label)`. The model observes a
    label where there is one, and the guide then has all of q(y given x) on it, so that of one batch log p is
    log p(x, y) where y is known and log p(x) where it is not. Without labels, `model(x)` and `guide(x)`.

    Train it with `SemiSupervisedELBO`, which sums over the unknown classes and trains the classifier on the known ones:

        fit(m2.model, m2.guide, x, label, objective=SemiSupervisedELBO(50.0))

    `m2.classify(x).probs` are the probabilities of the classes. `importance_sampling(m2.model, m2.guide, x, label)` is
    the evidence. It draws unknown classes; to sum over them instead, call it with every class:

        log_pxy = [importance_sampling(m2.model, m2.guide, x, torch.full((len(x),), y)).log_px for y in range(10)]
        log_px = torch.stack(log_pxy).logsumexp(0)

    Args:
        data_shape: shape of one datum, such as `(28, 28)` or `784`.
        num_classes: how many values y can have, 0 to `num_classes` - 1.
        latent_dim: length of z.
        hidden_dims: widths of the hidden layers of encoder and classifier; the decoder has them in the opposite order.
        activation: of the hidden layers; ReLU by default.
        likelihood: p(x given z, y), of `ppl_vae.likelihoods`; Bernoulli by default.

    Raises:
        ValueError: for an empty shape or sizes below 1; and when they run, for labels out of range.
        TypeError: when they run, for labels that are not integers.

    Reference:
        Kingma, Rezende, Mohamed & Welling, Semi-supervised Learning with Deep Generative Models, 2014.
        https://arxiv.org/abs/1406.5298

    Example:
        >>> m2 = M2((8, 8), num_classes=10, latent_dim=2)
        >>> x = m2.model(num_data=3)
        >>> z = m2.guide(x, torch.tensor([7, -1, -1]))
        >>> x.shape, z.shape, m2.classify(x).probs.shape
        (torch.Size([3, 8, 8]), torch.Size([3, 2]), torch.Size([3, 10]))
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
        super().__init__(
            data_shape, num_classes, latent_dim, hidden_dims=hidden_dims, activation=activation, likelihood=likelihood
        )
        classifier = MLP(self.data_shape, num_classes, hidden_dims=hidden_dims, activation=self.activation)
        self.model = Model(self.data_shape, latent_dim, self.model.decoder, self.likelihood)
        self.guide = Guide(self.guide.encoder, classifier, self.likelihood)

    def classify(self, x: Tensor) -> dist.TorchDistribution:
        """q(y given x), for x of shape `(*batch, *data_shape)`."""
        return self.guide.classify(x)
