"""What a guide does with its latents: reconstruction, KL, the units it uses, and what z knows of x."""

from ppl_vae.diagnostics.diagnosis import diagnose
from ppl_vae.diagnostics.record import ACTIVE, NAMES, Diagnostics

__all__ = ["ACTIVE", "NAMES", "Diagnostics", "diagnose"]
