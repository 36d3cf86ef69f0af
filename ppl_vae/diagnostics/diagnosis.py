"""Running a pair draw by draw, to see what its latents are used for."""

from __future__ import annotations

from contextlib import suppress
from math import log, nan, sqrt
from typing import Any, NamedTuple

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor

from ppl_vae import scoring
from ppl_vae.diagnostics.record import Diagnostics
from ppl_vae.evidence.blocks import Block, at_least_one, blocks, looked_at, root_seed, start_from
from ppl_vae.objectives.divergences import closed_form, masked
from ppl_vae.scoring import Pair, Program, Values
from ppl_vae.scoring.inspection import is_delta
from ppl_vae.scoring.running import Sites, per_datum, run, scored_sites
from ppl_vae.scoring.supports import log_prob_anywhere

BLOCK_DATA = 256
# Every draw is scored under q(z given x) of every datum: of how many data, how many such scores in all, and at once.
MOST_DATA, MOST_SCORES, SCORES_AT_ONCE = 2000, 2**22, 2**16


def diagnose(model: Program, guide: Program, *args: Any, num_samples: int = 100, seed: int | None = 0) -> Diagnostics:
    """Splits the ELBO of each datum into reconstruction and KL, and finds which latents say something of x.

    ELBO = E log p(x given z) − KL(q(z given x), p(z)), and over the data E KL(q(z given x), p(z)) =
    I(x; z) + KL(q(z), p(z)). The KL, its parts and the posterior means are in closed form where the densities have one
    (and the guide draws no latent given another), from the draws elsewhere. A posterior collapse shows as units with
    KL 0 and a posterior mean that is the same for all data.

    Nothing of the pair is changed. Reconstruction and KL of a datum depend on the seed and on its place among the data,
    not on the others; the mutual information is about all of them, or about 2,000 chosen by the seed.

    Args:
        model: p(x, z), a Pyro program whose sites all lie in one plate over the data.
        guide: q(z given x), with the same arguments.
        *args: the data, `(N, ...)`, and what else both programs take.
        num_samples: draws of z for each datum, 2 or more.
        seed: of the draws; None takes it from the global random state.

    Returns:
        `Diagnostics`: per datum and as means with their errors.

    Raises:
        TypeError: when the data are not a tensor.
        ValueError: as `importance_sampling`; for a num_samples below 2.

    Example:
        >>> from ppl_vae.linear_gaussian import LinearGaussian
        >>> lg = LinearGaussian(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.5, 0.0]]), mean=0.0, noise=0.7)
        >>> found = diagnose(lg.model, lg.perturbed_guide(shift=0.0, spread=1.0), lg.model(num_data=50))
        >>> found.active                       # the second latent is connected to nothing
        tensor([ True, False])
        >>> bool(found.kl_per_dimension[:, 1].abs().max() < 1e-6)
        True
    """
    if at_least_one("num_samples", num_samples) < 2:
        raise ValueError("num_samples must be at least 2, for a standard error to exist; got 1.")
    scoring.check_data(*args)
    root = root_seed(seed)
    with looked_at(model, guide, *args) as pair:
        found = [_block(pair, block, num_samples, root) for block in blocks(pair, args, BLOCK_DATA)]
        index, information, information_error = _mutual_information(pair, args, num_samples, root)
    parts = {name: torch.cat([block.parts[name].mean for block in found]) for name in found[0].parts}
    errors = {name: torch.cat([block.parts[name].standard_error for block in found]) for name in found[0].parts}
    kl, kl_error = parts["kl"], errors["kl"]
    # Var over x of E[z | x]; what the draws add to the variance of their means is taken off.
    unit_variance = parts["z"].var(0) - errors["z"].square().mean(0) if len(kl) > 1 else parts["z"][0] * nan
    return Diagnostics(
        reconstruction=parts["reconstruction"],
        kl=kl,
        elbo=parts["elbo"],
        kl_per_dimension=parts.get("kl_per_dimension"),
        unit_variance=unit_variance,
        mutual_information=information,
        marginal_kl=kl[index] - information,
        standard_error={name: errors[name] for name in ("elbo", "reconstruction", "kl")}
        | {"mutual_information": information_error, "marginal_kl": kl_error[index].hypot(information_error)},
        dimensions=found[0].dimensions,
        is_closed=all(block.is_closed for block in found),
        num_samples=num_samples,
        rounded_to=pair.rounded_to,
    )


class _Moments:
    """Mean and standard error of draws that are added one by one (Welford's sums)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, value: Tensor) -> None:
        self.count += 1
        before = value.double() - self.mean
        self.mean = self.mean + before / self.count
        self.squares = self.squares + before * (value.double() - self.mean)

    @property
    def standard_error(self) -> Tensor:
        return (self.squares / (self.count - 1) / self.count).sqrt()


class _Found(NamedTuple):
    """Of one block of data."""

    parts: dict[str, _Moments]
    dimensions: list[str]
    is_closed: bool


class _Divergence(NamedTuple):
    """Of one latent's q from its p: one number for each of its dimensions `(batch, D)`, or all in one `(batch, 1)`."""

    terms: Tensor
    is_split: bool
    is_closed: bool


