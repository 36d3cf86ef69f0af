"""Integrals over one or two real dimensions: regular lattices, refined again and again where the mass is.

What is integrated is asked for, not called: a routine yields points `(n, dim)` and is sent log densities there, so that
the routines of many data, each with points of its own, can be answered by one run of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from itertools import product
from math import inf, log
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
# Yields points (n, dim), is sent (densities, n), returns a result.
Routine = Generator[Tensor, Tensor, Result]

# What lies as many nats below the largest density is left out: e^−25 of the mass of a normal in two dimensions.
NATS = 25.0
# A box is wide enough when no side of it holds more of the mass.
EDGE_MASS = 1e-8
MOST_WIDENINGS = 30
MOST_POINTS = 2**19
# No density is as much above the interpolation between points that resolve it: a normal's is by 1.14 at the spacing
# of 0.7 standard deviations, 1.3 at 1.
REJECTION_RATIO = 1.5
MOST_ROUNDS = 32


class Lattice:
    """Points of a regular grid over a box, those that may hold mass, with log densities.

    Args:
        low: the box's lower corner, `(dim,)`.
        spacing: of the grid along each axis, `(dim,)`.
        size: how many steps the box is long along each axis.
        index: which points, `(n, dim)` integers from 0 to `size`.
        values: log of the density that is integrated, and of any others wanted at the same points, `(densities, n)`.
    """

    def __init__(self, low: Tensor, spacing: Tensor, size: int, index: Tensor, values: Tensor) -> None:
        self.low, self.spacing, self.size = low, spacing, size
        self.keys, order = self._key(index).sort()
        self.index, self.values = index[order], values[:, order]
        self.log_density = self.values[0]

    def _key(self, index: Tensor) -> Tensor:
        """One integer for each point, also for those one step outside the box."""
        base = self.size + 3
        return ((index + 1) * torch.tensor([base**axis for axis in range(index.shape[-1])])).sum(-1)

    def find(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The place of each grid point `(*, dim)` in this lattice, and whether it is there."""
        keys = self._key(index)
        place = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        return place, self.keys[place] == keys

    def at(self, index: Tensor) -> Tensor:
        """log density at any grid points, −∞ where this lattice has none."""
        place, there = self.find(index)
        return torch.where(there, self.log_density[place], -inf)

    def log_integral(self) -> float:
        """log of the density's integral: the sum over all points times a cell's volume."""
        return float(self.log_density.logsumexp(0) + self.spacing.log().sum())

    def in_shifts(self, weights: Tensor, stride: int) -> Tensor:
        """Sums of `weights` `(n,)` over each of the lattices `stride` times as wide that make up this one."""
        dim = len(self.low)
        which = (self.index % stride * torch.tensor([stride**axis for axis in range(dim)])).sum(-1)
        return torch.bincount(which, weights, minlength=stride**dim)

    def error(self, stride: int = 2) -> float:
        """How far, in log, the integral on lattices `stride` times as wide is from that on this one, at most.

        All shifts of the wide lattice are compared, for a single one may agree by accident.
        """
        shares = self.in_shifts(self.log_density.softmax(0), stride)
        return float((shares * len(shares)).log().abs().max())

    def is_resolved(self, tolerance: float) -> bool:
        """Whether the integral is that of all finer lattices too.

        Halving the spacing of a smooth density raises the relative error to the fourth power, as it is exp(−2π²s²/h²):
        where one halving brought it below the tolerance, the one before brought it below the fourth root of it.
        """
        return self.error() < tolerance and self.error(4) < tolerance**0.25 and not self.heavy_edges().any()

    def heavy_edges(self) -> Tensor:
        """Whether the lower and the upper side of each axis hold mass, `(2, dim)`."""
        weights = self.log_density.softmax(0)
        sides = torch.stack([self.index == 0, self.index == self.size])
        return (sides * weights[:, None]).sum(1) > EDGE_MASS

    def children(self, pins: Tensor) -> Tensor:
        """The points of the grid of half the spacing that may hold mass, or are next to `pins` (some points).

        A density may rise between two points by as much as it changes from one to the next, so that a mode too narrow
        for this lattice is followed down wherever it leaves a slope.
        """
        here = self.log_density
        highest = here
        for axis, step in product(range(len(self.low)), (-1, 1)):
            move = torch.zeros_like(self.low, dtype=torch.long)
            move[axis] = step
            beside = self.at(self.index + move)
            beyond = torch.where(beside.isneginf(), -inf, 2 * here - beside)
            highest = torch.maximum(highest, torch.maximum(beside, beyond))
        keep = highest >= here.max() - NATS
        place, there = self.find(((pins - self.low) / self.spacing).round().long().clamp(0, self.size))
        keep[place[there]] = True
        around = torch.tensor(list(product((-1, 0, 1), repeat=len(self.low))))
        children = (2 * self.index[keep][:, None] + around).flatten(0, 1).clamp(0, 2 * self.size)
        # Uniqueness of numbers is found ten times faster than that of rows.
        weights = torch.tensor([(2 * self.size + 1) ** axis for axis in range(len(self.low))])
        return (children * weights).sum(-1).unique()[:, None] // weights % (2 * self.size + 1)

    def refined(self, children: Tensor) -> Routine[Lattice]:
        """The lattice of half the spacing; what is known of its points is not asked again."""
        place, there = self.find(children // 2)
        old = there & (children % 2 == 0).all(-1)
        spacing = self.spacing / 2
        values = self.values.new_empty(len(self.values), len(children))
        values[:, old] = self.values[:, place[old]]
        if not old.all():
            values[:, ~old] = yield self.low + spacing * children[~old]
        return Lattice(self.low, spacing, 2 * self.size, children, values)

    def draw(self, num: int) -> tuple[Tensor, Tensor]:
        """Draws from the density that is linear between the points along each axis, `(num, dim)`, and its log there.

        The logarithm is in the units of `log_density`.
        """
        nodes = self.index[torch.multinomial(self.log_density.softmax(0), num, replacement=True)]
        # The sum of two uniforms is a tent over the point, and tents over all points add up to the interpolation.
        position = nodes + torch.rand(2, num, len(self.low), dtype=torch.float64).sum(0) - 1
        corner = position.floor()
        terms = []
        for offset in product((0, 1), repeat=len(self.low)):
            vertex = corner + torch.tensor(offset)
            terms.append(self.at(vertex.long()) + (1 - (position - vertex).abs()).log().sum(-1))
        return self.low + self.spacing * position, torch.stack(terms).logsumexp(0)


def adapted(
    low: Tensor,
    high: Tensor,
    pins: Tensor,
    *,
    num_points: int,
    max_levels: int,
    done: Callable[[Lattice], bool],
) -> Routine[Lattice]:
    """A lattice that is `done`, or the last that was tried.

    Args:
        low: lower corner of a box, widened where mass lies at its edge, `(dim,)`.
        high: upper corner.
        pins: points near which all grids are complete, `(m, dim)`.
        num_points: steps along each axis of the first grid.
        max_levels: how often the spacing is halved at most; once it is in any case, to see what the first grid may not.
        done: whether a lattice is good enough.
    """
    lattice = yield from _covering(low, high, num_points)
    for level in range(max_levels):
        if lattice.log_density.max() == -inf or (level > 0 and done(lattice)):
            break
        children = lattice.children(pins)
        if len(children) > MOST_POINTS:
            break
        lattice = yield from lattice.refined(children)
    return lattice


def _covering(low: Tensor, high: Tensor, num_points: int) -> Routine[Lattice]:
    """The first lattice, over a box with no mass at its sides."""
    index = torch.cartesian_prod(*[torch.arange(num_points + 1)] * len(low)).reshape(-1, len(low))
    for _ in range(MOST_WIDENINGS):
        width = high - low
        spacing = width / num_points
        lattice = Lattice(low, spacing, num_points, index, (yield low + spacing * index))
        heavy = lattice.heavy_edges()
        if not heavy.any():
            break
        low, high = low - width * heavy[0], high + width * heavy[1]
    return lattice


def exact_draws(lattice: Lattice, num_draws: int) -> Routine[Tensor]:
    """Independent draws from the lattice's density, `(num_draws, dim)`: of its interpolation, accepted or rejected.

    About two in three are accepted where the lattice is resolved; where it is not, some may be of the interpolation.
    """
    accepted = torch.empty(0, len(lattice.low), dtype=torch.float64)
    for _ in range(MOST_ROUNDS):
        u, log_linear = lattice.draw(2 * (num_draws - len(accepted)) + 8)
        log_ratio = (yield u)[0] - log_linear - log(REJECTION_RATIO)
        accepted = torch.cat([accepted, u[torch.rand(len(u), dtype=torch.float64).log() < log_ratio]])
        if len(accepted) >= num_draws:
            break
    return torch.cat([accepted, u])[:num_draws]
