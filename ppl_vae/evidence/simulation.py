"""Data drawn from a model together with their latents, which are then exact draws from p(z given x)."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ppl_vae import scoring
from ppl_vae.scoring import Program, Values, scored_sites
from ppl_vae.scoring.data import is_per_datum


def simulate(model: Program, args: tuple[Any, ...], num_data: int) -> tuple[tuple[Any, ...], Values]:
    """Arguments for the pair with x simulated, and the value of every site that made it.

    Args:
        model: draws data as `model(None, num_data=...)` when there are no args.
        args: data whose x is replaced; inputs beside it stay.
        num_data: how many.

    Raises:
        ValueError: when what the model observes is none of its arguments.
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
        return (x,), _values(trace)
    available = scoring.check_data(*args)
    args = scoring.rows(args, slice(min(num_data, available)))
    observed = {
        name: site["value"]
        for name, site in scored_sites(poutine.trace(model).get_trace(*args)).items()
        if site["is_observed"]
    }
    simulated = _values(poutine.trace(poutine.uncondition(model)).get_trace(*args))
    new = list(args)
    for name, value in observed.items():
        place = _argument(name, value, args)
        new[place] = simulated[name].reshape(args[place].shape).to(args[place].dtype)
    return tuple(new), simulated


def _values(trace: poutine.Trace) -> Values:
    return {name: site["value"].detach() for name, site in scored_sites(trace).items()}


def _argument(name: str, value: Tensor, args: tuple[Any, ...]) -> int:
    """Which argument a site observes."""
    for place, argument in enumerate(args):
        if not is_per_datum(argument) or argument.numel() != value.numel():
            continue
        if torch.equal(argument.reshape(-1).to(value), value.reshape(-1)):
            return place
    raise ValueError(
        f"What the model observes at '{name}', of shape {tuple(value.shape)}, is none of its arguments, so a simulated "
        "value of it cannot be given to the guide. Pass to the model what it observes, already transformed."
    )
