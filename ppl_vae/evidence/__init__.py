"""log p(x) of any pair, per datum and with its own error."""

from ppl_vae.evidence.importance import importance_sampling
from ppl_vae.evidence.record import Evidence
from ppl_vae.evidence.stream import WeightStream

__all__ = ["Evidence", "WeightStream", "importance_sampling"]
