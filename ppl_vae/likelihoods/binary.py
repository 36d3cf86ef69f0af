"""Zeros and ones."""

from __future__ import annotations

import pyro.distributions as dist
from torch import Tensor

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
        "Binarise the data (static: `data.binarize(x, seed=0)` or `static_binarization()` of a loaded set; dynamic: "
        "`data.DynamicBinarization(x)`), or choose a likelihood of grey levels such as "
        "`likelihoods.ContinuousBernoulli()` or `likelihoods.Gaussian()`."
    )
