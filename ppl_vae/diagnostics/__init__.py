"""What is wrong with a pair, if anything: collapse and use of the latents, calibration of p(x given z)."""

from ppl_vae.diagnostics.calibration import probability_integral_transform
from ppl_vae.diagnostics.diagnosis import diagnose
from ppl_vae.diagnostics.record import ACTIVE, NAMES, Diagnostics

__all__ = ["ACTIVE", "NAMES", "Diagnostics", "diagnose", "probability_integral_transform"]
