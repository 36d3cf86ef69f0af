"""The parameters of a pair: which there are, and whether each of them would really be trained."""

from __future__ import annotations

import warnings
from typing import Any

from pyro import poutine
from torch import Tensor, nn

from ppl_vae import isolation, scoring
from ppl_vae.scoring import Program

Parameters = dict[str, Tensor]


def find(model: Program, guide: Program, batch: tuple[Any, ...]) -> tuple[Parameters, list[nn.Module], dict[str, Any]]:
    """Runs the pair once on a batch, without gradients, and looks at what it is made of.

    Parameters are those of the two programs where they are modules (or methods of one), and those that `pyro.module`
    and `pyro.param` make known to Pyro; lazily created ones are created by the run.

    Returns:
        The parameters that ask for a gradient, by name; the modules that ran; the sites of the model.

    Raises:
        RuntimeError: when there are none, or when a network runs whose parameters are not among them.

    Example:
        >>> import pyro, torch
        >>> from ppl_vae import coin
        >>> list(find(coin.model, coin.guide, (torch.ones(3),))[0])
        ['probability']
        >>> pyro.clear_param_store()
    """
    called: dict[nn.Module, None] = {}
    with isolation.evaluation(), isolation.on_call(lambda module: called.setdefault(module)):
        guide_trace = poutine.trace(guide).get_trace(*batch)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*batch)
    nodes = {**guide_trace.nodes, **model_trace.nodes}
    param_sites: dict[str, Any] = {name: site["value"] for name, site in nodes.items() if site["type"] == "param"}
    parameters = _gather(model, guide, param_sites)
    _check_registered(list(called), parameters, param_sites)
    return parameters, list(called), scoring.scored_sites(model_trace)


def _gather(model: Program, guide: Program, param_sites: dict[str, Tensor]) -> Parameters:
    """Every parameter that asks for a gradient, by name, each tensor once."""
    found: dict[int, tuple[str, Tensor]] = {}
    for label, program in (("model", model), ("guide", guide)):
        owner = program if isinstance(program, nn.Module) else getattr(program, "__self__", None)
        if isinstance(owner, nn.Module):
            for name, parameter in owner.named_parameters():
                found.setdefault(id(parameter), (f"{label}.{name}", parameter))
    owned = {name for name, _ in found.values()}
    for name, value in param_sites.items():
        if owned.isdisjoint({f"model.{name}", f"guide.{name}"}):  # else the store's own, of an earlier PyroModule
            # The store trains the unconstrained leaf under a constrained parameter.
            leaf = value.unconstrained() if hasattr(value, "unconstrained") else value
            found.setdefault(id(leaf), (name.replace("$$$", "."), leaf))
    parameters = {name: p for name, p in found.values() if p.requires_grad}
    if not parameters:
        raise RuntimeError(
            "There is nothing to train: the pair has no parameter that asks for a gradient. Give modules, or register "
            'networks inside the functions: `pyro.module("decoder", decoder)`.'
        )
    return parameters


def _check_registered(called: list[nn.Module], parameters: Parameters, param_sites: dict[str, Any]) -> None:
    """Refuses a network that runs but would not be trained."""
    trained = {id(p) for p in parameters.values()}
    running = {id(p) for module in called for p in module.parameters()}
    for module in called:
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in trained:
                continue
            for site, value in param_sites.items():
                if "$$$" in site and id(value) not in running:
                    raise RuntimeError(
                        f"The parameter store still holds '{site.replace('$$$', '.')}' of an earlier network: Pyro "
                        "would train that one while the new one runs. Call pyro.clear_param_store() before training "
                        "the new one."
                    )
            raise RuntimeError(
                f"{module} runs in the pair, but nothing registers its parameter '{name}', so it would not be trained. "
                'Add `pyro.module("network", network)` to the program that uses it, or freeze it with '
                "requires_grad_(False)."
            )


def check_gradients(parameters: Parameters, gradients: Parameters, objective: object) -> None:
    """Says after the first step which parameters have no part in the loss."""
    without = [name for name in parameters if name not in gradients]
    if not gradients:
        raise RuntimeError(
            f"No parameter received a gradient from {type(objective).__name__} in the first step: {without}. Is the "
            "loss computed without them, or under torch.no_grad()?"
        )
    if without:
        warnings.warn(
            f"These parameters received no gradient in the first step and will not be trained: {', '.join(without)}.",
            stacklevel=3,
        )
