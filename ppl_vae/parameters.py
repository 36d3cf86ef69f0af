"""The parameters of a pair: which there are, and whether each of them would really be trained."""

from __future__ import annotations

import warnings
from typing import Any

import pyro
from pyro import poutine
from torch import Tensor, nn

from ppl_vae import isolation, processes, scoring
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
    with isolation.evaluation(model, guide), isolation.on_call(lambda module: called.setdefault(module)):
        guide_trace = poutine.trace(guide).get_trace(*batch)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*batch)
    parameters = {**_of_program("model", model, model_trace), **_of_program("guide", guide, guide_trace)}
    unique = {id(p): name for name, p in reversed(parameters.items()) if p.requires_grad}
    parameters = {name: p for name, p in parameters.items() if unique.get(id(p)) == name}
    if not parameters:
        raise RuntimeError(
            "There is nothing to train: the pair has no parameter that asks for a gradient. Give modules, or register "
            'networks inside the functions: `pyro.module("decoder", decoder)`.'
        )
    param_sites = {**_param_sites(model_trace), **_param_sites(guide_trace)}
    _check_registered(list(called), parameters, param_sites)
    return parameters, list(called), scoring.scored_sites(model_trace)


def check_graph(loss: Tensor, parameters: Parameters) -> None:
    """Refuses a tensor that takes part in the loss and asks for a gradient, but would not be trained.

    Raises:
        RuntimeError: with the shape of the tensor, for it has no name.
    """
    trained = {id(p) for p in parameters.values()}
    seen: set[Any] = set()
    to_visit = [loss.grad_fn]
    while to_visit:
        node = to_visit.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        to_visit.extend(following for following, _ in node.next_functions)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in trained:
            raise RuntimeError(
                f"A tensor of shape {tuple(leaf.shape)} takes part in the loss and asks for a gradient, but nothing "
                "registers it, so it would not be trained. Give it a name inside the program with pyro.param or "
                "pyro.module, or freeze it with requires_grad_(False)."
            )


def check_store(known: set[str]) -> None:
    """Refuses parameters that came into Pyro's store after the optimiser was made.

    Raises:
        RuntimeError: with their names.
    """
    late = sorted(set(pyro.get_param_store().keys()) - known)
    if late:
        raise RuntimeError(
            f"'{late[0].replace('$$$', '.')}' was first asked for after the first batch and would not be "
            "trained. Ask for every parameter in every run of the programs."
        )


def _param_sites(trace: poutine.Trace) -> dict[str, Any]:
    return {name: site["value"] for name, site in trace.nodes.items() if site["type"] == "param"}


def _of_program(label: str, program: Program, trace: poutine.Trace) -> Parameters:
    """The parameters of one program by name: its module's, and those it asks the parameter store for."""
    owner = program if isinstance(program, nn.Module) else getattr(program, "__self__", None)
    found: Parameters = {}
    if isinstance(owner, nn.Module):
        found = {f"{label}.{name}": parameter for name, parameter in owner.named_parameters()}
    for name, value in _param_sites(trace).items():
        # A module runs with its own parameters, whatever an earlier one left in the store under their names.
        if f"{label}.{name.replace('$$$', '.')}" not in found:
            # The store trains the unconstrained leaf under a constrained parameter.
            leaf = value.unconstrained() if hasattr(value, "unconstrained") else value
            found.setdefault(name.replace("$$$", "."), leaf)
    return found


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
    if without and processes.is_first():
        warnings.warn(
            f"These parameters received no gradient in the first step and will not be trained: {', '.join(without)}.",
            stacklevel=3,
        )
