"""What latents are drawn from when log p(x) is estimated: the guide, and better.

A `Proposal` makes, for each batch of data, a normalised `Density` over the unconstrained coordinates of a
`scoring.Target`. It is fixed before any draw that is weighted, so that every estimate from it is unbiased for p(x),
whatever it is.
"""

from ppl_vae.proposals.densities import Defensive, Density, Guide, Prior, Proposal, StudentT, Widened, checked
from ppl_vae.proposals.families import CouplingFlow, DiagonalNormal, FullCovarianceNormal
from ppl_vae.proposals.local import Local

__all__ = [
    "CouplingFlow",
    "Defensive",
    "Density",
    "DiagonalNormal",
    "FullCovarianceNormal",
    "Guide",
    "Local",
    "Prior",
    "Proposal",
    "StudentT",
    "Widened",
    "checked",
]
