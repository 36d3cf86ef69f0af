"""Pictures of images: grids, reconstructions, the manifold of a latent plane."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ppl_vae.plots.axes import as_array, axes_or_new

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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


def manifold(
    decode: Callable[[Tensor], Tensor | np.ndarray], *, size: int = 15, gap: int = 0, ax: Axes | None = None
) -> Axes:
    """Draws the manifold of a two-dimensional latent space: a grid, decoded (Kingma & Welling, 2014).

    The latents stand at equally spaced quantiles of the standard normal prior, so that each tile has the same
    share of the prior's probability. z1 grows to the right, z2 upwards.

    Args:
        decode: latents (M, 2), float32 on the CPU, to images (M, H, W) or (M, C, H, W) with C = 1 or 3, in
            [0, 1], where M = size * size; for example `lambda z: vae.decode(z).mean`. Called once, without
            gradients.
        size: images along each side.
        gap: pixels between the images, which small images that touch their border need.
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
    ax = _show_tiles(tiles, size, gap, ax)
    height, width = (side + gap for side in tiles.shape[1:3])
    shown = np.unique(np.linspace(0, size - 1, min(size, 5)).round().astype(int))
    names = [f"{quantiles[i]:.1f}".replace("-", "−").replace("−0.0", "0.0") for i in shown]
    ax.set_xticks((shown + 0.5) * width - 0.5 - gap / 2, names)
    ax.set_yticks((size - shown - 0.5) * height - 0.5 - gap / 2, names)
    ax.tick_params(length=3)
    ax.set_xlabel("$z_1$")
    ax.set_ylabel("$z_2$")
    return ax


def _images(images: Tensor | np.ndarray) -> np.ndarray:
    """Images as (N, H, W, 3) or (N, H, W), in [0, 1]."""
    array = as_array(images)
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
    ax = axes_or_new(ax, (max(shape[1] * scale, 1.5) + 0.4, max(shape[0] * scale, 1.0) + 0.4))
    ax.imshow(picture, cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return ax
