"""Data drawn from a model together with their latents, which are then exact draws from p(z given x)."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ppl_vae import scoring
from ppl_vae.scoring import Program, Values, scored_sites
from ppl_vae.scoring.data import is_per_datum
from ppl_vae.scoring.running import Sites


def simulate(model: Program, args: tuple[Any, ...], num_data: int) -> tuple[tuple[Any, ...], Values]:
    """Arguments for the pair with x simulated, and the value of every site that made it.

    Args:
        model: draws data as `model(None, num_data=...)` when there are no args.
        args: data whose x is replaced; inputs beside it stay.
        num_data: how many.

    Raises:
        ValueError: when what the model observes is none of its arguments, and when x and z are no draw from it.
    """
    if not args:
        try:
            trace = poutine.trace(model).get_trace(None, num_data=num_data)
        except TypeError as error:
            raise ValueError(
                "Without data sandwich calls the model as model(None, num_data=...), and this one does not take that "
                "to draw data of its own. Give it data for their shapes, as in sandwich(model, guide, x)."
            ) from error
        x = trace.nodes["_RETURN"]["value"]
        if not isinstance(x, Tensor) or len(x) != num_data:
            raise ValueError(
                "The model must return the data that it draws when called as model(None, num_data=...); or give it "
                "data for their shapes, as in sandwich(model, guide, x)."
            )
        return _checked(model, (x,), trace)
    available = scoring.check_data(*args)
    args = scoring.rows(args, slice(min(num_data, available)))
    observed = _observed(poutine.trace(model).get_trace(*args))
    trace = poutine.trace(poutine.uncondition(model)).get_trace(*args)
    drawn, new = _values(trace), list(args)
    for name, site in observed.items():
        place = _argument(name, site["value"], args)
        new[place] = drawn[name].reshape(args[place].shape).to(args[place].dtype)
    return _checked(model, tuple(new), trace)


def _checked(model: Program, args: tuple[Any, ...], trace: poutine.Trace) -> tuple[tuple[Any, ...], Values]:
    """The arguments and what was drawn, after making sure that they are one draw from the model.

    That is, that the model says of these arguments and these latents what it said when it drew them.
    """
    drawn = _values(trace)
    latents = {n: v for n, v in drawn.items() if n not in _observed(poutine.trace(model).get_trace(*args))}
    again = _observed(poutine.trace(poutine.condition(model, data=latents)).get_trace(*args))
    for name, site in again.items():
        if name in latents:
            continue
        same = name in drawn and site["value"].shape == drawn[name].shape and torch.equal(site["value"], drawn[name])
        if not same or not torch.allclose(_log_prob(site), _log_prob(trace.nodes[name]), rtol=1e-4, atol=1e-5):
            raise ValueError(
                f"Given the data that it has just drawn, the model observes something else at '{name}', or thinks "
                "otherwise of it: as when it reads x where it should not, returns a mean instead of a draw, or takes "
                "data of another type. No exact draw from the posterior is known then, and no bound from above."
            )
    return args, drawn


def _observed(trace: poutine.Trace) -> Sites:
    return {name: site for name, site in scored_sites(trace).items() if site["is_observed"]}


def _log_prob(site: Any) -> Tensor:
    return site["fn"].log_prob(site["value"].detach(), *site["args"], **site["kwargs"])


def _values(trace: poutine.Trace) -> Values:
    return {name: site["value"].detach() for name, site in scored_sites(trace).items()}


def _argument(name: str, value: Tensor, args: tuple[Any, ...]) -> int:
    """Which argument a site observes."""
    if value.numel() == 0:
        raise ValueError(
            f"The model has a factor, '{name}', whose weight no simulated datum obeys: data drawn from it are not from "
            "its density. Use bounds, on data that you have."
        )
    places = [
        place
        for place, argument in enumerate(args)
        if is_per_datum(argument)
        and argument.numel() == value.numel()
        and torch.equal(argument.reshape(-1).to(value), value.reshape(-1))
    ]
    # Of arguments with equal values, the one that the site holds itself.
    same = [p for p in places if args[p].untyped_storage().data_ptr() == value.untyped_storage().data_ptr()]
    places = same or places
    if len(places) > 1:
        raise ValueError(
            f"What the model observes at '{name}' equals {len(places)} of its arguments, so that it cannot be told "
            "which to simulate. Give the others other values."
        )
    if places:
        return places[0]
    raise ValueError(
        f"What the model observes at '{name}', of shape {tuple(value.shape)}, is none of its arguments, so a simulated "
        "value of it cannot be given to the guide. Pass to the model what it observes, already transformed."
    )
