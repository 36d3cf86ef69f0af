"""Pictures: arrays and an `ax` in, the `ax` out; none runs a model, and `manifold` takes a decode callable.

Every function draws on the matplotlib `ax` it is given, or on a new figure without one, and returns the axes:
`plots.loss_curve(history).figure.savefig("loss.png")`. Arrays are torch tensors (on any device, with
or without gradients) or NumPy arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Petroff's ten colours, told apart by colour-blind readers too (arXiv:2107.02270).
# fmt: off
_COLOURS = (
    "#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6",
    "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd",
)
# fmt: on
_MARKERS = ("o", "^")
_MOST_CLASSES = len(_COLOURS) * len(_MARKERS)


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
    ax = _axes(ax, (6.0, 3.8))
    marker = "." if len(history.loss) <= 40 else ""
    for name, losses, colour, line in (
        ("training", history.loss, _COLOURS[0], "-"),
        ("validation", history.validation, _COLOURS[6], "--"),
    ):
        if losses:
            ax.plot(range(1, len(losses) + 1), losses, line, color=colour, marker=marker, label=name)
    ax.locator_params(axis="x", integer=True)
    _label(ax, "epoch", "loss (nats per datum)")
    _cut_high_beginnings(ax, [history.loss, history.validation])
    ax.legend()
    return ax


def image_grid(
    images: Tensor | np.ndarray,
    *,
    columns: int | None = None,
    gap: int = 1,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Tiles images into one picture, row by row: samples of a model, a batch of data.

    Args:
        images: (N, H, W), or (N, C, H, W) with C = 1 or 3, in [0, 1]; what lies outside is clipped.
        columns: images per row; as many as make the grid a square without it.
        gap: white pixels between two images.
        title: above the picture.
        ax: where to draw.

    Raises:
        ValueError: the shape is another one, there is no image, or the images hold levels (0 ... 255).

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = image_grid(torch.rand(6, 28, 28), columns=3, ax=Figure().subplots())
        >>> ax.images[0].get_array().shape
        (57, 86)
    """
    tiles = _images(images)
    if columns is None:
        columns = math.ceil(math.sqrt(len(tiles)))
    if columns < 1 or gap < 0:
        raise ValueError(f"Expected columns >= 1 and gap >= 0, got columns={columns} and gap={gap}.")
    ax = _show_tiles(tiles, min(columns, len(tiles)), gap, ax)
    ax.set_title(title)
    return ax


