"""The pictures of a run, each with its caption."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

import ppl_vae as pv
from ppl_vae import plots
from ppl_vae.diagnostics import Diagnostics
from ppl_vae.evidence import Evidence
from ppl_vae.reporting import write_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ppl_vae.cli.runs import Run

    Picture = tuple[Axes, str]  # and its caption

matplotlib.use("agg")  # pictures go to files; no window, and no display needed


def loss(run: Run) -> Picture:
    return plots.loss_curve(run.history), "The loss, −ELBO in nats per datum, after each pass over the training data."


def of_model(run: Run) -> dict[str, Picture]:
    """What the run has learned; of data that are no images, only how they lie in the latent space."""
    vae, x, labels = run.vae, run.data.test[:2000], run.data.test_labels
    pictures: dict[str, Picture] = {}
    if x.dim() > 2:
        samples = plots.image_grid(vae.sample(64, mean=True), columns=16)
        pictures["samples"] = samples, "Samples: z drawn from the prior, and the mean of p(x given z)."
        rows = plots.reconstructions(x[:10], vae.reconstruct(x[:10]))
        pictures["reconstructions"] = rows, "Test data, and below each the mean of p(x given z) at the mean of q."
        if vae.latent_dim == 2:
            caption = "The latent plane, decoded at equally probable steps of the prior."
            pictures["manifold"] = plots.manifold(lambda z: vae.decode(z).mean, gap=1), caption
    if vae.latent_dim > 1 and len(x) > 1:
        few = labels is not None and len(labels.unique()) <= 20
        with pv.isolation.evaluation():
            scatter = plots.latent_scatter(vae.encode(x).mean, labels[:2000] if few and labels is not None else None)
        pictures["latents"] = scatter, "Where q(z given x) puts the test data: a point for each, at the mean of q."
    return pictures


def pareto_k(evidence: Evidence) -> Picture:
    return (
        plots.pareto_k(evidence.pareto_k),
        "Pareto k of every test datum: up to 0.7 its log p(x) can be used, above it is too low by an unknown amount.",
    )


def kl_per_dimension(found: Diagnostics) -> dict[str, Picture]:
    """The KL of each latent dimension, where there is such a thing."""
    if found.kl_per_dimension is None or not found.kl_per_dimension.isfinite().all():
        return {}
    ax = plots.kl_per_dimension(found.kl_per_dimension, active=found.active, names=found.dimensions)
    return {
        "kl_per_dimension": (
            ax,
            "How far q(z given x) is from the prior in each latent dimension. A dimension that is not active has "
            "nearly the same posterior mean for all data.",
        )
    }


def draw(pictures: dict[str, Picture], folder: Path) -> None:
    """Writes each picture to `figures/NAME.png`."""
    for name, (ax, _) in pictures.items():
        write_picture(ax, folder / "figures" / f"{name}.png")
