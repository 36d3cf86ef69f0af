"""The same networks under several likelihoods, on the same data: one table per measure, and pictures beside it."""

from ppl_vae.comparing.families import families, prepared
from ppl_vae.comparing.record import Comparison
from ppl_vae.comparing.rows import Row
from ppl_vae.comparing.running import compare

__all__ = ["Comparison", "Row", "compare", "families", "prepared"]
