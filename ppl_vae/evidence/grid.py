"""log p(x) of pairs with one or two continuous latent dimensions per datum, by adaptive quadrature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf, nan
from typing import Any, TypeVar

import pyro
import torch
from torch import Tensor
from torch.distributions import Categorical

from ppl_vae import scoring
from ppl_vae.evidence.blocks import Block, at_least_one, blocks, looked_at, root_seed, start_from
from ppl_vae.evidence.exact import Exact, as_draws, check_num_draws, joined, picked
from ppl_vae.evidence.lattice import NATS, Lattice, Routine, adapted, exact_draws
from ppl_vae.scoring import Pair, Program, Target, Values
from ppl_vae.scoring.configurations import configurations, discrete_sites

Result = TypeVar("Result")

# From which means and standard deviations are taken, and how many of these the first boxes reach.
MOMENT_SAMPLES, REACH = 128, 6.0
# Steps along each axis of the first grid, by dimension: for p, whose modes may be anywhere in the box, and for q,
# whose box is as wide as it is.
POINTS = {1: 512, 2: 64}
GUIDE_POINTS = {1: 32, 2: 16}
# q integrates to 1 within so much, or it was not resolved.
SUM_TOLERANCE = 1e-4
# How much of the mass may lie where numbers end, as where a probability is rounded to 1.
UNFAITHFUL_MASS = 1e-5
# A normal falls by so many nats at most from its peak to the nearest point of a grid that resolves it.
PEAK = 1.0
RUN_ROWS = 2**10


def grid_integration(
    model: Program,
    guide: Program,
    *args: Any,
    tolerance: float = 1e-3,
    num_points: int | None = None,
    max_levels: int = 14,
    num_draws: int = 0,
    seed: int | None = 0,
) -> Exact:
    """log p(x) of each datum by quadrature, for a pair whose continuous latents have one or two dimensions per datum.

    p(x) = ∫ p(x, u) du ≈ h^dim Σ_i p(x, u_i) on a regular grid of spacing h in unconstrained coordinates u, discrete
    latents summed out. For smooth densities the error falls like exp(−2π²s²/h²), s being the smallest standard
    deviation of a mode. Each datum has a grid of its own: over a box that holds the prior's and the guide's mass, wider
    when mass lies at its edge, and then with half the spacing again and again wherever the density is, or may rise to,
    e^−25 of its largest value, until log p(x) stays the same. The guide's density has a second grid, for its exact
    ELBO. Nothing of the pair is changed, and a datum's numbers depend on no other datum.

    Densities that jump, as with a uniform likelihood, are summed with an error that `error` understates. What it
    cannot see: a mode far from all draws of the guide and so narrow that no point of the first grid lies on
    its slope. Where that may be, compare with a larger `num_points`.

    Args:
        model: p(x, z), a Pyro program whose sites all lie in one plate over the data.
        guide: q(z given x), with the same arguments; any that has a density serves log p(x).
        *args: the data, `(N, ...)`, and what else both programs take.
        tolerance: in nats: log_px is accepted when halving the spacing changed it by less.
        num_points: steps of the first grid along each axis; None takes 512 for one dimension, 64 for two. For a
            prior N(0, I) the latter is a spacing of about 0.2, and it is halved at least once.
        max_levels: how often the spacing is halved at most.
        num_draws: from the posterior of each datum, independent and exact up to rounding where log_px is accepted.
        seed: of these draws; None takes them from the global random state.

    Returns:
        An `Exact`: per datum log_px, error, elbo, kl, accepted, and draws.

    Raises:
        TypeError: when the data are not a tensor.
        ValueError: for more than two continuous dimensions, none, or discrete latents that cannot be summed out; for
            a density that is NaN or +∞; for a pair with no log weight per datum, as in `importance_sampling`; with
            the site's name.

    Reference:
        Trefethen & Weideman, The Exponentially Convergent Trapezoidal Rule, 2014. https://doi.org/10.1137/130932132

    Example:
        >>> from ppl_vae.linear_gaussian import LinearGaussian
        >>> lg = LinearGaussian(torch.tensor([[1.0, 0.0], [2.0, 1.0]]).double(), mean=0.0, noise=0.1)
        >>> x, guide = lg.model(num_data=3), lg.perturbed_guide(shift=1.0)
        >>> exact = grid_integration(lg.model, guide, x)
        >>> torch.allclose(exact.log_px, lg.log_px(x)), torch.allclose(exact.elbo, guide.elbo(x))
        (True, True)
    """
    if not tolerance > 0:
        raise ValueError(f"tolerance is a difference in nats and must be above 0; got {tolerance!r}.")
    if num_points is not None:
        num_points = at_least_one("num_points", num_points)
    max_levels, num_draws = at_least_one("max_levels", max_levels), check_num_draws(num_draws)
    scoring.check_data(*args)
    root = root_seed(seed)
    with looked_at(model, guide, *args) as pair:
        parts, draws = [], []
        for block in blocks(pair, args, 1):
            target = _low_dimensional(pair, block)
            p, q, seen = _lattices(target, tolerance, num_points, max_levels)
            parts.append(_columns(target, p, q, seen, tolerance))
            if num_draws:
                start_from(root, block.start)
                draws.append(_draws(target, p, block.start, num_draws))
    log_px, error, elbo, accepted = (torch.cat(column).to(args[0].device) for column in zip(*parts, strict=True))
    return Exact(
        log_px=log_px,
        error=error,
        elbo=elbo,
        accepted=accepted,
        method=f"grid integration in {target.dim} dimension{'s' * (target.dim > 1)}",
        draws=joined(draws) if draws else {},
        rounded_to=pair.rounded_to,
    )


def _low_dimensional(pair: Pair, block: Block) -> Target:
    target = Target(pair, *block.args)
    if target.dim > 2:
        sites = {site.name: site.part.stop - site.part.start for site in target.coordinates.sites}
        raise ValueError(
            f"The continuous latents of a datum have {target.dim} dimensions ({sites}); a grid goes up to 2. Use "
            "annealed_importance_sampling, which has no such limit, or importance_sampling."
        )
    return target


def _lattices(
    target: Target, tolerance: float, num_points: int | None, max_levels: int
) -> tuple[list[Lattice], list[Lattice], list[float]]:
    """For each datum a lattice for p(x, u), one for q(u given x) with log p(x, u) beside it, and p at draws."""
    start_from(0)  # The same for every datum, whose numbers then do not depend on its place.
    with pyro.validation_enabled(True):
        prior, guide = target.draw_prior(MOMENT_SAMPLES), target.draw_guide(MOMENT_SAMPLES)
        log_p = target.log_joint(guide).cpu()
    prior, guide = prior.double().cpu(), guide.double().cpu()
    seen = log_p.max(0).values.tolist()

    def of_p(datum: int) -> Routine[Lattice]:
        low, high = (torch.stack(ends) for ends in zip(_box(prior[:, datum]), _box(guide[:, datum]), strict=True))
        # What the guide knows of the posterior is looked at closely, also where the first grid shows nothing.
        pins = guide[log_p[:, datum] >= log_p[:, datum].max() - NATS, datum]
        return adapted(
            low.min(0).values,
            high.max(0).values,
            pins,
            num_points=num_points or POINTS[target.dim],
            max_levels=max_levels,
            done=lambda lattice: _resolves_all(lattice, seen[datum], tolerance),
        )

    def of_q(datum: int) -> Routine[Lattice]:
        return adapted(
            *_box(guide[:, datum]),
            guide[:, datum],
            num_points=GUIDE_POINTS[target.dim],
            max_levels=max_levels,
            done=lambda lattice: _resolves_guide(lattice, tolerance),
        )

    data = range(target.batch)
    p = _answered([of_p(datum) for datum in data], target, lambda u: target.log_joint(u).unsqueeze(0))
    q = _answered(
        [of_q(datum) for datum in data], target, lambda u: torch.stack([target.log_guide(u), target.log_joint(u)])
    )
    return p, q, seen


def _resolves_all(p: Lattice, seen: float, tolerance: float) -> bool:
    """Whether the integral has settled, and no draw of the guide lies much higher than all points of the lattice."""
    return p.is_resolved(tolerance) and float(p.log_density.max()) > seen - PEAK


def _box(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Lower and upper corner, `(dim,)`, of where the density lies that `(num_samples, dim)` draws come from."""
    mean, sd = draws.mean(0), draws.std(0).clamp(min=1e-6)
    return mean - REACH * sd, mean + REACH * sd


