"""What has no log weight per datum, and why, in sentences that name the site."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import pyro.distributions as dist
import torch

from ppl_vae.scoring.running import Sites
from ppl_vae.scoring.supports import without_validation

NOT_TOLD = -1  # the size of `pyro.plate("data")` in Pyro's frames


def matching_latents(model: Sites, guide: Sites) -> list[str]:
    """Names of the latents, after checking that the guide has a density for each of them and for nothing else."""
    for name, site in guide.items():
        if site["is_observed"]:
            raise ValueError(
                f"The guide observes '{name}' (an obs= or a factor), so it is no density q(z given x). Leave to the "
                "model what is observed."
            )
    latents = [name for name, site in model.items() if not site["is_observed"]]
    drawn = [name for name, site in guide.items() if not site["is_observed"]]
    for name in latents:
        if name not in drawn:
            raise ValueError(
                f"The model draws '{name}', which the guide does not: the guide's sites are {drawn}. Give both the "
                "same names, and the guide a site for each latent of the model."
            )
        if is_delta(guide[name]) and f"{name}_unconstrained" not in drawn:
            others = [other for other in drawn if other not in latents]
            if others:
                raise ValueError(
                    f"The guide draws '{others[0]}' for all data at once and computes '{name}' from it, so no datum "
                    "has a density log q(z given x) of its own. Use a guide that draws in the plate."
                )
            raise ValueError(
                f"The guide puts all of '{name}' at one point (a Delta), which has no density log q(z given x), so "
                "there are no importance weights and no log p(x): this is an autoencoder or a MAP estimate. Use a "
                "guide with a density, such as a VAE's."
            )
        if any(isinstance(fn, dist.ImproperUniform) for fn in _layers(model[name])):
            raise ValueError(
                f"The prior of '{name}' is improper: it has no p(x). Give it a density that integrates to 1."
            )
        if not _same_mask(model[name], guide[name]):
            raise ValueError(
                f"'{name}' is masked differently in the two programs, so that its prior or its posterior is missing "
                "from the weight. Mask it alike in both or in neither."
            )
    for name in drawn:
        transformed = name.removesuffix("_unconstrained")
        of_autoguide = transformed != name and transformed in latents and is_delta(guide[transformed])
        if name not in latents and not of_autoguide:
            raise ValueError(
                f"The guide draws '{name}', which the model does not: the model's latents are {latents}. Give both "
                "the same names; a latent of the guide alone would have to be integrated out of log q(z given x)."
            )
    return latents


def data_plates(sites: Sites, num_data: int) -> dict[str, int]:
    """Name and dimension of the plates around most sites that are as long as the data or not told how long they are."""
    stacks = [site["cond_indep_stack"] for site in sites.values()]
    candidates = [f for stack in stacks for f in stack if f.vectorized and f.size in (num_data, NOT_TOLD)]
    around = {f.name: sum(f in stack for stack in stacks) for f in candidates}
    return {f.name: f.dim for f in candidates if around[f.name] == max(around.values())}


def no_plate(model: Sites, num_data: int) -> str:
    """What is wrong with a model without a plate over the data."""
    plates = sorted({f"{f.name} ({f.size})" for site in model.values() for f in site["cond_indep_stack"]}) or ["none"]
    return (
        f"No plate of the model is over the {num_data} data, so nothing says which log-probabilities belong to which "
        f"datum (sites: {list(model)}; plates: {', '.join(plates)}). Put every site in "
        '`with pyro.plate("data", len(x)):`.'
    )


def check_vectorised(who: str, site: Any) -> None:
    """Refuses a site in a plate that is looped over."""
    for frame in site["cond_indep_stack"]:
        if not frame.vectorized:
            raise ValueError(
                f"{who} is in the sequential plate '{frame.name}' (`for i in plate`). Use it vectorised: "
                f'`with pyro.plate("{frame.name}", ...):`.'
            )


def check_site(who: str, site: Any, plate: str, dim: int, num_data: int) -> None:
    """Refuses a site whose log-probability is not that of single data."""
    frames = {frame.name: frame for frame in site["cond_indep_stack"]}
    if plate not in frames:
        raise ValueError(
            f"{who} is outside the plate '{plate}' over the data (its plates: {list(frames) or 'none'}). What all "
            "data share has no weight per datum, and log p(x) of one datum is not defined: move the site into the "
            "plate, or make it a parameter."
        )
    if frames[plate].size not in (num_data, NOT_TOLD) or frames[plate].dim != dim:
        raise ValueError(
            f"{who} has the plate '{plate}' of size {frames[plate].size} at dimension {frames[plate].dim}, where "
            f"the {num_data} data lie at dimension {dim}. Both programs take the batch whole: "
            f'`pyro.plate("{plate}", len(x))`, or with subsampling `pyro.plate("{plate}", N, subsample_size=len(x))`.'
        )
    for frame in frames.values():
        if frame.name != plate and frame.full_size not in (None, frame.size):
            raise ValueError(
                f"{who} is in the plate '{frame.name}', of whose {frame.full_size} elements only {frame.size} are "
                "drawn. A part of a datum gives no unbiased p(x): use the whole plate."
            )
    of_plates = prod((frame.full_size or frame.size) / frame.size for frame in frames.values())
    scale = torch.as_tensor(site["scale"]) / of_plates
    if (scale - 1).abs().max() > 1e-6:
        raise ValueError(
            f"{who} is scaled by {scale.flatten()[0]:.4g} (`poutine.scale`), so that its density does not "
            "integrate to 1 and no log p(x) comes of it. Score the model without the scale; a weight on the KL "
            "belongs to the objective."
        )
    if not site["is_observed"]:
        without_validation(site["fn"])  # The guide may reach beyond the prior's support: the weight is 0 there.
    log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    if frames[plate].size == NOT_TOLD and (log_prob.dim() < -dim or log_prob.shape[dim] != num_data):
        raise ValueError(
            f"{who} has log-probabilities of shape {tuple(log_prob.shape)}, not one for each of the {num_data} data. A "
            f'plate without a size does not repeat what it holds: give it one, `pyro.plate("{plate}", len(x))`.'
        )
    declared = {frame.dim for frame in frames.values()}
    for axis in range(-log_prob.dim(), 0):
        if log_prob.shape[axis] > 1 and axis not in declared:
            raise ValueError(
                f"{who} has log-probabilities of shape {tuple(log_prob.shape)}, whose dimension {axis} no plate "
                "declares. If it belongs to one datum, add .to_event(1) to the distribution; if its elements are "
                "independent, put the site in a plate over them."
            )


def is_delta(site: Any) -> bool:
    """Whether the site puts all of its probability at one point."""
    return any(isinstance(fn, dist.Delta) for fn in _layers(site))


def mask_of(site: Any) -> torch.Tensor:
    """Which elements of a site count, by `poutine.mask`, `.mask()` or both; True for all."""
    masks = [site["mask"], *(layer._mask for layer in _layers(site) if isinstance(layer, dist.MaskedDistribution))]
    return torch.stack(torch.broadcast_tensors(*(torch.as_tensor(True if m is None else m) for m in masks))).all(0)


def _same_mask(site: Any, other: Any) -> bool:
    one, two = mask_of(site), mask_of(other)
    if one.all() and two.all():
        return True
    try:
        return torch.equal(*torch.broadcast_tensors(one, two))
    except RuntimeError:  # of shapes that do not go together
        return False


def _layers(site: Any) -> Iterator[Any]:
    """The distribution of a site, and those it is made from."""
    fn = site["fn"]
    while fn is not None:
        yield fn
        fn = getattr(fn, "base_dist", None)
