"""Charts of numbers: losses, latents and their KL, estimates and their Pareto k."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch import Tensor

from ppl_vae.plots.axes import COLOURS, as_array, axes_or_new, label_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS = ("o", "^")
_MOST_CLASSES = len(COLOURS) * len(_MARKERS)


class _History(Protocol):
    @property
    def loss(self) -> Sequence[float]: ...
    @property
    def validation(self) -> Sequence[float]: ...


def loss_curve(history: _History, *, ax: Axes | None = None) -> Axes:
    """Draws the training loss, and the validation loss where there is one, against the epoch.

    Where the first quarter of the epochs dwarfs the rest, the picture is cut above so that the end keeps its
    shape, and the title says what was cut.

    Args:
        history: anything with `.loss` and `.validation`, lists in nats per datum, one number per epoch;
            `.validation` may be empty. `fit` returns one.
        ax: where to draw.

    Raises:
        ValueError: `history.loss` is empty.
    """
    if not history.loss:
        raise ValueError("Expected a loss per epoch in history.loss, got none. Train for at least one epoch.")
    ax = axes_or_new(ax, (6.0, 3.8))
    marker = "." if len(history.loss) <= 40 else ""
    for name, losses, colour, line in (
        ("training", history.loss, COLOURS[0], "-"),
        ("validation", history.validation, COLOURS[6], "--"),
    ):
        if losses:
            ax.plot(range(1, len(losses) + 1), losses, line, color=colour, marker=marker, label=name)
    ax.locator_params(axis="x", integer=True)
    label_axes(ax, "epoch", "loss (nats per datum)")
    _cut_high_beginnings(ax, [history.loss, history.validation])
    ax.legend()
    return ax


def latent_scatter(
    latents: Tensor | np.ndarray, labels: Tensor | np.ndarray | None = None, *, ax: Axes | None = None
) -> Axes:
    """Draws a point per datum at its latent mean, coloured by its class.

    Two dimensions are drawn as they are; of more, the two directions of greatest variance (principal
    components), with the share of the variance that each holds on its axis.

    Args:
        latents: (N, D) with D >= 2 and N >= 2; for example `encode(x).mean`.
        labels: (N,), at most 20 classes; numbers or strings.
        ax: where to draw.

    Raises:
        ValueError: another shape, values that are not finite, or more than 20 classes.
    """
    points = as_array(latents)
    if points.ndim != 2 or points.shape[0] < 2 or points.shape[1] < 2:
        raise ValueError(f"Expected latents of shape (N, D) with N, D >= 2, got {points.shape}.")
    if not np.isfinite(points).all():
        raise ValueError("Expected finite latents, got NaN or infinity among them. Check the encoder.")
    classes = np.zeros(len(points), dtype=int) if labels is None else as_array(labels)
    names = np.unique(classes)
    if classes.shape != (len(points),) or len(names) > _MOST_CLASSES:
        raise ValueError(
            f"Expected labels of shape ({len(points)},) with at most {_MOST_CLASSES} classes, "
            f"got {classes.shape} with {len(names)}. Group continuous labels into classes first."
        )
    x_label, y_label = "$z_1$", "$z_2$"
    if points.shape[1] > 2:
        points, shares = _principal_components(points)
        x_label, y_label = (
            f"{which} direction of greatest variance ({share:.0%})"
            for which, share in zip(("first", "second"), shares, strict=True)
        )
    ax = axes_or_new(ax, (6.4, 5.2))
    size = 3.5 if len(points) <= 2000 else 2.0
    for i, name in enumerate(names):
        x, y = points[classes == name].T
        colour, marker = COLOURS[i % len(COLOURS)], _MARKERS[i // len(COLOURS)]
        # Points are pixels in a PDF too, which would take megabytes otherwise.
        (dots,) = ax.plot(x, y, marker, color=colour, markersize=size, label=str(name), rasterized=True)
        dots.set(markeredgewidth=0, alpha=0.7)
    ax.set_aspect("equal", adjustable="datalim")
    label_axes(ax, x_label, y_label)
    if labels is not None:
        ax.legend(title="class", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, markerscale=7 / size)
    return ax


def estimate_against_samples(
    num_samples: Sequence[int],
    log_px: Sequence[float] | Tensor | np.ndarray,
    standard_error: Sequence[float] | Tensor | np.ndarray | None = None,
    *,
    exact: float | None = None,
    label: str = "estimate",
    ax: Axes | None = None,
) -> Axes:
    """Draws estimates of log p(x) against the number of samples each was made with: has it settled?

    Call it again with the same `ax` to compare estimators.

    Args:
        num_samples: samples per datum, (K,); on a logarithmic axis.
        log_px: (K,), nats per datum, the mean over the data.
        standard_error: (K,), nats per datum; a band of two of them to both sides.
        exact: the true value in nats per datum where it is known, as a dashed line.
        label: the name of the curve in the legend.
        ax: where to draw.

    Raises:
        ValueError: the lengths differ, there is nothing to draw, or a number of samples is below one.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> ax = estimate_against_samples([1, 10, 100], [-99.0, -97.5, -97.1], [0.4, 0.2, 0.1], ax=ax)
        >>> ax.get_xscale()
        'log'
    """
    samples, values = as_array(num_samples), as_array(log_px)
    errors = None if standard_error is None else as_array(standard_error)
    shapes = {array.shape for array in (samples, values, errors) if array is not None}
    if len(shapes) != 1 or samples.ndim != 1 or samples.size == 0 or samples.min() < 1:
        raise ValueError(
            "Expected one number of samples (at least 1), one log p(x) and one standard error per estimate, "
            f"got shapes {sorted(shapes)} and numbers of samples {samples.tolist()}."
        )
    order = np.argsort(samples)
    samples, values = samples[order], values[order]
    ax = axes_or_new(ax, (6.0, 3.8))
    if errors is not None:
        label = f"{label} ± 2 standard errors"
    (line,) = ax.plot(samples, values, marker="o", markersize=4, color=COLOURS[len(ax.lines) % 10], label=label)
    if errors is not None:
        band = 2.0 * errors[order]
        ax.fill_between(samples, values - band, values + band, color=line.get_color(), alpha=0.2, linewidth=0)
    if exact is not None:
        ax.axhline(exact, color="black", linestyle="--", linewidth=1.2, label="exact")
    ax.set_xscale("log")
    label_axes(ax, "samples per datum", "log p(x) (nats per datum)")
    ax.legend()
    return ax


def pareto_k(k: Tensor | np.ndarray, *, ax: Axes | None = None) -> Axes:
    """Draws the Pareto k of every datum in increasing order: how heavy the tail of its importance weights is.

    Up to 0.5 the weights have a finite variance, up to 0.7 the estimate of log p(x) is still of use, above it is
    not to be trusted (Vehtari, Simpson, Gelman, Yao & Gabry, 2024). The legend counts the data of each kind.
    Minus infinity (weights that are all equal), infinity and NaN have no place on the axis and are only counted:
    the first as reliable, the others as not to be trusted.

    Args:
        k: (N,), one per datum; `Evidence.pareto_k`.
        ax: where to draw.

    Raises:
        ValueError: another shape, or no datum.
    """
    values = as_array(k)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"Expected one Pareto k per datum, of shape (N,), got shape {values.shape}.")
    ax = axes_or_new(ax, (6.0, 3.8))
    rank = np.empty(len(values), dtype=int)
    rank[np.argsort(values)] = np.arange(1, len(values) + 1)
    good, fair = values <= 0.5, (values > 0.5) & (values <= 0.7)
    for chosen, meaning, colour, marker in (
        (good, "k ≤ 0.5, reliable", COLOURS[0], "o"),
        (fair, "0.5 < k ≤ 0.7, of use", COLOURS[1], "s"),
        (~(good | fair), "k > 0.7, not to be trusted", COLOURS[2], "^"),
    ):
        drawn = chosen & np.isfinite(values)
        label = f"{meaning}: {chosen.sum()} of {len(values)}"
        if chosen.sum() > drawn.sum():
            kind = "all weights equal" if chosen is good else "infinite or undefined"
            label += f"\n({chosen.sum() - drawn.sum()} not drawn: {kind})"
        ax.plot(rank[drawn], values[drawn], marker, color=colour, markersize=4, label=label)
    for threshold in (0.5, 0.7):
        ax.axhline(threshold, color="black", linestyle="--", linewidth=0.9)
    ax.set_xlim(0, len(values) + 1)
    ax.locator_params(axis="x", integer=True)
    label_axes(ax, "datum, in order of k", "Pareto k")
    # Below the ticks and the label of the axis, whose height is in letters and not in parts of the picture.
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), borderaxespad=3.5, frameon=False)
    return ax


def kl_per_dimension(
    kl: Tensor | np.ndarray,
    *,
    active: Tensor | np.ndarray | None = None,
    names: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws the KL of each latent dimension as a bar, the largest first: which of them are used?

    Args:
        kl: (N, D), nats per datum, `Diagnostics.kl_per_dimension`; the bars are means over the data, with two of their
            standard errors to both sides where there are two data or more.
        active: (D,), which dimensions are in use, `Diagnostics.active`; the others are grey.
        names: D of them, `Diagnostics.dimensions`; below the bars where there are at most 30.
        ax: where to draw.

    Raises:
        ValueError: the shapes do not go together, there is no datum or no dimension, or a number is not finite.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = kl_per_dimension(np.array([[0.0, 2.0], [0.2, 3.0]]), ax=Figure().subplots())
        >>> [float(bar.get_height()) for bar in ax.patches]
        [2.5, 0.1]
    """
    values = as_array(kl)
    if values.ndim != 2 or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"Expected finite KL of shape (N, D) with N, D >= 1, got shape {values.shape}.")
    used = np.ones(values.shape[1], dtype=bool) if active is None else as_array(active).astype(bool)
    labels = [str(d) for d in range(values.shape[1])] if names is None else list(names)
    if used.shape != (values.shape[1],) or len(labels) != values.shape[1]:
        raise ValueError(
            f"Expected an activity and a name for each of {values.shape[1]} dimensions, got {used.shape} and "
            f"{len(labels)}."
        )
    ax = axes_or_new(ax, (6.0, 3.8))
    heights, order = values.mean(0), np.argsort(-values.mean(0), kind="stable")
    bars = 2.0 * values.std(0, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else None
    for chosen, label, colour in ((used, "active", COLOURS[0]), (~used, "not active", COLOURS[3])):
        places = np.flatnonzero(chosen[order])
        if len(places):
            error = None if bars is None else bars[order[places]]
            label += f": {len(places)} of {len(used)}"
            ax.bar(places, heights[order[places]], yerr=error, color=colour, capsize=2, label=label)
    few = len(labels) <= 30
    ax.set_xticks(range(len(labels)) if few else [], [labels[d] for d in order] if few else [])
    if max(map(len, labels)) * len(labels) > 60:
        ax.tick_params(axis="x", rotation=90)
    label_axes(ax, "latent dimension, in order of KL", "KL(q, prior) (nats per datum)")
    ax.legend()
    return ax


def _principal_components(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (N, 2) along the two directions of greatest variance, and the share of it each holds."""
    u, s, _ = np.linalg.svd(points - points.mean(0), full_matrices=False)
    return u[:, :2] * s[:2], s[:2] ** 2 / max((s**2).sum(), np.finfo(s.dtype).tiny)


def _cut_high_beginnings(ax: Axes, curves: Sequence[Sequence[float]]) -> None:
    """Leaves the last three quarters of the epochs at least a quarter of the height."""
    finite = [(i, loss) for losses in curves for i, loss in enumerate(losses, 1) if math.isfinite(loss)]
    late = [loss for epoch, loss in finite if epoch > len(curves[0]) // 4]
    if not late or min(late) == max(late):
        return
    low, height = min(late), 4.0 * (max(late) - min(late))
    above = [(epoch, loss) for epoch, loss in finite if loss > low + height]
    if above:
        last, highest = max(above)[0], max(loss for _, loss in above)
        ax.set_ylim(low - 0.05 * height, low + height)
        ax.set_title(f"cut off: losses up to {highest:,.1f} until epoch {last}", fontsize="small")
