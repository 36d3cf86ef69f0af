"""Pictures: arrays and an `ax` in, the `ax` out; none runs a model, and `manifold` takes a decode callable.

Every function draws on the matplotlib `ax` it is given, or on a new figure without one, and returns the axes:
`plots.loss_curve(history).figure.savefig("loss.png")`. Arrays are torch tensors (on any device, with
or without gradients) or NumPy arrays.
"""

from __future__ import annotations

from ppl_vae.plots.calibration import calibration
from ppl_vae.plots.charts import estimate_against_samples, kl_per_dimension, latent_scatter, loss_curve, pareto_k
from ppl_vae.plots.images import image_grid, manifold, reconstructions
from ppl_vae.plots.rungs import ladder

__all__ = [
    "calibration",
    "estimate_against_samples",
    "image_grid",
    "kl_per_dimension",
    "ladder",
    "latent_scatter",
    "loss_curve",
    "manifold",
    "pareto_k",
    "reconstructions",
]
