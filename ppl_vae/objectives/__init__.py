"""What `fit`, `pyro.infer.SVI` and a loop of your own can lower, for any pair with a log weight per datum.

| objective | the bound, for each datum | the encoder's gradient |
|---|---|---|
| `ImportanceWeightedELBO(num_particles=K)`, `IWAE` | log 1/K Σ w | the bound's own |
| `DReG(num_particles=K)` | the same | doubly reparameterised: less noise, 0 at the exact posterior |
| `StickingTheLanding()` | the ELBO | along the path alone: less noise, 0 at the exact posterior |
| `VIMCO(num_particles=K)` | log 1/K Σ w | by log q, for discrete latents too |
| `BetaELBO(beta)` | the ELBO | with the KL times β, a number or a schedule |
| `AnalyticKL()` | the ELBO | with the KL in closed form |
| `FreeBits(nats)` | the ELBO | with the KL free up to so many nats a dimension |
| `SemiSupervisedELBO(alpha)` | of log p(x, y) where y is known, else of log p(x) | and a classifier's, times alpha |

Every one is a `pyro.infer.ELBO` whose `terms(model, guide, *args)` gives the loss to lower and, beside it, the bound
at weight 1. A weight on the KL belongs here: a `poutine.scale` inside the programs is refused. The pair is looked at
once, as `ppl_vae.scoring.Pair` does it, and again when one of its programs has changed.
"""

from ppl_vae.objectives.elbo import AnalyticKL, BetaELBO, FreeBits
from ppl_vae.objectives.objective import Objective, Terms
from ppl_vae.objectives.semi_supervised import SemiSupervisedELBO
from ppl_vae.objectives.weighted import VIMCO, DReG, ImportanceWeightedELBO, StickingTheLanding

IWAE = ImportanceWeightedELBO

__all__ = [
    "IWAE",
    "VIMCO",
    "AnalyticKL",
    "BetaELBO",
    "DReG",
    "FreeBits",
    "ImportanceWeightedELBO",
    "Objective",
    "SemiSupervisedELBO",
    "StickingTheLanding",
    "Terms",
]
