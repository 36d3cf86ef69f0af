"""Discrete latents, all of whose values can be listed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from ppl_vae.scoring.layout import Layout
from ppl_vae.scoring.pair import Pair
from ppl_vae.scoring.running import Sites, Values, run, scored_sites
from ppl_vae.scoring.supports import elementwise, support_of

# Of the configurations, at how many the values that sites can have are compared with those listed.
MOST_CHECKS = 16
_INTERVAL = type(constraints.integer_interval(0, 1))


def discrete_sites(sites: Sites) -> list[str]:
    """Names of the sites whose values are discrete."""
    return [name for name, site in sites.items() if support_of(site["fn"]).is_discrete]


def configurations(layout: Layout, sites: Sites, num_data: int, *, most: int) -> tuple[int, Values]:
    """Every joint value of the discrete sites of one datum.

    Args:
        layout: of the pair.
        sites: the discrete ones.
        num_data: for how many data.
        most: how many are few enough.

    Returns:
        How many there are, and for each site its values in canonical form with the configurations in the place of
        samples.

    Raises:
        ValueError: when a site cannot be enumerated, or there are more than `most`.
    """
    tables = {name: _values_of_one_datum(layout, name, site) for name, site in sites.items()}
    count = 1
    for name, (alphabet, places, _) in tables.items():
        count *= len(alphabet) ** places if places < 64 else most + 1
        if count > most:
            raise ValueError(
                f"The discrete latents {list(sites)} have more than {most} configurations for each datum ('{name}' "
                f"alone {len(alphabet)} values in {places} places), too many to sum over. Use importance_sampling, "
                "which draws them from the guide."
            )
    values, before = {}, 1
    for name, (alphabet, places, shape) in tables.items():
        index = torch.cartesian_prod(*[torch.arange(len(alphabet))] * places).reshape(-1, places)
        table = alphabet[index.to(alphabet.device)].reshape(-1, *shape)
        # The first site changes slowest.
        after = count // before // len(table)
        before *= len(table)
        whole = table.repeat_interleave(after, 0).repeat(count // len(table) // after, *(1,) * (table.dim() - 1))
        axis = 1 + layout.nesting + layout.dim
        values[name] = whole.expand(*whole.shape[:axis], num_data, *whole.shape[axis + 1 :])
    return count, values


def check_alphabets(pair: Pair, args: tuple[Any, ...], sites: Sites, values: Values) -> None:
    """Refuses a site that can have other values than those listed when other latents have other values.

    Args:
        pair: that the sites are of.
        args: the data.
        sites: the discrete ones, as they were listed.
        values: their configurations.

    Raises:
        ValueError: with the site's name.
    """
    counted = [name for name in sites if isinstance(elementwise(support_of(sites[name]["fn"])), _INTERVAL)]
    if not counted or len(pair.latents) < 2:
        return
    count = len(values[counted[0]])
    for k in sorted({round(j * (count - 1) / (MOST_CHECKS - 1)) for j in range(MOST_CHECKS)}):
        given = {name: pair.layout.natural(name, value[k : k + 1])[0] for name, value in values.items()}
        trace = scored_sites(run(pair.model, args, given))
        for name in counted:
            listed, _, _ = _values_of_one_datum(pair.layout, name, sites[name])
            found, _, _ = _values_of_one_datum(pair.layout, name, trace[name])
            if not torch.equal(listed, found):
                raise ValueError(
                    f"The values that the latent '{name}' can have depend on another latent, so that they cannot be "
                    "listed beforehand. Use importance_sampling, which draws it from the guide."
                )


def _values_of_one_datum(layout: Layout, name: str, site: Any) -> tuple[Tensor, int, tuple[int, ...]]:
    """The values one place can take, how many places a datum has, and their shape: plates, then event."""
    base = site["fn"]
    while getattr(base, "base_dist", None) is not None and not base.has_enumerate_support:
        base = base.base_dist
    while isinstance(base, torch.distributions.Independent):
        base = base.base_dist
    try:
        support = base.enumerate_support(expand=False)
    except NotImplementedError as error:
        raise ValueError(
            f"The latent '{name}' is discrete and its values cannot be listed ({type(base).__name__}), or not for all "
            "data alike, so it can be neither summed over nor moved along a gradient. Use importance_sampling, which "
            "draws it from the guide."
        ) from error
    alphabet = support.reshape(len(support), *base.event_shape)
    value = layout.canonical(name, site["value"].unsqueeze(0))
    shape = list(value.shape[1:])
    shape[layout.nesting + layout.dim] = 1
    places = torch.Size(shape).numel() // base.event_shape.numel()
    return alphabet, places, tuple(shape)
