"""The loss, the bound and the gradient of a batch as one compiled graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppl_vae import parameters, scoring
from ppl_vae.batches import Batch
from ppl_vae.compiling import Compiled, NotCompiled, Outputs
from ppl_vae.objectives import ImportanceWeightedELBO, Objective
from ppl_vae.scoring import Program
from ppl_vae.training.sharing import RECORDED


class Step(NamedTuple):
    """What a graph gives for a batch.

    Attributes:
        loss: per datum.
        bound: mean over the batch; minus the loss where the objective has no other.
        norm: of the gradient.
        bounds: of each datum.
        gradients: of the loss, by the names of the parameters that it depends on.
    """

    loss: float
    bound: float
    norm: float
    bounds: Tensor
    gradients: parameters.Parameters


class Graph:
    """The loss, its bound and its gradient as a function of a batch; None where they have to be found eagerly.

    The first step is, in which objectives do what they do but once, and distributions check their parameters. Data
    outside the support of their distribution, which validation would refuse, are too.

    Args:
        model, guide, objective: what `fit` trains.
        trained: the parameters.
        per_datum: from the loss of a batch to that of a datum.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        objective: Any,
        trained: parameters.Parameters,
        per_datum: Callable[[Any, Batch], Any],
    ) -> None:
        self.model, self.guide, self.objective, self.trained = model, guide, objective, trained
        self.per_datum = per_datum
        self.compiled = Compiled(self._differentiated, what="the training step")
        self.looked_at = 0
        self.pair: scoring.Pair | None = None
        self.given: dict[Any, list[str]] = {}

    def __call__(self, batch: Batch) -> Step | None:
        if self.compiled.cause is not None or self._is_first(batch):
            return None
        state, tensors = torch.get_rng_state(), (*batch, *self._numbers())
        found = self.compiled(*tensors)
        if found is None:
            return None
        numbers, bounds, *gradients = found
        possible, *terms = numbers.tolist()  # all at once: for what a small tensor costs, a thousand numbers are added
        if not possible:
            torch.set_rng_state(state)
            return None
        loss, bound, norm = terms
        return Step(loss, bound, norm, bounds, dict(zip(self.given[_shapes(tensors)], gradients, strict=True)))

    def _is_first(self, batch: Batch) -> bool:
        """Whether nothing is known of the pair yet but what this batch shows."""
        # One datum alone does not show which plate is over the data.
        if self.looked_at > 1 or self.looked_at == len(batch[0]):
            return False
        self.looked_at = len(batch[0])
        if reason := _reason_against(self.objective, batch):
            self.compiled.give_up(reason)
        elif isinstance(self.objective, Objective):
            self.pair = self.objective.pair(self.model, self.guide, *batch)
        return True

    def _numbers(self) -> list[Tensor]:
        if not isinstance(self.objective, Objective):
            return []
        return [torch.tensor(number, dtype=torch.float64) for number in self.objective.numbers()]

    def _differentiated(self, *tensors: Tensor) -> Outputs:
        """Whether the data are possible, and the numbers of a `Step`; its bounds; its gradients."""
        with _Supports() as supports:
            loss, bounds, batch = self._terms(tensors)
        loss = self.per_datum(loss, batch)
        if not (isinstance(loss, Tensor) and loss.requires_grad):
            raise NotCompiled("its loss has no gradient")
        parameters.check_graph(loss, self.trained)
        gradients = torch.autograd.grad(loss, list(self.trained.values()), allow_unused=True)
        given = {name: g for name, g in zip(self.trained, gradients, strict=True) if g is not None}
        self.given[_shapes(tensors)] = list(given)
        norm = torch.stack([g.square().sum().double() for g in given.values()]).sum().sqrt()
        numbers = [x.double() for x in (supports.all(), loss.detach(), bounds.mean(), norm)]
        return (torch.stack(numbers), bounds, *given.values())

    def _terms(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Batch]:
        if self.pair is not None:
            batch = tensors[: len(tensors) - len(self.objective.numbers())]
            loss, bounds = self.objective.at(self.pair, batch, *tensors[len(batch) :])
            return loss, bounds, batch
        loss = self.objective.differentiable_loss(self.model, self.guide, *tensors)
        return loss, -self.per_datum(loss, tensors).detach(), tensors


def _reason_against(objective: Any, batch: Batch) -> str | None:
    """Why there is no use in recording a step, if there is none."""
    name = type(objective).__name__
    if not all(isinstance(part, Tensor) for part in batch):
        return "a batch holds other things than tensors"
    if isinstance(objective, RECORDED):
        return f"{name} records the programs itself; Trace_ELBO leaves it to fit"
    if isinstance(objective, ImportanceWeightedELBO) and objective.max_particles_at_once < objective.num_particles:
        return "max_particles_at_once has particles computed again, with random numbers set back to their first time"
    if not hasattr(objective, "differentiable_loss"):
        return f"{name} computes its gradient itself, and has no differentiable_loss"
    return None


def _shapes(tensors: tuple[Tensor, ...]) -> tuple[torch.Size, ...]:
    return tuple(tensor.shape for tensor in tensors)


class _Supports(Messenger):
    """Whether all data lie in the support of their distribution, as one tensor; validation would read its value."""

    def __enter__(self) -> _Supports:
        self.found: list[Tensor] = []
        return super().__enter__()

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["is_observed"] and not site_is_subsample(msg):
            self.found.append(scoring.inside(msg["fn"], msg["value"]).all())

    def all(self) -> Tensor:
        return torch.stack(self.found).all() if self.found else torch.ones((), dtype=torch.bool)
