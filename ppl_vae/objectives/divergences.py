"""KL(q, p) of the latents of a pair in closed form, where one is known."""

from __future__ import annotations

from typing import Any

from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence
from torch.distributions.kl import register_kl


@register_kl(MultivariateNormal, Independent)
def _full_covariance_to_diagonal(q: MultivariateNormal, p: Independent) -> Tensor:
    """½ [Σ_d (Σ_dd + (μ_d − m_d)²) / s_d² + log s_d² − log|Σ| − D], which torch does not have.

    Known to Pyro's TraceMeanField_ELBO too, which would sample it otherwise.
    """
    if not isinstance(p.base_dist, Normal) or p.reinterpreted_batch_ndims != 1:
        raise NotImplementedError
    squares = q.scale_tril.square().sum(-1) + (q.loc - p.base_dist.loc).square()
    log_det = 2 * q.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    variance = p.base_dist.scale.square()
    return 0.5 * ((squares / variance + variance.log() - 1).sum(-1) - log_det)


def closed_form(q: Any, p: Any) -> Tensor | None:
    """KL(q, p) of the batch shape of both, or None where no formula is registered with torch.

    Example:
        >>> import torch
        >>> closed_form(Normal(torch.ones(3), 1.0), Normal(0.0, 1.0))
        tensor([0.5000, 0.5000, 0.5000])
    """
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        return None


def by_dimension(q: Any, p: Any) -> tuple[Tensor, int] | None:
    """KL(q, p) for each dimension of an event where both are independent over them, and how many dimensions remain.

    Returns:
        The KL, of batch shape plus the shape of the dimensions it could be told for, and the number of these; None
        where no formula is registered.

    Example:
        >>> import torch
        >>> import pyro.distributions as dist
        >>> q, p = dist.Normal(torch.ones(5, 3), 1.0).to_event(1), dist.Normal(torch.zeros(5, 3), 1.0).to_event(1)
        >>> kl, rank = by_dimension(q, p)
        >>> kl.shape, rank
        (torch.Size([5, 3]), 1)
    """
    rank = 0
    while isinstance(q, Independent) and isinstance(p, Independent):
        if q.reinterpreted_batch_ndims != p.reinterpreted_batch_ndims:
            break
        rank += q.reinterpreted_batch_ndims
        q, p = q.base_dist, p.base_dist
    kl = closed_form(q, p)
    return None if kl is None else (kl, rank)


def masked(kl: Tensor, mask: Any, rank: int = 0) -> Tensor:
    """A KL, 0 where its site is masked; the mask is of the batch shape, to the right of which are `rank` dimensions."""
    if isinstance(mask, Tensor):
        mask = mask.reshape(*mask.shape, *(1,) * rank)
    return scale_and_mask(kl, mask=mask)
