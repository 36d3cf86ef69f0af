"""Running one program of a pair for many samples: in a plate of particles, on tiled data, or in a loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppl_vae.scoring.data import is_per_datum
from ppl_vae.scoring.layout import Layout
from ppl_vae.scoring.supports import log_prob_anywhere

Program = Callable[..., Any]
Values = dict[str, Tensor]
Sites = dict[str, Any]


class Scores(NamedTuple):
    """What one program says of many samples: its values in canonical form, and log-probabilities per datum.

    The log-probabilities are float64 `(num_samples, batch)`: of the latent sites, and of all others.
    """

    values: Values
    latent: Tensor
    observed: Tensor

    @property
    def total(self) -> Tensor:
        return self.latent + self.observed


def particles(layout: Layout, program: Program, args: tuple[Any, ...], values: Values, num_samples: int) -> Scores:
    """One run in a plate of samples to the left of all others; for programs that take leading dimensions."""
    with pyro.plate("particles", num_samples, dim=-layout.nesting - 1):
        trace = run(program, args, values)
    latent, observed = per_datum(layout, trace, values, args)
    return Scores(values_of(trace), latent.expand(num_samples, -1), observed.expand(num_samples, -1))


def tiles(layout: Layout, program: Program, args: tuple[Any, ...], values: Values, num_samples: int) -> Scores:
    """One run on the data repeated for each sample; for programs whose plate is as long as the data."""

    def fold(name: str, value: Tensor) -> Tensor:
        axis = layout.ranks[name] + layout.dim
        return layout.natural(name, value).movedim(0, axis).flatten(axis, axis + 1)

    def unfold(name: str, value: Tensor) -> Tensor:
        axis = layout.ranks[name] + layout.dim
        return layout.canonical(name, value.unflatten(axis, (num_samples, -1)).movedim(axis, 0))

    at_once = max(1, int(min(num_samples, layout.most_rows // len(args[0]))))
    if at_once < num_samples:
        parts = range(0, num_samples, at_once)
        results = [
            tiles(
                layout, program, args, {n: v[k : k + at_once] for n, v in values.items()}, min(at_once, num_samples - k)
            )
            for k in parts
        ]
        return joined(results)
    tiled = tuple(torch.cat([a] * num_samples) if is_per_datum(a) else a for a in args)
    trace = run(program, tiled, {name: fold(name, value) for name, value in values.items()})
    latent, observed = (part.reshape(num_samples, -1) for part in per_datum(layout, trace, values, tiled))
    return Scores({n: unfold(n, v) for n, v in values_of(trace).items() if n in layout.ranks}, latent, observed)


def loop(layout: Layout, program: Program, args: tuple[Any, ...], values: Values, num_samples: int) -> Scores:
    """One run for each sample: always right, and slow."""
    natural = {name: layout.natural(name, value) for name, value in values.items()}
    runs = []
    for k in range(num_samples):
        trace = run(program, args, {n: v[k] for n, v in natural.items()})
        drawn = {n: layout.canonical(n, v[None]) for n, v in values_of(trace).items() if n in layout.ranks}
        runs.append(Scores(drawn, *per_datum(layout, trace, values, args)))
    return joined(runs)


def joined(runs: list[Scores]) -> Scores:
    """The samples of several runs, one after the other."""
    values = {name: torch.cat([run.values[name] for run in runs]) for name in runs[0].values}
    return Scores(values, torch.cat([run.latent for run in runs]), torch.cat([run.observed for run in runs]))


def per_datum(layout: Layout, trace: poutine.Trace, given: Values, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Sums of the latent and of the other sites' log-probabilities, `(num_samples or 1, batch)` each."""
    parts: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, log_prob in zip(scored_sites(trace), log_probs(trace, given), strict=True):
        parts[name in layout.ranks].append(log_prob)
    return layout.per_datum(parts[True], args), layout.per_datum(parts[False], args)


def run(program: Program, args: tuple[Any, ...], values: Values) -> poutine.Trace:
    return poutine.trace(poutine.condition(program, data=values)).get_trace(*args)


def scored_sites(trace: poutine.Trace) -> Sites:
    """The sites that carry a log-probability."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site) and not (site["infer"] or {}).get("_deterministic")
    }


def values_of(trace: poutine.Trace) -> Values:
    return {name: site["value"] for name, site in scored_sites(trace).items()}


def log_probs(trace: poutine.Trace, given: Values) -> Iterable[Tensor]:
    """Each site's log-probability, masked but *not* scaled: a scale inside the logarithm of a mean is no bound."""
    for name, site in scored_sites(trace).items():
        if name in given:
            log_prob = log_prob_anywhere(site["fn"], site["value"])
        else:
            log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
        yield scale_and_mask(log_prob, mask=site["mask"])
