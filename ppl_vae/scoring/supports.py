"""Where a distribution has its mass, also where torch says otherwise."""

from __future__ import annotations

from math import pi
from typing import Any

import pyro.distributions as dist
import torch
from pyro.contrib.zuko import ZukoToPyro
from torch import Tensor
from torch.distributions import constraints

# Their supports are declared as the real line.
CIRCULAR = (dist.VonMises, dist.SineBivariateVonMises, dist.SineSkewed)
WRAPPED = (dist.ExpandedDistribution, dist.MaskedDistribution)


def support_of(fn: Any) -> Any:
    """The constraint that all values of a distribution obey, and that its density integrates to 1 over."""
    if isinstance(fn, torch.distributions.Independent):
        return constraints.independent(support_of(fn.base_dist), fn.reinterpreted_batch_ndims)
    if isinstance(fn, WRAPPED):
        return support_of(fn.base_dist)
    if isinstance(fn, torch.distributions.MixtureSameFamily) and is_unbounded(fn.component_distribution):
        return support_of(fn.component_distribution)
    if isinstance(fn, ZukoToPyro):  # declares none
        return fn.dist.transform.domain if hasattr(fn.dist, "transform") else support_of(fn.dist)
    if isinstance(fn, CIRCULAR):
        return constraints.independent(constraints.interval(-pi, pi), len(fn.event_shape))
    return fn.support


def elementwise(support: Any) -> Any:
    """The constraint on single numbers that one on vectors is made from."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def is_unbounded(fn: Any) -> bool:
    """Whether a distribution has mass all over the real line, or it cannot be told."""
    support = elementwise(support_of(fn))
    if support is not constraints.real and not constraints.is_dependent(support):
        return False
    base = fn
    while isinstance(base, (torch.distributions.Independent, *WRAPPED)):
        base = base.base_dist
    # A transform's range is that of all real numbers; its base may not reach them all.
    return not isinstance(base, torch.distributions.TransformedDistribution) or _unbounded_base(base)


def _unbounded_base(fn: torch.distributions.TransformedDistribution) -> bool:
    return is_unbounded(fn.base_dist) or support_of(fn.base_dist) == fn.transforms[0].domain


def inside(fn: Any, value: Tensor) -> Tensor:
    """Which values a distribution can have, in its batch shape (and that of samples to its left)."""
    if isinstance(fn, torch.distributions.Independent):
        within = inside(fn.base_dist, value)
        num = fn.reinterpreted_batch_ndims
        return within.reshape(*within.shape[: within.dim() - num], -1).all(-1) if num else within
    if isinstance(fn, WRAPPED):
        return inside(fn.base_dist, value)
    if isinstance(fn, torch.distributions.TransformedDistribution) and not _unbounded_base(fn):
        within = fn.support.check(value)
        for transform in reversed(fn.transforms):
            value = transform.inv(value)
        return within & _reduced(inside(fn.base_dist, value), within)
    return support_of(fn).check(value)


def _reduced(within: Tensor, like: Tensor) -> Tensor:
    """All of what a transform made into one event."""
    return within.flatten(like.dim()).all(-1) if within.dim() > like.dim() else within


def log_prob_anywhere(fn: Any, value: Tensor) -> Tensor:
    """The log-probability of any value: −∞ where the distribution has no mass, though torch may give a number.

    Latents that are given may lie there: their weight is 0, which is no mistake.
    """
    without_validation(fn)
    if is_unbounded(fn):
        return fn.log_prob(value)
    support = elementwise(support_of(fn))
    safe = value
    if support.is_discrete and hasattr(support, "lower_bound"):  # a category too many is no index
        safe = torch.where(support.check(value), value, torch.as_tensor(support.lower_bound).to(value))
    return torch.where(inside(fn, value), fn.log_prob(safe), -torch.inf)


def without_validation(fn: Any) -> None:
    """Lets a distribution answer for any value."""
    while fn is not None:
        fn._validate_args = False
        fn = getattr(fn, "base_dist", None)