def reconstructions(
    images: Tensor | np.ndarray,
    reconstructed: Tensor | np.ndarray,
    *,
    num_images: int = 10,
    ax: Axes | None = None,
) -> Axes:
    """Draws the first images in one row and their reconstructions below them.

    Args:
        images: (N, H, W), or (N, C, H, W) with C = 1 or 3, in [0, 1]; what lies outside is clipped.
        reconstructed: the same shape; for example the mean of `decode(encode(x).mean)`.
        num_images: how many to draw; all where there are fewer.
        ax: where to draw.

    Raises:
        ValueError: the two shapes differ, or either is no shape of images.
    """
    top, bottom = _images(images), _images(reconstructed)
    if top.shape != bottom.shape:
        raise ValueError(
            f"Expected reconstructions of the shape of the images, got {tuple(reconstructed.shape)} "
            f"for images {tuple(images.shape)}. Pass them in pairs."
        )
    if num_images < 1:
        raise ValueError(f"Expected at least one image to draw, got num_images={num_images}.")
    top, bottom = top[:num_images], bottom[:num_images]
    ax = _show_tiles(np.concatenate([top, bottom]), len(top), 1, ax)
    height = top.shape[1]
    ax.set_yticks([(height - 1) / 2, height + 1 + (height - 1) / 2], ["input", "reconstruction"])
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
    points = _array(latents)
    if points.ndim != 2 or points.shape[0] < 2 or points.shape[1] < 2:
        raise ValueError(f"Expected latents of shape (N, D) with N, D >= 2, got {points.shape}.")
    if not np.isfinite(points).all():
        raise ValueError("Expected finite latents, got NaN or infinity among them. Check the encoder.")
    classes = np.zeros(len(points), dtype=int) if labels is None else _array(labels)
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
    ax = _axes(ax, (6.4, 5.2))
    size = 3.5 if len(points) <= 2000 else 2.0
    for i, name in enumerate(names):
        x, y = points[classes == name].T
        colour, marker = _COLOURS[i % len(_COLOURS)], _MARKERS[i // len(_COLOURS)]
        # Points are pixels in a PDF too, which would take megabytes otherwise.
        (dots,) = ax.plot(x, y, marker, color=colour, markersize=size, label=str(name), rasterized=True)
        dots.set(markeredgewidth=0, alpha=0.7)
    ax.set_aspect("equal", adjustable="datalim")
    _label(ax, x_label, y_label)
    if labels is not None:
        ax.legend(title="class", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, markerscale=7 / size)
    return ax


def manifold(decode: Callable[[Tensor], Tensor | np.ndarray], *, size: int = 15, ax: Axes | None = None) -> Axes:
    """Draws the manifold of a two-dimensional latent space: a grid, decoded (Kingma & Welling, 2014).

    The latents stand at equally spaced quantiles of the standard normal prior, so that each tile has the same
    share of the prior's probability. z1 grows to the right, z2 upwards.

    Args:
        decode: latents (M, 2), float32 on the CPU, to images (M, H, W) or (M, C, H, W) with C = 1 or 3, in
            [0, 1], where M = size * size; for example `lambda z: vae.decode(z).mean`. Called once, without
            gradients.
        size: images along each side.
        ax: where to draw.

    Raises:
        ValueError: `decode` returns something else.

    Example:
        >>> from matplotlib.figure import Figure
        >>> decode = lambda z: torch.sigmoid(z[:, 0])[:, None, None].expand(-1, 8, 8)
        >>> ax = manifold(decode, size=5, ax=Figure().subplots())
        >>> ax.images[0].get_array().shape
        (40, 40)
    """
    if size < 1:
        raise ValueError(f"Expected at least one image along each side, got size={size}.")
    share = torch.linspace(0.5 / size, 1.0 - 0.5 / size, size, dtype=torch.float64)
    quantiles = torch.special.ndtri(share).float()
    # Pictures are filled row by row from the top, and z2 is greatest there.
    z2, z1 = torch.meshgrid(quantiles.flip(0), quantiles, indexing="ij")
    with torch.no_grad():
        tiles = _images(decode(torch.stack([z1.flatten(), z2.flatten()], dim=1)))
    if len(tiles) != size * size:
        raise ValueError(f"Expected {size * size} images from decode, one per latent, got {len(tiles)}.")
    ax = _show_tiles(tiles, size, 0, ax)
    height, width = tiles.shape[1:3]
    shown = np.unique(np.linspace(0, size - 1, min(size, 5)).round().astype(int))
    names = [f"{quantiles[i]:.1f}".replace("-", "−").replace("−0.0", "0.0") for i in shown]
    ax.set_xticks((shown + 0.5) * width - 0.5, names)
    ax.set_yticks((size - shown - 0.5) * height - 0.5, names)
    ax.tick_params(length=3)
    ax.set_xlabel("$z_1$")
    ax.set_ylabel("$z_2$")
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
    samples, values = _array(num_samples), _array(log_px)
    errors = None if standard_error is None else _array(standard_error)
    shapes = {array.shape for array in (samples, values, errors) if array is not None}
    if len(shapes) != 1 or samples.ndim != 1 or samples.size == 0 or samples.min() < 1:
        raise ValueError(
            "Expected one number of samples (at least 1), one log p(x) and one standard error per estimate, "
            f"got shapes {sorted(shapes)} and numbers of samples {samples.tolist()}."
        )
    order = np.argsort(samples)
    samples, values = samples[order], values[order]
    ax = _axes(ax, (6.0, 3.8))
    if errors is not None:
        label = f"{label} ± 2 standard errors"
    (line,) = ax.plot(samples, values, marker="o", markersize=4, label=label)
    if errors is not None:
        band = 2.0 * errors[order]
        ax.fill_between(samples, values - band, values + band, color=line.get_color(), alpha=0.2, linewidth=0)
    if exact is not None:
        ax.axhline(exact, color="black", linestyle="--", linewidth=1.2, label="exact")
    ax.set_xscale("log")
    _label(ax, "samples per datum", "log p(x) (nats per datum)")
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
    values = _array(k)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"Expected one Pareto k per datum, of shape (N,), got shape {values.shape}.")
    ax = _axes(ax, (6.0, 3.8))
    rank = np.empty(len(values), dtype=int)
    rank[np.argsort(values)] = np.arange(1, len(values) + 1)
    good, fair = values <= 0.5, (values > 0.5) & (values <= 0.7)
    for chosen, meaning, colour, marker in (
        (good, "k ≤ 0.5, reliable", _COLOURS[0], "o"),
        (fair, "0.5 < k ≤ 0.7, of use", _COLOURS[1], "s"),
        (~(good | fair), "k > 0.7, not to be trusted", _COLOURS[2], "^"),
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
    _label(ax, "datum, in order of k", "Pareto k")
    # Below the ticks and the label of the axis, whose height is in letters and not in parts of the picture.
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), borderaxespad=3.5, frameon=False)
    return ax


