"""Probabilities of levels 0 to L − 1: a table, and trials; what is common to all families of levels."""

from __future__ import annotations

from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ppl_vae.likelihoods.contract import Likelihood, probability_of_levels
from ppl_vae.likelihoods.families import Parametric, Refusing


class Levels(Likelihood):
    """Data that are levels 0 to L − 1, floats that hold integers. Networks see x / (L − 1).

    Args:
        levels: L, at least 2.
    """

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.measure = probability_of_levels(levels)
        self.levels = levels

    def inputs(self, x: Tensor) -> Tensor:
        """Levels on the unit scale, x / (levels − 1)."""
        return x / (self.levels - 1)


class Categorical(Levels):
    """Levels 0 to L − 1 without any order: log P(x given z) = Σ log softmax(features)[x].

    It costs L numbers for each data dimension of each draw: 256 levels of a thousand images of 784 pixels are 0.8 GB.

    Args:
        levels: L, at least 2.

    Shapes:
        features `(..., levels * data_shape[0], *data_shape[1:])`: all logits of level 0, then of level 1, ...

    Raises:
        ValueError: when anything but levels is scored (while Pyro's validation is on).

    Example:
        >>> Categorical(4)(torch.zeros(4 * 3)).log_prob(torch.tensor([0.0, 3.0, 2.0]))  # −3 log 4
        tensor(-4.1589)
    """

    def __init__(self, levels: int = 256) -> None:
        super().__init__(levels)
        self.num_parameters = levels

    def forward(self, features: Tensor, event_dim: int = 1) -> dist.TorchDistribution:
        return _Categorical(self.levels, logits=self.per_dimension(features, event_dim)).to_event(event_dim)


class Binomial(Levels):
    """Levels 0 to L − 1 as L − 1 trials: log P(x given z) = Σ log C(L−1, x) + x log σ(η) + (L − 1 − x) log σ(−η).

    The features are the logits η. scikit-learn's digits have 17 levels, counts of 16 dots.

    Args:
        levels: L, one more than there are trials, at least 2.

    Shapes:
        features `(..., *data_shape)`, the shape of the data.

    Raises:
        ValueError: when anything but levels is scored (while Pyro's validation is on).

    Example:
        >>> Binomial()(torch.zeros(3)).mean
        tensor([8., 8., 8.])
    """

    num_parameters = 1

    def __init__(self, levels: int = 17) -> None:
        super().__init__(levels)

    def forward(self, features: Tensor, event_dim: int = 1) -> dist.TorchDistribution:
        return _Binomial(self.levels, logits=features).to_event(event_dim)


class OfLevels(Refusing):
    """Mixed into a distribution over levels 0 to `levels` - 1."""

    def __init__(self, levels: int, **arguments: Any) -> None:
        self.levels = levels
        super().__init__(**arguments)

    @property
    def support(self) -> Any:
        return dist.constraints.integer_interval(0, self.levels - 1)

    @property
    def rule(self) -> str:  # type: ignore[override]
        return f"A likelihood of {self.levels} levels scores whole numbers from 0 to {self.levels - 1}"

    @property
    def remedy(self) -> str:  # type: ignore[override]
        return (
            f"Multiply data on [0, 1] by {self.levels - 1} and round, give another number of levels, or choose a "
            "likelihood of real numbers such as `likelihoods.Gaussian()`."
        )


class _Categorical(OfLevels, Parametric):
    arg_constraints: ClassVar = {"logits": dist.constraints.real_vector}
    num_component_dims = 1
    logits: Tensor

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        index, logits = torch.broadcast_tensors(value.long().unsqueeze(-1), self.logits)
        return logits.gather(-1, index[..., :1]).squeeze(-1) - self.logits.logsumexp(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return dist.Categorical(logits=self.logits).sample(sample_shape).to(self.logits.dtype)

    def _moment(self, power: int) -> Tensor:
        values = torch.arange(self.levels, device=self.logits.device).double() ** power
        return self.logits.double().softmax(-1) @ values

    @property
    def mean(self) -> Tensor:
        return self._moment(1).to(self.logits.dtype)

    @property
    def variance(self) -> Tensor:
        return (self._moment(2) - self._moment(1).square()).to(self.logits.dtype)


class _Binomial(OfLevels, Parametric):
    arg_constraints: ClassVar = {"logits": dist.constraints.real}
    logits: Tensor

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        # Differences of lgamma's cancel: float64.
        eta, ones, zeros = self.logits.double(), value.double(), self.levels - 1 - value.double()
        ways = torch.lgamma(ones + zeros + 1) - torch.lgamma(ones + 1) - torch.lgamma(zeros + 1)
        return (ways + ones * logsigmoid(eta) + zeros * logsigmoid(-eta)).to(self.logits.dtype)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        probability = self.logits.detach().sigmoid().expand(self._extended_shape(sample_shape))
        return torch.binomial(torch.full_like(probability, self.levels - 1), probability)

    @property
    def mean(self) -> Tensor:
        return (self.levels - 1) * self.logits.sigmoid()

    @property
    def variance(self) -> Tensor:
        return (self.levels - 1) * self.logits.sigmoid() * (-self.logits).sigmoid()
