"""The pictures of a comparison: a panel for each row."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ppl_vae import plots
from ppl_vae.comparing.record import Comparison
from ppl_vae.comparing.rows import Row
from ppl_vae.data import Levels
from ppl_vae.data.scale import Dequantized
from ppl_vae.reporting import write_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUM_IMAGES, COLUMNS = 8, 3
GAP = 0.15  # inches around a panel, without which the images of neighbours run together
# Bars of a calibration, and as few numbers as make one.
MOST_BARS, FEWEST = 20, 10


def draw(comparison: Comparison, folder: Path) -> None:
    """Writes `calibration.png` if there are numbers enough and, of images, `samples.png` and `reconstructions.png`."""
    drawn: dict[str, Callable[[Comparison], Figure]] = {}
    if comparison.rows[0].transform.numel() >= 2 * FEWEST:
        drawn["calibration"] = calibration
    if comparison.rows[0].data.test.dim() > 2:
        drawn |= {"samples": samples, "reconstructions": reconstructions}
    for name, picture in drawn.items():
        write_picture(picture(comparison), folder / f"{name}.png")


def samples(comparison: Comparison) -> Figure:
    """For the same z of the prior the mean of p(x given z), and below it a draw."""

    def panel(row: Row, ax: Axes) -> None:
        images = torch.cat([row.vae.sample(NUM_IMAGES, seed=0, mean=True), row.vae.sample(NUM_IMAGES, seed=0)])
        plots.image_grid(on_unit(row, images), columns=NUM_IMAGES, title=row.name, ax=ax)

    return _panels(comparison, panel, height=1.1, title="z of the prior: the mean of p(x given z), and a draw")


def reconstructions(comparison: Comparison) -> Figure:
    """Test data on each likelihood's own scale, and below each the mean of p(x given z) at the mean of q."""

    def panel(row: Row, ax: Axes) -> None:
        x = row.data.test[:NUM_IMAGES]
        again = on_unit(row, row.vae.reconstruct(x))
        plots.reconstructions(on_unit(row, x), again, num_images=NUM_IMAGES, ax=ax).set(title=row.name, yticks=[])

    return _panels(comparison, panel, height=1.1, title="Test data, and p(x given z) in the mean")


def calibration(comparison: Comparison) -> Figure:
    """The probability integral transform of the test data under each decoder."""

    def panel(row: Row, ax: Axes) -> None:
        bins = min(MOST_BARS, row.transform.numel() // FEWEST)
        plots.calibration(row.transform, bins=bins, ax=ax).set_title(row.name)
        legend = ax.get_legend()
        if legend is not None and row is not comparison.rows[0]:
            legend.remove()
        ax.set_xlabel("")
        ax.set_ylabel("")

    return _panels(
        comparison,
        panel,
        height=1.9,
        title="Rank of the test data among draws of p(x given z)",
    )


def on_unit(row: Row, x: Tensor) -> Tensor:
    """Data or means of a row on [0, 1], whatever their scale."""
    scale = row.data.scale
    if isinstance(scale, Dequantized):
        return scale.to_unit(x)
    return x / (scale.levels - 1) if isinstance(scale, Levels) else x


def _panels(comparison: Comparison, panel: Callable[[Row, Axes], None], *, height: float, title: str) -> Figure:
    # Here, because they would slow the start of every program.
    from matplotlib import pyplot
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    count = len(comparison.rows)
    columns = min(COLUMNS, count)
    lines = ceil(count / columns)
    size = 3.6 * columns, height * lines + 0.5
    apart = ConstrainedLayoutEngine(w_pad=GAP)
    figure, axes = pyplot.subplots(lines, columns, figsize=size, layout=apart, squeeze=False)
    for row, ax in zip(comparison.rows, axes.flat, strict=False):
        panel(row, ax)
    for ax in axes.flat[count:]:
        ax.set_axis_off()
    figure.suptitle(title)
    return figure
