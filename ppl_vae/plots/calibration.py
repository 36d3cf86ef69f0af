"""The histogram of a probability integral transform, beside what it would be of a model that is right."""

from __future__ import annotations

from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ppl_vae.plots.axes import COLOURS, as_array, axes_or_new, label_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def calibration(u: Tensor | np.ndarray, *, bins: int = 20, ax: Axes | None = None) -> Axes:
    """Draws the histogram of a probability integral transform, with the band that uniform numbers would stay in.

    All bars of independent uniform numbers lie in the band in 99 % of such pictures (normal approximation, Bonferroni
    over the bars). High at both ends: p(x given z) is too narrow; high in the middle: too wide; higher to one side:
    the data lie there of what is predicted.

    Args:
        u: numbers in [0, 1] of any shape; `diagnostics.probability_integral_transform` returns them.
        bins: how many bars, of the same width.
        ax: where to draw.

    Raises:
        ValueError: fewer than 5 numbers for each bar, fewer than 2 bars, or numbers outside [0, 1].

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = calibration((np.arange(1000) + 0.5) / 1000, bins=10, ax=Figure().subplots())
        >>> [round(float(bar.get_height()), 6) for bar in ax.patches[:3]]
        [1.0, 1.0, 1.0]
    """
    values = as_array(u).ravel()
    if bins < 2 or values.size < 5 * bins:
        raise ValueError(
            f"Expected at least 2 bars and 5 numbers for each, got {values.size} numbers and {bins} bars. Take fewer "
            "bars, or more data."
        )
    if not ((values >= 0) & (values <= 1)).all():  # NaN is neither
        raise ValueError(f"Expected numbers in [0, 1], got some from {np.min(values):g} to {np.max(values):g}.")
    ax = axes_or_new(ax, (6.0, 3.8))
    counts, edges = np.histogram(values, bins=bins, range=(0.0, 1.0))
    spread = NormalDist().inv_cdf(1 - 0.01 / (2 * bins)) * np.sqrt((bins - 1) / values.size)
    ax.bar(edges[:-1], counts * bins / values.size, 1 / bins, align="edge", color=COLOURS[0], edgecolor="white")
    ax.axhspan(max(0.0, 1 - spread), 1 + spread, color="black", alpha=0.2, linewidth=0, label="if the model is right")
    ax.axhline(1.0, color="black", linewidth=0.9)
    ax.set_xlim(0, 1)
    label_axes(ax, "rank of the data among draws of p(x given z)", "density")
    ax.legend(loc="lower center")
    return ax
