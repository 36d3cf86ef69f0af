"""Evaluating a run: log p(x) of its test data, bounds from both sides, its latents, and what is written of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import isfinite, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import typer
from torch import Tensor

import ppl_vae as pv
from ppl_vae import files, plots, processes
from ppl_vae.cli import pictures, runs
from ppl_vae.diagnostics import Diagnostics
from ppl_vae.evidence import AnnealedEvidence, Bounds, Evidence, Exact, Kind
from ppl_vae.evidence.blocks import at_least_one
from ppl_vae.evidence.both_sides import MEAN_WEIGHT

if TYPE_CHECKING:
    from ppl_vae.cli.pictures import Picture
    from ppl_vae.cli.runs import Run

Method = Literal["importance", "annealed", "grid"]

# What each method is told, and what by default; --bounds takes all of it.
OPTIONS = {"importance": ["num_samples"], "annealed": ["num_chains", "num_temperatures"], "grid": []}
DEFAULTS = {"num_samples": 1000, "num_chains": 16, "num_temperatures": 100}
# How many data are simulated at most, for bounds that hold in probability.
MOST_SIMULATED = 100
# The mean log weight of some draws is never above their log mean weight, and keeps its promises.
MEAN_LOG_WEIGHT = Kind("mean log weight", "lower", in_expectation=True, in_probability=True, data="any")
# What evidence.safetensors holds of each datum.
SAMPLED = ["log_px", "standard_error", "ess", "pareto_k", "elbo", "jackknife", "pareto_smoothed"]
PER_DATUM = {
    Evidence: SAMPLED,
    AnnealedEvidence: [*SAMPLED, "acceptance", "resolved"],
    Exact: ["log_px", "error", "elbo", "kl", "accepted"],
}


@dataclass(frozen=True)
class Plan:
    """What is to be estimated, and how."""

    method: Method
    bounds: bool
    num_data: int | None
    seed: int
    compile: bool
    num_samples: int
    num_chains: int
    num_temperatures: int

    @property
    def estimator(self) -> Callable[..., Evidence]:
        """What draws samples: the method, or annealing beside a grid, which draws none."""
        if self.method == "importance":
            return partial(pv.importance_sampling, num_samples=self.num_samples, compile=self.compile)
        return partial(
            pv.annealed_importance_sampling,
            num_chains=self.num_chains,
            num_temperatures=self.num_temperatures,
            compile=self.compile,
        )


class Rung(NamedTuple):
    """A number of the ladder: a mean over the test data, in nats per datum."""

    name: str
    value: float
    standard_error: float  # for the same data and other samples
    kind: Kind


def planned(
    method: Method, *, bounds: bool, num_data: int | None, seed: int, compile: bool = False, **numbers: int | None
) -> Plan:
    """A plan with the default in place of each of `numbers` that is None; refuses those that would change nothing."""
    given = {name: at_least_one(name, value) for name, value in numbers.items() if value is not None}
    for name in given:
        if not bounds and name not in OPTIONS[method]:
            (other,) = (other for other, names in OPTIONS.items() if name in names)
            raise ValueError(
                f"--{name.replace('_', '-')} changes nothing with --method {method} alone. Leave it out, or ask for "
                f"--method {other} or for --bounds."
            )
    if compile and method == "grid" and not bounds:
        raise ValueError("--compile changes nothing with --method grid alone. Leave it out, or ask for --bounds.")
    return Plan(method, bounds, num_data, seed, compile, **(DEFAULTS | given))


def evaluate(folder: Path, plan: Plan) -> None:
    """Estimates, prints and writes. The evidence is written before the bounds begin, which take longer."""
    run = runs.read(folder)
    index = _chosen(run, plan)
    x = run.data.test[index]
    evidence = _evidence(run, x, plan)
    results = {**numbers(evidence, run, x), "seed": plan.seed, "data": str(run.data)}
    per_datum = {"index": index, **{name: getattr(evidence, name) for name in PER_DATUM[type(evidence)]}}
    typer.echo(str(evidence))
    typer.echo(_bits(results))
    figures = {"pareto_k": pictures.pareto_k(evidence)} if type(evidence) is Evidence else {}
    found = pv.diagnose(run.vae.model, run.vae.guide, x, seed=plan.seed)
    typer.echo(f"\n{found}")
    results["diagnostics"] = _of_latents(found)
    per_datum |= {"reconstruction": found.reconstruction, "kl_to_prior": found.kl}
    if found.kl_per_dimension is not None:
        per_datum["kl_per_dimension"] = found.kl_per_dimension
    figures |= pictures.kl_per_dimension(found)
    _write(folder, results, per_datum, figures)
    if plan.bounds:
        bounds, simulated = _bounds(run, x, plan, evidence), _simulated(run, plan, num_data=len(x))
        rungs = _rungs(run, x, plan, evidence, bounds)
        results["bounds"] = {
            "test_data": _section(bounds),
            "simulated_data": _section(simulated),
            "ladder": [{**rung._asdict(), "kind": str(rung.kind)} for rung in rungs],
        }
        per_datum |= {name: getattr(bounds, name) for name in ("lower", "upper")}
        per_datum |= {f"{name}_standard_error": error for name, error in bounds.standard_error.items()}
        _write(folder, results, per_datum, figures | ladder(rungs, evidence))
    typer.echo(f"Written: {folder / 'evidence.json'}, and per datum {folder / 'evidence.safetensors'}")


def numbers(evidence: Evidence | Exact, run: Run, x: Tensor) -> dict[str, Any]:
    """What is to be said of log p(x) of the test data x, in nats per datum unless the name says otherwise."""
    likelihood, scale = run.vae.likelihood, run.data.scale
    reason = pv.likelihoods.without_bits(likelihood, scale)
    bits = None if reason else pv.bits_per_dim(evidence.log_px, likelihood, x, scale=scale).mean().item()
    return {
        "method": evidence.method,
        "log_px": evidence.mean,
        "mean_standard_error": evidence.mean_standard_error,
        "elbo": evidence.elbo.mean().item(),
        "bits_per_dim": bits,
        "without_bits": reason,
        "num_data": len(evidence.log_px),
        "measure": likelihood.measure.name,
        "warnings": evidence.warnings(),
        **(_of_sum(evidence) if isinstance(evidence, Exact) else _of_samples(evidence)),
    }


def _bits(results: dict[str, Any]) -> str:
    """A line, with the measure beside the number, or with why there is none."""
    bits, reason = results["bits_per_dim"], results["without_bits"]
    return f"{'bits/dim':<18}{'none' if reason else f'{bits:.4f}':>12}  {reason or results['measure']}"


def ladder(rungs: list[Rung], evidence: Evidence | Exact) -> dict[str, Picture]:
    """The picture of the rungs that have a place on an axis, if any: a datum of probability 0 makes a mean of −∞."""
    drawn = [rung for rung in rungs if isfinite(rung.value)]
    if not drawn:
        return {}
    names, values, errors, kinds = zip(*drawn, strict=True)
    exact = evidence.mean if isinstance(evidence, Exact) and bool(evidence.accepted.all()) else None
    ax = plots.ladder(names, values, errors, sides=[kind.side for kind in kinds], exact=exact)
    return {"ladder": (ax, "Estimates of log p(x) of the same data: the truth lies between the two kinds of bound.")}


def _of_sum(exact: Exact) -> dict[str, Any]:
    return {
        "kind": {
            "log_px": f"exact up to the error of each datum that is accepted: {exact.method}, any data",
            "elbo": f"lower bound, the guide's own: {exact.method}, any data",
        },
        "largest_error": exact.error.max().item(),
        "kl": exact.kl.mean().item(),
        "share_accepted": exact.accepted.double().mean().item(),
    }


def _of_samples(evidence: Evidence) -> dict[str, Any]:
    found: dict[str, Any] = {
        "kind": {"log_px": str(MEAN_WEIGHT), "elbo": str(MEAN_LOG_WEIGHT)},
        "mc_standard_error": evidence.mc_standard_error,
        "mc_bias": evidence.mc_bias,
    }
    if isinstance(evidence, AnnealedEvidence):
        return found | {
            "num_chains": evidence.num_samples,
            "num_temperatures": evidence.num_temperatures,
            "share_moves_accepted": evidence.acceptance.mean().item(),
            "share_resolved": evidence.resolved.double().mean().item(),
        }
    return found | {
        "num_samples": evidence.num_samples,
        "share_pareto_k_below_0.7": (evidence.pareto_k < 0.7).double().mean().item(),
    }


def _of_latents(found: Diagnostics) -> dict[str, Any]:
    """The diagnostics as JSON; means over the data, in nats per datum."""
    split = found.kl_per_dimension
    return {
        "mean": found.mean,
        "mc_standard_error": found.mc_standard_error,
        "mean_standard_error": found.mean_standard_error,
        "num_samples": found.num_samples,
        "active_units": found.num_active,
        "latents": {
            name: {
                "kl": None if split is None else split[:, d].mean().item(),
                "variance_of_posterior_mean": found.unit_variance[d].item(),
            }
            for d, name in enumerate(found.dimensions)
        },
        "warnings": found.warnings(),
    }


def _chosen(run: Run, plan: Plan) -> Tensor:
    """The indices of the test data that are scored; what cannot be done is refused before anything else is."""
    if plan.method == "grid" and run.vae.latent_dim > 2:
        raise ValueError(
            f"A grid over z goes up to 2 dimensions, and this run has a latent_dim of {run.vae.latent_dim}. Use "
            "--method annealed, and --bounds to see how far off it may be."
        )
    index = torch.arange(len(run.data.test))
    if plan.num_data is None:
        return index
    if not 1 <= plan.num_data <= len(index):
        raise ValueError(f"Expected to score from 1 to {len(index)} test data; got {plan.num_data}.")
    return torch.randperm(len(index), generator=torch.Generator().manual_seed(plan.seed))[: plan.num_data].sort().values


def _evidence(run: Run, x: Tensor, plan: Plan) -> Evidence | Exact:
    if plan.method == "grid":
        return pv.grid_integration(run.vae.model, run.vae.guide, x)
    return plan.estimator(run.vae.model, run.vae.guide, x, seed=plan.seed)


def _bounds(run: Run, x: Tensor, plan: Plan, evidence: Evidence | Exact) -> Bounds:
    """Bounds for the test data from two runs, the first of which is the evidence unless that is exact."""
    made = [evidence] if isinstance(evidence, Evidence) else []

    def estimator(*args: Any, seed: int) -> Evidence:
        return made.pop() if made else plan.estimator(*args, seed=seed)

    found = pv.bounds(run.vae.model, run.vae.guide, x, estimators=[estimator], seed=plan.seed)
    typer.echo(f"\nThe test data from both sides\n{found}")
    return found


def _simulated(run: Run, plan: Plan, *, num_data: int) -> Bounds:
    """Bounds for data of the model's own, up to so many."""
    found = pv.sandwich(
        run.vae.model,
        run.vae.guide,
        num_data=min(num_data, MOST_SIMULATED),
        num_chains=plan.num_chains,
        num_temperatures=plan.num_temperatures,
        seed=plan.seed,
    )
    typer.echo(f"\nData simulated from the model from both sides: how far off annealing is\n{found}")
    return found