def _block(pair: Pair, block: Block, num_samples: int, root: int) -> _Found:
    axis, batch = 1 + pair.layout.nesting + pair.layout.dim, len(block.args[0])
    with pyro.validation_enabled(True):
        start_from(root, block.start, 0)
        wide = block.wide()
        z, log_q = pair.draw(pair.encode(*wide), *wide, num_samples=num_samples)
        encoded = pair.encode(*block.args)
    parts: dict[str, _Moments] = {}
    for k in range(num_samples):
        one = {name: value[k : k + 1].narrow(axis, 0, batch) for name, value in z.items()}
        given = {name: pair.layout.natural(name, value)[0] for name, value in one.items()}
        # The first run lets every distribution check its parameters and its data.
        with pyro.validation_enabled(k == 0):
            trace = run(pair.model, block.args, {name: given[name] for name in pair.latents})
            log_prior, reconstruction = (part[0] for part in per_datum(pair.layout, trace, given, block.args))
        guide = encoded or scored_sites(run(pair.guide, block.args, {name: given[name] for name in pair.drawn}))
        model, values = scored_sites(trace), {name: given[name] for name in pair.latents}
        found = [_divergence(pair, guide, model[name], name, given) for name in values]
        kl = log_q[k, :batch] - log_prior
        if all(found):
            kl = torch.cat([one.terms for one in found if one], 1).sum(1)
        drawn = {"reconstruction": reconstruction, "kl": kl, "elbo": reconstruction - kl}
        drawn["z"] = torch.cat([_rows(pair, name, _mean(guide[name], values[name])) for name in values], 1)
        if all(one and one.is_split for one in found):
            drawn["kl_per_dimension"] = torch.cat([one.terms for one in found if one], 1)
        for name, value in drawn.items():
            parts.setdefault(name, _Moments()).add(value)
    sizes = {name: _rows(pair, name, value).shape[1] for name, value in values.items()}
    dimensions = [f"{name}[{d}]" if size > 1 else name for name, size in sizes.items() for d in range(size)]
    return _Found(parts, dimensions, all(one and one.is_closed for one in found))


def _divergence(pair: Pair, guide: Sites, p: Any, name: str, given: Values) -> _Divergence | None:
    """Of q(z given x) from p(z), for one latent at one draw; None where a transform's Jacobian is in the way."""
    q, value = guide[name], given[name]
    if is_delta(q):  # an autoguide's: the density is that of the unconstrained value, and of the map from it
        if q["fn"].log_prob(value).any():
            return None
        q = guide[f"{name}_unconstrained"]
    factors = _factors(q["fn"]), _factors(p["fn"])
    is_split = None not in factors
    fns = factors if is_split else (q["fn"], p["fn"])
    terms = closed_form(*fns) if pair.encodes_once else None
    is_closed = terms is not None
    if terms is None:
        terms = log_prob_anywhere(fns[0], value) - log_prob_anywhere(fns[1], value)
    shape = value.shape if is_split else value.shape[: pair.layout.ranks[name]]
    terms = terms.expand(torch.broadcast_shapes(terms.shape, shape)).reshape(shape)
    terms = masked(terms, p["mask"], rank=len(p["fn"].event_shape) if is_split else 0)
    return _Divergence(_rows(pair, name, terms), is_split, is_closed)


def _factors(fn: Any) -> Any:
    """The distributions of single numbers that a factorising one is made of, or None."""
    while fn.event_shape and isinstance(fn, (torch.distributions.Independent, dist.ExpandedDistribution)):
        fn = fn.base_dist
    return None if fn.event_shape else fn


def _mean(site: Any, value: Tensor) -> Tensor:
    """The mean of a latent where its distribution knows one that is a number, else the draw."""
    with suppress(NotImplementedError):
        mean = site["fn"].mean
        if mean.shape == value.shape and mean.isfinite().all():
            return mean
    return value


def _rows(pair: Pair, name: str, value: Tensor) -> Tensor:
    """Numbers of one latent, in the shape of its plates and perhaps its event, as a row for each datum."""
    rows = value.movedim(pair.layout.ranks[name] + pair.layout.dim, 0)
    return rows.reshape(len(rows), -1)


def _mutual_information(
    pair: Pair, args: tuple[Any, ...], num_samples: int, root: int
) -> tuple[Tensor, Tensor, Tensor]:
    """For some data (which?) the mean over draws of log q(z given x) / q(z), and its standard error, `(M,)` each."""
    num_data = len(args[0])
    start_from(root, num_data, 1)
    index = torch.arange(num_data) if num_data <= MOST_DATA or not pair.splits else torch.randperm(num_data)[:MOST_DATA]
    index = index.sort().values.to(args[0].device)
    some, count = scoring.rows(args, index), len(index)
    num_draws = min(num_samples, max(2, MOST_SCORES // count**2))
    encoded = pair.encode(*some)
    z, _ = pair.draw(encoded, *some, num_samples=num_draws)
    # Each draw for each datum becomes a draw for all data: draws (num_draws * M, 1) against data M.
    axis = 1 + pair.layout.nesting + pair.layout.dim
    flat = {name: value.movedim(axis, 1).flatten(0, 1).unsqueeze(axis) for name, value in z.items()}
    own = torch.arange(count, device=index.device).repeat(num_draws)
    ratios = []
    for rows in torch.arange(num_draws * count, device=index.device).split(max(1, SCORES_AT_ONCE // count)):
        everywhere = {
            name: value[rows].expand(*value[rows].shape[:axis], count, *value.shape[axis + 1 :])
            for name, value in flat.items()
        }
        log_q = pair.log_q(encoded, everywhere, *some, num_samples=len(rows))
        ratios.append(log_q.gather(1, own[rows, None]).squeeze(1) - log_q.logsumexp(1) + log(count))
    information = torch.cat(ratios).reshape(num_draws, count)
    return index, information.mean(0), information.std(0) / sqrt(num_draws)
