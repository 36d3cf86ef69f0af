"""Probabilities of levels 0 to L − 1 from a mixture of discretised logistics, as in PixelCNN++."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import softplus

from ppl_vae.likelihoods.binned import FINEST_SCALE, BinnedDistribution
from ppl_vae.likelihoods.families import Parametric
from ppl_vae.likelihoods.levels import Levels, OfLevels
from ppl_vae.likelihoods.line import RAW_START, Logistic


class LogisticMixture(Levels):
    """Levels 0 to L − 1 under a mixture of discretised logistics, for each data dimension its own.

    P(x given z) = Π Σ_k π_k [σ(b_k) − σ(a_k)], a and b as in `DiscretisedLogistic`: locations on the unit scale, scales
    `floor + softplus(...)`, 0.2 of the unit where the feature is 0. With `rgb=True`, as in PixelCNN++, one π for the
    three channels of a pixel, and the location of green moves with the pixel's own red by c₀ (r − ½), that of blue by
    c₁ (r − ½) + c₂ (g − ½), on the unit scale and with c the tanh of features of each component. The contract counts
    numbers per data dimension, so each channel brings logits of π, and the three are added.

    Args:
        num_components: K.
        levels: L, at least 2.
        rgb: condition channels on those before; data of shape `(3, height, width)`.
        floor: the smallest scale, of the unit.

    Shapes:
        features `(..., num_parameters * data_shape[0], *data_shape[1:])`: K logits, K locations, K scales and, with
        `rgb`, K coefficients.

    Raises:
        ValueError: with `rgb`, for data of another shape than `(3, height, width)`; and when anything but levels is
            scored (while Pyro's validation is on).

    Reference:
        Salimans, Karpathy, Chen & Kingma, PixelCNN++: Improving the PixelCNN with Discretized Logistic Mixture
        Likelihood and Other Modifications, 2017. https://arxiv.org/abs/1701.05517

    Example:
        >>> likelihood = LogisticMixture(5, rgb=True)
        >>> p = likelihood(torch.randn(2, likelihood.num_parameters * 3, 8, 8), event_dim=3)
        >>> p.sample((7,)).shape, p.batch_shape, p.event_shape
        (torch.Size([7, 2, 3, 8, 8]), torch.Size([2]), torch.Size([3, 8, 8]))
    """

    def __init__(
        self, num_components: int = 10, levels: int = 256, *, rgb: bool = False, floor: float = FINEST_SCALE
    ) -> None:
        super().__init__(levels)
        if not isinstance(num_components, int) or num_components < 1:
            raise ValueError(f"num_components must be an integer of at least 1; got {num_components!r}.")
        if not 0 < floor < float("inf"):
            raise ValueError(f"floor is the smallest scale and must be positive and finite; got {floor!r}.")
        self.num_components, self.rgb, self.floor = num_components, rgb, floor
        self.num_parameters = (4 if rgb else 3) * num_components

    def forward(self, features: Tensor, event_dim: int = 1) -> dist.TorchDistribution:
        numbers = self.per_dimension(features, event_dim)
        logits, loc, raw_scale, *coefficients = numbers.split(self.num_components, dim=-1)
        scale = self.floor + softplus(raw_scale + RAW_START)
        if not self.rgb:
            return _Mixture(self.levels, logits=logits, loc=loc, scale=scale).to_event(event_dim)
        if event_dim != 3 or logits.shape[-4] != 3:
            raise ValueError(
                "A mixture with rgb=True scores data of shape (3, height, width); got features for data of shape "
                f"{tuple(numbers.shape[-event_dim - 1 : -1])}. Leave out rgb=True for other data."
            )
        logits, c = logits.sum(-4, keepdim=True), coefficients[0].tanh()
        return _ColourMixture(self.levels, logits=logits, loc=loc, scale=scale, coefficients=c)


LOGISTIC = Logistic(1.0)  # for its distributions: their location and scale are given below


class _Mixture(OfLevels, Parametric):
    """A mixture for each number; components come last."""

    arg_constraints = {  # noqa: RUF012
        "logits": dist.constraints.real,
        "loc": dist.constraints.real,
        "scale": dist.constraints.positive,
    }
    num_component_dims = 1
    logits: Tensor
    loc: Tensor
    scale: Tensor

    def _binned(self, loc: Tensor, scale: Tensor) -> BinnedDistribution:
        return BinnedDistribution(LOGISTIC, LOGISTIC.distribution(loc, scale), self.levels)

    def _unit(self, value: Tensor) -> Tensor:
        return value / (self.levels - 1)

    def _chosen(self, logits: Tensor, sample_shape: Any) -> Tensor:
        """The component of each draw, as an index `(*sample, *batch, 1)`."""
        return dist.Categorical(logits=logits).sample(sample_shape).unsqueeze(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        mass = self._binned(self.loc, self.scale).log_prob(value.unsqueeze(-1))
        return (self.logits.log_softmax(-1) + mass).logsumexp(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return self._binned(*_pick(self._chosen(self.logits, sample_shape), self.loc, self.scale)).sample()

    @property
    def mean(self) -> Tensor:
        return (self.logits.softmax(-1) * self._binned(self.loc, self.scale).mean).sum(-1)

    @property
    def variance(self) -> Tensor:
        bins, weights = self._binned(self.loc, self.scale), self.logits.double().softmax(-1)
        first, second = ((weights * bins.moment(power, torch.float64)).sum(-1) for power in (1, 2))
        return (second - first.square()).to(self.loc.dtype)


def _pick(index: Tensor, *parameters: Tensor) -> list[Tensor]:
    """The parameters of the chosen components."""
    return [p.expand(*index.shape[:-1], p.shape[-1]).gather(-1, index).squeeze(-1) for p in parameters]


class _ColourMixture(_Mixture):
    """A mixture for each pixel of three channels, `(*batch, 3, height, width, components)`."""

    arg_constraints = {**_Mixture.arg_constraints, "coefficients": dist.constraints.real}  # noqa: RUF012
    num_event_dims = 3
    coefficients: Tensor

    @property
    def support(self) -> Any:
        return dist.constraints.independent(super().support, 3)

    def _allowed(self, value: Tensor) -> Tensor:
        return super().support.check(value)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        red, green, _ = (self._unit(value).unsqueeze(-1) - 0.5).unbind(-4)
        c0, c1, c2 = self.coefficients.unbind(-4)
        shift = torch.stack(torch.broadcast_tensors(torch.zeros_like(red), c0 * red, c1 * red + c2 * green), dim=-4)
        mass = self._binned(self.loc + shift, self.scale).log_prob(value.unsqueeze(-1)).sum(-4)
        return (self.logits.select(-4, 0).log_softmax(-1) + mass).logsumexp(-1).sum((-2, -1))

    def _in_order(self, draw: Any, parameters: Sequence[Tensor], dim: int) -> Tensor:
        """Red, then green and blue given those before; `draw` takes the bins of a channel."""
        (mu_r, mu_g, mu_b), (s_r, s_g, s_b), (c0, c1, c2) = (p.unbind(dim) for p in parameters)
        red = draw(self._binned(mu_r, s_r))
        r = self._unit(red) - 0.5
        green = draw(self._binned(mu_g + c0 * r, s_g))
        g = self._unit(green) - 0.5
        return torch.stack([red, green, draw(self._binned(mu_b + c1 * r + c2 * g, s_b))], dim=dim)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            index = self._chosen(self.logits.select(-4, 0), sample_shape).unsqueeze(-4)
            index = index.expand(*index.shape[:-4], 3, *index.shape[-3:])
            chosen = _pick(index, self.loc, self.scale, self.coefficients)
            return self._in_order(lambda bins: bins.sample(), chosen, dim=-3)

    @property
    def mean(self) -> Tensor:
        """Exact for red; that of green and blue is taken where the channels before have their means.

        It differs from the mean by how the ends of the scale bend what is linear in between.
        """
        means = self._in_order(lambda bins: bins.mean, (self.loc, self.scale, self.coefficients), dim=-4)
        return (self.logits.softmax(-1) * means).sum(-1)

    @property
    def variance(self) -> Tensor:
        raise NotImplementedError(
            "The variance of a mixture with rgb=True has no closed form: a channel's location depends on the channels "
            "before. Take that of samples."
        )