def _answered(
    routines: Sequence[Routine[Result]], target: Target, log_densities: Callable[[Tensor], Tensor]
) -> list[Result]:
    """Runs a routine for each datum, all in step: what they ask for is answered by the same runs of the pair.

    Args:
        routines: one for each datum.
        target: for the data.
        log_densities: of u `(num_samples, batch, dim)`, `(densities, num_samples, batch)`.
    """
    results: dict[int, Result] = {}
    asked = {datum: next(routine) for datum, routine in enumerate(routines)}
    while asked:
        longest = max(map(len, asked.values()))
        u = torch.zeros(longest, target.batch, target.dim, dtype=torch.float64)
        for datum, points in asked.items():
            u[: len(points), datum] = points
        answers = _scored(u, target, log_densities)
        for datum, points in list(asked.items()):
            try:
                asked[datum] = routines[datum].send(answers[:, : len(points), datum])
            except StopIteration as stop:
                results[datum] = stop.value
                del asked[datum]
    return [results[datum] for datum in range(target.batch)]


def _scored(u: Tensor, target: Target, log_densities: Callable[[Tensor], Tensor]) -> Tensor:
    """In runs of bounded length, `(densities, num_samples, batch)`."""
    at_once = max(1, RUN_ROWS // (target.batch * target.num_configurations))
    found = []
    for part in u.to(target.device, target.dtype).split(at_once):
        # The draws of the prior and the guide were checked; grids reach further, where a scale may underflow.
        with pyro.validation_enabled(False):
            found.append(values := log_densities(part))
        if not (values < inf).all():
            _, sample, datum = (~(values < inf)).nonzero()[0].tolist()
            site = target.pair.blame(target.latents(part[sample : sample + 1]), *target.args)
            raise ValueError(
                f"A density is NaN or +∞ at the unconstrained latents {part[sample, datum].tolist()}: {site} has none "
                "there. Its parameters have overflowed, or the density has a pole, which no grid resolves."
            )
    return torch.cat(found, 1).cpu()


def _columns(
    target: Target, p: list[Lattice], q: list[Lattice], seen: list[float], tolerance: float
) -> tuple[Tensor, ...]:
    """log_px, error, elbo and accepted of each datum, `(batch,)`."""
    log_px = torch.tensor([lattice.log_integral() for lattice in p], dtype=torch.float64)
    # An integral of 0 has no relative error.
    error = torch.tensor([lattice.error() for lattice in p], dtype=torch.float64).nan_to_num(nan=inf, posinf=inf)
    elbo = [_elbo(lattice).item() if _resolves_guide(lattice, tolerance) else nan for lattice in q]
    accepted = torch.tensor(
        [
            _resolves_all(lattice, seen[datum], tolerance) and _is_faithful(target, lattice, datum)
            for datum, lattice in enumerate(p)
        ]
    )
    return log_px, error, torch.tensor(elbo, dtype=torch.float64), accepted


def _is_faithful(target: Target, lattice: Lattice, datum: int) -> bool:
    """Whether almost all mass lies where latents can be told from each other: not, say, rounded to 1."""
    u = torch.zeros(len(lattice.index), target.batch, target.dim, dtype=torch.float64)
    u[:, datum] = lattice.low + lattice.spacing * lattice.index
    faithful = target.coordinates.is_faithful(u.to(target.device, target.dtype))[:, datum].cpu()
    return float(lattice.log_density.softmax(0)[~faithful].sum()) < UNFAITHFUL_MASS


def _elbo(q: Lattice, stride: int = 1) -> Tensor:
    """E_q[log p − log q], on each of the lattices `stride` times as wide."""
    log_q, log_p = q.values
    weights = log_q.softmax(0)
    terms = torch.where(weights > 0, weights * (log_p - log_q), 0.0)
    return q.in_shifts(terms, stride) / q.in_shifts(weights, stride)


def _resolves_guide(q: Lattice, tolerance: float) -> bool:
    """Whether q integrates to 1, and the ELBO is the same on wider lattices."""
    elbo = _elbo(q)
    steady = elbo == -inf or (_elbo(q, stride=2) - elbo).abs().max() < tolerance
    return bool(abs(q.log_integral()) < SUM_TOLERANCE and q.is_resolved(tolerance) and steady)


def _draws(target: Target, p: list[Lattice], start: int, num_draws: int) -> Values:
    """Of each datum's posterior, in the latents' own space."""
    for datum, lattice in enumerate(p):
        if lattice.log_density.max() == -inf:
            raise ValueError(f"Datum {start + datum} has probability 0, so that it has no posterior to draw from.")
    routines = [exact_draws(lattice, num_draws) for lattice in p]
    u = torch.stack(_answered(routines, target, lambda u: target.log_joint(u).unsqueeze(0)), 1)
    at_once = max(1, RUN_ROWS // (target.batch * target.num_configurations))
    parts = [_latents(target, part) for part in u.to(target.device, target.dtype).split(at_once)]
    return as_draws(target.pair, {name: torch.cat([part[name] for part in parts]) for name in target.pair.latents})


def _latents(target: Target, u: Tensor) -> Values:
    """All latents in canonical form at u, the discrete ones drawn given u and x."""
    pair, count = target.pair, target.num_configurations
    z, _ = target.coordinates.restore(u)
    if count == 1:
        return z
    sites = {name: site for name, site in pair.sites(target.args)[0].items() if name in pair.latents}
    discrete = {name: sites[name] for name in discrete_sites(sites)}
    _, tables = configurations(pair.layout, discrete, target.batch, most=count)
    every = {name: torch.cat([value] * count) for name, value in z.items()}
    every |= {name: table.repeat_interleave(len(u), 0) for name, table in tables.items()}
    log_joint = pair.log_joint(every, *target.args, num_samples=count * len(u))
    index = Categorical(logits=log_joint.unflatten(0, (count, -1)).movedim(0, -1)).sample()
    return z | picked(pair, tables, index)
