"""The ladder of estimates of log p(x), from the ELBO up to an upper bound."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ppl_vae.plots.axes import COLOURS, as_array, axes_or_new, label_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# What a rung of a ladder is: its colour, a marker that points to where the truth is, and its name.
_SIDES = {
    "": (COLOURS[0], "o", "estimate"),
    "lower": (COLOURS[0], ">", "lower bound"),
    "upper": (COLOURS[6], "<", "upper bound"),
    "exact": ("black", "D", "exact"),
}


def ladder(
    names: Sequence[str],
    values: Sequence[float] | Tensor | np.ndarray,
    standard_errors: Sequence[float] | Tensor | np.ndarray | None = None,
    *,
    sides: Sequence[str] | None = None,
    exact: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws estimates of log p(x) as rungs, each with its value beside it and its distance from the one before.

    A rung so far from the others that they could not be told apart is left off the scale, where an arrow points.

    Args:
        names: of the rungs from top to bottom, such as "ELBO", "IWAE 10", "annealed", "upper bound".
        values: (R,), nats per datum, means over the same data.
        standard_errors: (R,), nats per datum; a bar of two of them to both sides, none where NaN or infinite.
        sides: what each rung is: "lower" or "upper" for a bound, whose marker points to where the truth is, or "exact".
        exact: the true value in nats per datum where it is known, as a dashed line.
        ax: where to draw; numbers stand to its right.

    Raises:
        ValueError: the lengths differ, there is no rung, a value is not finite, or a side has another name.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> names, sides = ["ELBO", "IWAE 5000", "annealed", "upper bound"], ["lower", "lower", "lower", "upper"]
        >>> ax = ladder(names, [-95.1, -93.0, -92.2, -92.1], sides=sides, ax=ax)
        >>> [text.get_text() for text in ax.texts]
        ['−95.10', '−93.00', '+2.10', '−92.20', '+0.80', '−92.10', '+0.10']
    """
    x = as_array(values).astype(float)
    bars = np.full(x.shape, math.nan) if standard_errors is None else 2.0 * as_array(standard_errors).astype(float)
    bars[~np.isfinite(bars)] = math.nan
    kinds = np.array([""] * len(names) if sides is None else sides)
    _check_rungs(names, x, bars, kinds)
    ax = axes_or_new(ax, (7.0, 1.3 + 0.42 * len(x)))
    rows, (low, high) = np.arange(len(x)), _limits(x, bars, exact)
    ax.set_xlim(low, high)
    # The last digit is a small part of the scale, and differences are those of the numbers that are seen.
    digits = int(np.clip(math.ceil(-math.log10((high - low) / 25)), 2, 4))
    steps = np.diff(np.round(x, digits))
    for kind, (colour, marker, label) in _SIDES.items():
        if (chosen := kinds == kind).any():
            bar = bars[chosen] if np.isfinite(bars[chosen]).any() else None
            label += "" if bar is None else " ± 2 standard errors"
            ax.errorbar(
                x[chosen], rows[chosen], xerr=bar, fmt=marker, color=colour, markersize=7, capsize=3, label=label
            )
    if exact is not None:
        ax.axvline(exact, color="black", linestyle="--", linewidth=1.2, label=f"exact: {_signed(exact, digits)}")
    for row, value in enumerate(x):
        if not low < value < high:
            _point_outwards(ax, row, to_the_left=value <= low, colour=_SIDES[kinds[row]][0])
        _write_beside(ax, row, 58, _signed(value, digits))
        if row > 0:
            _write_beside(ax, row - 0.5, 102, _signed(steps[row - 1], digits, "+"), fontsize="small", color="0.35")
    ax.set_yticks(rows, names)
    ax.set_ylim(len(x) - 0.5, -0.5)
    ax.locator_params(axis="x", nbins=6)
    ax.ticklabel_format(axis="x", useOffset=False)
    label_axes(ax, "log p(x) (nats per datum)", "")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0), borderaxespad=3.5, frameon=False, ncols=3)
    return ax


def _check_rungs(names: Sequence[str], x: np.ndarray, bars: np.ndarray, kinds: np.ndarray) -> None:
    if len(names) == 0 or {x.shape, bars.shape, kinds.shape} != {(len(names),)}:
        raise ValueError(
            f"Expected a value, a standard error and a side for each rung, and at least one rung; got {len(names)} "
            f"names, values of shape {x.shape}, standard errors of shape {bars.shape} and {len(kinds)} sides."
        )
    if not np.isfinite(x).all():
        raise ValueError(f"Expected finite values of log p(x), got {x.tolist()}. Leave out rungs without a value.")
    if unknown := sorted(set(kinds) - set(_SIDES)):
        raise ValueError(f'Expected sides "lower", "upper" or "exact", got {", ".join(map(repr, map(str, unknown)))}.')


def _limits(x: np.ndarray, bars: np.ndarray, exact: float | None) -> tuple[float, float]:
    """The ends of an axis with room for all values that are comparable, and their bars."""
    shown = _comparable(x)
    reach = np.nan_to_num(bars[shown])
    ends = [*(x[shown] - reach), *(x[shown] + reach), *([] if exact is None else [exact])]
    margin = 0.06 * (max(ends) - min(ends)) or 1.0
    return min(ends) - margin, max(ends) + margin


def _comparable(x: np.ndarray) -> np.ndarray:
    """Which values fit on one scale: three at least, and none alone at more than four times the spread of the rest."""
    shown = np.ones(len(x), dtype=bool)
    while shown.sum() > 3:
        order = np.flatnonzero(shown)[np.argsort(x[shown])]
        gaps = np.diff(x[order])
        if gaps[0] > 4.0 * gaps[1:].sum():
            shown[order[0]] = False
        elif gaps[-1] > 4.0 * gaps[:-1].sum():
            shown[order[-1]] = False
        else:
            break
    return shown


def _signed(value: float, digits: int, sign: str = "") -> str:
    return f"{value:{sign}z.{digits}f}".replace("-", "−")


def _point_outwards(ax: Axes, row: int, *, to_the_left: bool, colour: str) -> None:
    edge, inwards, side = (0.0, 1, "left") if to_the_left else (1.0, -1, "right")
    ax.annotate(
        "off the scale",
        (edge, row),
        (inwards * 40, 0),
        xycoords=ax.get_yaxis_transform(),
        textcoords="offset points",
        horizontalalignment=side,
        verticalalignment="center",
        fontsize="small",
        color="0.35",
        arrowprops={"arrowstyle": "-|>", "color": colour},
    )


def _write_beside(ax: Axes, row: float, points: float, text: str, **style: Any) -> None:
    """A text that ends so many points to the right of the axes."""
    ax.annotate(
        text,
        (1.0, row),
        (points, 0),
        xycoords=ax.get_yaxis_transform(),
        textcoords="offset points",
        horizontalalignment="right",
        verticalalignment="center",
        annotation_clip=False,
        **style,
    )
