"""Mixtures of diagonal normals, with gradients through their draws."""

from __future__ import annotations

from collections.abc import Sequence
from math import log, pi
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints


class NormalMixture(dist.TorchDistribution):
    """Σ_k π_k N(loc_k, diag(scale_k²)), π = softmax(logits), with draws that carry gradients.

    Draws pick a component, so that z is no smooth function of noise. Yet z moves with the parameters as its
    distribution does: F(z) = (P(z₁), P(z₂ given z₁), ...), which is uniform whatever the parameters, stays where it is,
    and so dz = −(∂F/∂z)⁻¹ dF (implicit reparameterisation). Densities are sums in float64, as one matrix product.

    Args:
        logits: `(*batch, components)`.
        loc: `(*batch, components, dim)`.
        scale: as loc, positive.

    Reference:
        Figurnov, Mohamed & Mnih, Implicit Reparameterization Gradients, 2018. https://arxiv.org/abs/1805.08498

    Example:
        >>> p = NormalMixture(torch.zeros(2), torch.tensor([[-3.0], [3.0]]), torch.ones(2, 1))
        >>> p.mean, p.variance, p.sample((5,)).shape
        (tensor([0.]), tensor([10.]), torch.Size([5, 1]))
    """

    arg_constraints: ClassVar = {
        "logits": constraints.real_vector,
        "loc": constraints.independent(constraints.real, 2),
        "scale": constraints.independent(constraints.positive, 2),
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, logits: Tensor, loc: Tensor, scale: Tensor, *, validate_args: bool | None = None) -> None:
        self.logits, self.loc, self.scale = logits, loc, scale
        super().__init__(logits.shape[:-1], loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> NormalMixture:
        # The parameters stay as they are, and broadcast: the density at many points remains one matrix product.
        new = self._get_checked_instance(NormalMixture, _instance)
        new.logits, new.loc, new.scale = self.logits, self.loc, self.scale
        super(NormalMixture, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        mean = (self.logits.softmax(-1).unsqueeze(-1) * self.loc).sum(-2)
        return mean.expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        around = self.scale.square() + (self.loc - self.mean.unsqueeze(-2)).square()
        variance = (self.logits.softmax(-1).unsqueeze(-1) * around).sum(-2)
        return variance.expand(self.batch_shape + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        z, loc, precision = value.double(), self.loc.double(), self.scale.double().pow(-2)
        # −½ (z − loc)² precision, multiplied out: float64 keeps what is left after cancellation.
        powers = torch.cat([z.square(), z], dim=-1).unsqueeze(-2)
        factors = torch.cat([-0.5 * precision, loc * precision], dim=-1).mT
        constant = (-0.5 * (loc.square() * precision) + 0.5 * (precision / (2 * pi)).log()).sum(-1)
        log_normal = (powers @ factors).squeeze(-2) + constant
        log_prob = (self.logits.double().log_softmax(-1) + log_normal).logsumexp(-1)
        return log_prob.to(value.dtype).expand(torch.broadcast_shapes(value.shape[:-1], self.batch_shape))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            shape = self._extended_shape(sample_shape)
            chosen = dist.Categorical(logits=self.logits).expand(self.batch_shape).sample(sample_shape)
            index = chosen[..., None, None].expand(*shape[:-1], 1, shape[-1])
            loc, scale = (
                p.expand(*shape[:-1], *p.shape[-2:]).gather(-2, index).squeeze(-2) for p in (self.loc, self.scale)
            )
            return loc + scale * torch.randn_like(loc)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        z = self.sample(sample_shape)
        parameters = (self.logits, self.loc, self.scale)
        if not (torch.is_grad_enabled() and any(p.requires_grad for p in parameters)):
            return z
        logits, loc, scale = (p.double() for p in parameters)
        standard = (z.double().unsqueeze(-2) - loc) / scale  # (*, components, dim)
        log_normal = -0.5 * (standard.square() + log(2 * pi)) - scale.log()
        before = log_normal.cumsum(-1) - log_normal
        weight = (logits.log_softmax(-1).unsqueeze(-1) + before).softmax(-2)  # P(component given the z before)
        below = torch.special.ndtr(standard)
        distribution = (weight * below).sum(-2)
        with torch.no_grad():
            density = (weight * log_normal.exp()).sum(-2)
            deviation = weight * (below - distribution.unsqueeze(-2))
            slope = torch.einsum("...ki,...kj->...ij", deviation, -standard / scale) / density.unsqueeze(-1)
        # Its value is 0; only what is below the diagonal of the slope is read, whose diagonal is 1.
        uniform = ((distribution - distribution.detach()) / density).unsqueeze(-1)
        moved = torch.linalg.solve_triangular(slope, uniform, upper=False, unitriangular=True).squeeze(-1)
        return z - moved.to(z.dtype)
