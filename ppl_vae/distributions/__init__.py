"""Distributions over z that torch and Pyro do not have in this form, for the rooms of priors and posteriors."""

from ppl_vae.distributions.coupling import Couplings, Flow
from ppl_vae.distributions.mixture import NormalMixture

__all__ = ["Couplings", "Flow", "NormalMixture"]
