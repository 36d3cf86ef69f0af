"""log p(x) of any pair, per datum and with its own error: estimates, bounds from both sides, exact references."""

from ppl_vae.evidence.annealing import AnnealedEvidence, annealed_importance_sampling
from ppl_vae.evidence.both_sides import Bounds, Kind
from ppl_vae.evidence.bounding import bounds, sandwich
from ppl_vae.evidence.discrete import enumeration
from ppl_vae.evidence.exact import Exact
from ppl_vae.evidence.grid import grid_integration
from ppl_vae.evidence.importance import importance_sampling
from ppl_vae.evidence.modes import ModeCheck, mode_check
from ppl_vae.evidence.record import Evidence
from ppl_vae.evidence.stream import WeightStream

__all__ = [
    "AnnealedEvidence",
    "Bounds",
    "Evidence",
    "Exact",
    "Kind",
    "ModeCheck",
    "WeightStream",
    "annealed_importance_sampling",
    "bounds",
    "enumeration",
    "grid_integration",
    "importance_sampling",
    "mode_check",
    "sandwich",
]
