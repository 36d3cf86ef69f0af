"""The loss, the bound and the gradient of a batch as one compiled graph; and the step of Adam, on one processor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import isfinite
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
from ppl_vae.training.adam import Update
from ppl_vae.training.sharing import RECORDED


class Step(NamedTuple):
    """What a graph gives for a batch.

    Attributes:
        loss: per datum.
        bound: mean over the batch; minus the loss where the objective has no other.
        norm: of the gradient.
        bounds: of each datum.
        gradients: of the loss, by the names of the parameters that it depends on; none where these have been updated.
    """

    loss: float
    bound: float
    norm: float
    bounds: Tensor
    gradients: parameters.Parameters


class Graph:
    """The loss, its bound and its gradient as a function of a batch; None where they have to be found eagerly.

    The first step is, in which objectives do what they do but once, distributions check their parameters, and the
    optimiser makes its moments. Data outside the support of their distribution, which validation would refuse, are too.

    Args:
        model, guide, objective: what `fit` trains.
        trained: the parameters.
        per_datum: from the loss of a batch to that of a datum.
        update: what to do with the gradient, if the graph is to do that too. Where something is not finite there is
            no `Step` then, and nothing that depends on it changes.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        objective: Any,
        trained: parameters.Parameters,
        per_datum: Callable[[Any, Batch], Any],
        update: Update | None = None,
    ) -> None:
        self.model, self.guide, self.objective, self.trained = model, guide, objective, trained
        self.per_datum, self.update = per_datum, update
        state = update.state if update is not None else tuple
        self.compiled = Compiled(self._differentiated, what="the training step", state=state)
        self.looked_at = 0
        self.pair: scoring.Pair | None = None
        self.given: dict[Any, list[str]] = {}

    def __call__(self, batch: Batch) -> Step | None:
        step = None if self.compiled.cause is not None or self.is_first(batch) else self._step(batch)
        if step is None and self.update is not None:
            self.update.done_without()
        return step

    def _step(self, batch: Batch) -> Step | None:
        state, tensors = torch.get_rng_state(), (*batch, *self._numbers())
        found = self.compiled(*tensors)
        if found is None:
            return None
        numbers, bounds, *gradients = found
        possible, *terms = numbers.tolist()  # all at once: for what a small tensor costs, a thousand numbers are added
        if not possible or (self.update is not None and not all(map(isfinite, terms))):
            torch.set_rng_state(state)
            return None
        loss, bound, norm = terms
        given = self.given[_shapes(tensors)]
        if self.update is None:
            return Step(loss, bound, norm, bounds, dict(zip(given, gradients, strict=True)))
        self.update.done(given)
        return Step(loss, bound, norm, bounds, {})

    def is_first(self, batch: Batch) -> bool:
        """Whether nothing is known of the pair yet but what this batch shows, which is looked at."""
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
        """What may be another number in every step, besides the batch."""
        numbers = self.objective.numbers() if isinstance(self.objective, Objective) else ()
        factors = [self.update.factors()] if self.update is not None else []
        return [*(torch.tensor(number, dtype=torch.float64) for number in numbers), *factors]

    def _differentiated(self, *tensors: Tensor) -> Outputs:
        """Whether the data are possible, and the numbers of a `Step`; its bounds; its gradients, if not used."""
        with _Supports() as supports:
            loss, bounds, batch = self._terms(tensors if self.update is None else tensors[:-1])
        loss = self.per_datum(loss, batch)
        if not (isinstance(loss, Tensor) and loss.requires_grad):
            raise NotCompiled("its loss has no gradient")
        parameters.check_graph(loss, self.trained)
        possible, value, bound = supports.all(), loss.detach(), bounds.mean()
        squares: dict[str, Tensor] = {}
        writes: list[tuple[Tensor, Tensor]] = []
        update: Callable[[str, Tensor], list[tuple[Tensor, Tensor]]] | None = None
        clip_norm: float | None = None
        if self.update is not None:
            fine, clip_norm = possible & value.isfinite() & bound.isfinite(), self.update.clip_norm
            update = partial(self.update.written, fine=fine, factors=tensors[-1])

        def take(name: str, gradient: Tensor) -> None:
            squares[name] = gradient.square().sum().double()
            if update is not None and clip_norm is None:
                writes.extend(update(name, gradient))

        # Each gradient is made use of as soon as it is there, because it then lies in the processor's caches.
        hooks = [p.register_hook(partial(take, name)) for name, p in self.trained.items()]
        found = torch.autograd.grad(loss, list(self.trained.values()), allow_unused=True)
        for hook in hooks:
            hook.remove()
        gradients = {name: g for name, g in zip(self.trained, found, strict=True) if g is not None}
        norm = torch.stack([squares[name] for name in gradients]).sum().sqrt()
        if update is not None and clip_norm is not None:
            share = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
            for name, gradient in gradients.items():
                writes.extend(update(name, share.to(gradient.dtype) * gradient))
        with torch.no_grad():
            for old, new in writes:
                old.copy_(new)
        self.given[_shapes(tensors)] = list(gradients)
        numbers = torch.stack([x.double() for x in (possible, value, bound, norm)])
        return (numbers, bounds, *(gradients.values() if update is None else ()))

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