def _axes(ax: Axes | None, figsize: tuple[float, float]) -> Axes:
    if ax is not None:
        return ax
    from matplotlib import pyplot  # here, because it would slow the start of every program

    return pyplot.subplots(figsize=figsize, layout="constrained")[1]


def _label(ax: Axes, x_label: str, y_label: str) -> None:
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="0.9", linewidth=0.8)
    ax.set_axisbelow(True)


def _array(values: Tensor | np.ndarray | Sequence[float]) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        # NumPy has no bfloat16.
        return values.float().numpy() if values.dtype == torch.bfloat16 else values.numpy()
    return np.asarray(values)


def _images(images: Tensor | np.ndarray) -> np.ndarray:
    """Images as (N, H, W, 3) or (N, H, W), in [0, 1]."""
    array = _array(images)
    if array.ndim == 4 and array.shape[1] == 3:
        array = array.transpose(0, 2, 3, 1)
    elif array.ndim == 4 and array.shape[1] == 1:
        array = array[:, 0]
    elif array.ndim != 3:
        raise ValueError(f"Expected images of shape (N, H, W) or (N, C, H, W) with C = 1 or 3, got {array.shape}.")
    if array.size == 0:
        raise ValueError(f"Expected at least one image, got shape {array.shape}.")
    array = array.astype(np.float64)
    if array.max() > 1.0 and np.array_equal(array, array.round()):
        raise ValueError(
            f"Expected images in [0, 1], got whole numbers up to {array.max():.0f}, which look like levels. "
            "Divide them by the highest level."
        )
    return array.clip(0.0, 1.0)


def _show_tiles(tiles: np.ndarray, columns: int, gap: int, ax: Axes | None) -> Axes:
    """Draws tiles (N, H, W, ...) row by row, with white between them and in the places that stay empty."""
    rows = math.ceil(len(tiles) / columns)
    height, width = tiles.shape[1:3]
    shape = (rows * (height + gap) - gap, columns * (width + gap) - gap)
    picture = np.ones(shape + tiles.shape[3:])
    for i, tile in enumerate(tiles):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        picture[top : top + height, left : left + width] = tile
    scale = 6.0 / max(shape)
    ax = _axes(ax, (max(shape[1] * scale, 1.5) + 0.4, max(shape[0] * scale, 1.0) + 0.4))
    ax.imshow(picture, cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
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