def _rungs(run: Run, x: Tensor, plan: Plan, evidence: Evidence | Exact, bounds: Bounds) -> list[Rung]:
    """From the ELBO to the upper bound, all of the same data."""

    def sampled(num_samples: int) -> Evidence:
        return pv.importance_sampling(run.vae.model, run.vae.guide, x, num_samples=num_samples, seed=plan.seed)

    estimates = [sampled(count) for count in (10, 100) if count < plan.num_samples]
    most = evidence if type(evidence) is Evidence else sampled(plan.num_samples)
    rungs = [Rung("ELBO", most.elbo.mean().item(), nan, MEAN_LOG_WEIGHT)]
    rungs += [Rung(f"IWAE {e.num_samples}", e.mean, e.mc_standard_error, MEAN_WEIGHT) for e in (*estimates, most)]
    if plan.method != "importance":
        rungs.append(_rung("annealed", bounds, "lower"))
    return [*rungs, _rung("upper bound", bounds, "upper")]


def _rung(name: str, bounds: Bounds, side: Literal["lower", "upper"]) -> Rung:
    return Rung(name, bounds.mean[side], bounds.mc_standard_error[side], bounds.kind[side])


def _section(bounds: Bounds) -> dict[str, Any]:
    """The means of bounds as JSON, each with what it is."""
    found: dict[str, Any] = {
        "method": bounds.method,
        "num_data": len(bounds.lower),
        "width": bounds.width.mean().item(),
        "warnings": bounds.warnings(),
    }
    for name, kind in bounds.kind.items():
        found[name] = {
            "value": bounds.mean[name],
            "mc_standard_error": bounds.mc_standard_error[name],
            "mean_standard_error": bounds.mean_standard_error[name],
            "kind": str(kind),
        }
    return found


def _as_json(value: Any) -> Any:
    """Numbers that JSON has no form for become null."""
    if isinstance(value, dict):
        return {name: _as_json(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_as_json(v) for v in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _write(folder: Path, results: dict[str, Any], per_datum: dict[str, Tensor], figures: dict[str, Picture]) -> None:
    """Writes means, what is known per datum, and pictures, in the place of those of an earlier evaluation.

    Only the first of several processes does.
    """
    if not processes.is_first():
        return
    files.write_tensors(folder / "evidence.safetensors", per_datum)
    files.write_json(folder / "evidence.json", _as_json(results))
    for name in {"pareto_k", "kl_per_dimension", "ladder"} - figures.keys():
        (folder / "figures" / f"{name}.png").unlink(missing_ok=True)
    pictures.draw(figures, folder)
