"""Zeros and ones, and the cross-entropy of grey values, which is no likelihood."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.utils import broadcast_all

from ppl_vae.cross_entropy import log_prob_of_bits
from ppl_vae.likelihoods.contract import Likelihood, probability_of_levels
from ppl_vae.likelihoods.families import Refusing


class Bernoulli(Likelihood):
    """Binary data x in {0, 1}: log p(x given z) = Σ x η − log(1 + e^η), the features being the logits η.

    Logits and not probabilities: in float32 a clamped probability never charges more than 15.9 nats for an
    impossible pixel. Anything but 0 and 1 is refused, because the same formula on grey levels is no log-probability.

    Shapes:
        features `(..., *data_shape)`, the shape of the data.

    Raises:
        ValueError: when data other than 0 and 1 are scored (while Pyro's validation is on; `fit` and
            `importance_sampling` see to it that every datum is checked once).

    Example:
        >>> import torch
        >>> p = Bernoulli()(torch.zeros(5, 4))
        >>> p.log_prob(torch.ones(5, 4))[0]               # 4 log ½
        tensor(-2.7726)
    """

    num_parameters = 1
    measure = probability_of_levels(2)

    def forward(self, features: Tensor, event_dim: int = 1) -> dist.TorchDistribution:
        return _Bernoulli(logits=features).to_event(event_dim)


class _Bernoulli(Refusing, dist.Bernoulli):
    rule = "A Bernoulli likelihood scores data in {0, 1}"
    remedy = (
        "Binarise the data, once with `static_binarization()` of a loaded set (`data.binarize(x)` of a tensor) or anew "
        "each time with `dynamic_binarization()` (`data.DynamicBinarization(x)`); or choose a likelihood of grey "
        "values, such as `likelihoods.ContinuousBernoulli()` or `likelihoods.Gaussian()`. The cross-entropy of grey "
        "values, which is no log p(x), goes by the name of `likelihoods.bce_score`."
    )

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> dist.TorchDistribution:
        p = super().to_event(reinterpreted_batch_ndims)
        return _Together(self, p.reinterpreted_batch_ndims) if isinstance(p, dist.Independent) else p


class _Together(dist.Independent):
    """Independent bits, whose log-probabilities are summed as they are computed."""

    def to_event(self, reinterpreted_batch_ndims: int | None = None) -> dist.TorchDistribution:
        further = len(self.batch_shape) if reinterpreted_batch_ndims is None else reinterpreted_batch_ndims
        return self.base_dist.to_event(self.reinterpreted_batch_ndims + further)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self.base_dist._validate_sample(value)
        return _summed(self.base_dist.logits, value, self.reinterpreted_batch_ndims)


def _summed(logits: Tensor, x: Tensor, event_dim: int) -> Tensor:
    """Σ x η − log(1 + e^η) over the last dimensions; in float32 at least, as sums of many numbers are taken."""
    logits, x = broadcast_all(logits.to(torch.promote_types(logits.dtype, torch.float32)), x)
    return _Score.apply(logits.flatten(-event_dim), x.flatten(-event_dim))


class _Score(torch.autograd.Function):
    """`log_prob_of_bits`, with a gradient, x − sigmoid(η), that needs none of what it was computed by.

    (Without a rule for forward mode, because `torch.compile` stops at functions that have one.)
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(logits: Tensor, x: Tensor) -> Tensor:
        return log_prob_of_bits(logits, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        logits, x = ctx.saved_tensors
        gradient = gradient.unsqueeze(-1)
        return gradient * (x - logits.sigmoid()), gradient * logits if ctx.needs_input_grad[1] else None


def bce_score(features: Tensor, x: Tensor, event_dim: int = 1) -> Tensor:
    """The binary cross-entropy of grey values, negated: Σ x η − log(1 + e^η). It is *not* a log-probability of x.

    Many programs train on it as if it were. As a density on [0, 1] it lacks a constant that depends on η, so that what
    it makes of a decoder and a prior has a mass of at most 2^−D over [0, 1]^D, not 1, and can be compared with no
    log p(x), ELBO or bits per dimension. With the constant it is `ContinuousBernoulli`. What it is: the mean of
    log P(b given z) over bits b that are 1 with probability x. Therefore F(x) = log ∫ p(z) exp(bce_score) dz is a lower
    bound of the mean of log P(b), the score of a `Bernoulli` on dynamically binarised data.

    To train on it all the same, put `pyro.factor("score", likelihoods.bce_score(decoder(z), x))` in the place of the
    site x: what `fit` then reports is a bound on F(x), and so is what is called log_px of that pair.

    Args:
        features: logits η, `(..., *data_shape)`.
        x: grey values in [0, 1], of a shape that broadcasts with the logits'.
        event_dim: how many dimensions one datum has; they are summed.

    Returns:
        The score in nats per datum, of the shape without the last `event_dim` dimensions.

    Raises:
        ValueError: a value lies outside [0, 1].

    Reference:
        Loaiza-Ganem & Cunningham, The continuous Bernoulli: fixing a pervasive error in variational autoencoders,
        2019. https://arxiv.org/abs/1907.06845

    Example:
        >>> import torch
        >>> bce_score(torch.zeros(5, 3), torch.full((5, 3), 0.25))[0]    # −3 log 2
        tensor(-2.0794)
    """
    if not ((x >= 0) & (x <= 1)).all():
        raise ValueError(
            f"A cross-entropy takes values in [0, 1]; got values from {x.min().item():.4g} to {x.max().item():.4g}. "
            "Divide levels by the largest."
        )
    return _summed(features, x, event_dim)
