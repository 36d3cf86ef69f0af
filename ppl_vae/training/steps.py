"""One step of a pair and an objective, and the weights to go back to when its loss or gradient is not finite."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from math import isfinite
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.guide import GuideMessenger
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ppl_vae import isolation, parameters, precision, processes, scoring
from ppl_vae.batches import Batch, Batches
from ppl_vae.objectives import Objective, Terms
from ppl_vae.scoring import Program
from ppl_vae.training import sharing
from ppl_vae.training.adam import Update, can_be_updated
from ppl_vae.training.graphs import Graph, Step
from ppl_vae.training.sharing import RECORDED, Sums

# Steps after which the weights are copied, in case the loss is not finite soon after: a copy costs a twentieth of one.
KEPT_EVERY = 8


class Trained:
    """A pair and an objective, with every parameter that a step changes."""

    def __init__(
        self,
        model: Program,
        guide: Program,
        objective: Any,
        batches: Batches,
        *,
        learning_rate: float = 1e-3,
        eps: float = 1e-8,
        clip_norm: float | None = None,
        compile: bool = False,
    ) -> None:
        self.model, self.guide, self.objective, self.clip_norm = model, guide, objective, clip_norm
        self.first = True
        batch = next(batches.ordered())
        _check_arguments(model, batch)
        with precision.Digits() as digits:
            self.parameters, self.called, sites = parameters.find(model, guide, batch)
        self.rounded_to = digits.rounded_to
        self.stored = set(pyro.get_param_store().keys())
        sharing.synchronise(self.parameters | self.buffers() | self.frozen())
        self.optimizer = torch.optim.Adam(self.parameters.values(), learning_rate, eps=eps, fused=True)
        self.last_good, self.spare = self.copy(), self.copy()
        # With plate(N, subsample_size=B) the loss of a batch is an estimate for all N data.
        names = scoring.data_plates(sites, len(batch[0]))
        frames = {f for site in sites.values() for f in site["cond_indep_stack"] if f.name in names}
        self.num_data = max((f.full_size for f in frames if f.full_size not in (None, f.size)), default=None)
        parts = len(batches) * processes.world_size()
        if isinstance(guide, (AutoGuide, GuideMessenger)) and parts > 1 and self.num_data is None:
            inside = [n for n, s in sites.items() if not s["is_observed"] and frames & set(s["cond_indep_stack"])]
            if inside:
                raise ValueError(
                    f"{type(guide).__name__} has a parameter of '{inside[0]}' for each datum of a batch, and there are "
                    f"{parts} batches, or shares of them. Train on all the data at once, with batch_size=len(x) and in "
                    "one process, or write a guide with an encoder."
                )
        shared = [n for n, s in sites.items() if not s["is_observed"] and frames.isdisjoint(s["cond_indep_stack"])]
        if frames and shared and len(batches) > 1 and self.num_data is None:
            raise ValueError(
                f"All data share the latent '{shared[0]}', and each of {len(batches)} batches would count its prior in "
                "full. Train on all the data at once, with batch_size=len(x), or say how many there are: "
                f'`pyro.plate("{next(iter(names))}", N, subsample_size=len(x))`.'
            )
        self.plates = set(names)
        self.has_globals = any(not frames & set(site["cond_indep_stack"]) for site in sites.values())
        if processes.world_size() > 1:
            sharing.check(model, guide, objective, batch, self.plates)
        self.recorded_size = len(batch[0]) if isinstance(objective, RECORDED) else None
        # What several processes have to add up is updated outside of the graph.
        alone = processes.world_size() == 1 and can_be_updated(self.parameters)
        update = Update(self.optimizer, self.parameters, clip_norm) if alone else None
        self.graph = Graph(model, guide, objective, self.parameters, self.per_datum, update) if compile else None
        if self.graph is not None and parts > len(batches) and self.has_globals and self.num_data is None:
            self.graph.compiled.give_up("what all data have in common is shared out anew in every step")
        self.steps = 0
        self.norm: float | None = None

    def set_progress(self, share: float) -> None:
        """Tells an objective with a schedule the share of training done."""
        if isinstance(self.objective, Objective):
            self.objective.progress = share

    def per_datum(self, loss: Any, batch: Batch) -> Any:
        if self.recorded_size not in (None, len(batch[0])):
            raise ValueError(
                f"{type(self.objective).__name__} records the program for the first batch, of {self.recorded_size} "
                f"data, and gives a wrong loss for a batch of {len(batch[0])}. Take a batch_size that divides "
                "the number of data, or another objective."
            )
        return loss / (self.num_data or len(batch[0]))

    def set_learning_rate(self, rate: float) -> None:
        """That of the steps from now on."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def step(self, batch: Batch, where: str) -> Sums:
        """One step of the optimiser on one batch: the loss and the bound per datum before it, and 1, each times the
        number of data.

        Of several processes each has a share of the batch, and all do the step of one process on the whole batch.
        """
        if (step := self._updated(batch)) is not None:
            return step.loss * len(batch[0]), step.bound * len(batch[0]), len(batch[0])
        state = torch.get_rng_state()
        self.optimizer.zero_grad()
        counted_once = self._counted_once(batch)

        def differentiate() -> Sums:
            try:
                with counted_once:
                    loss, bound = self._backward(batch)
            except ValueError as error:
                # With validation on, NaN parameters are refused by the distributions before a loss comes of them.
                self._raise_if_not_finite(batch, state, where)
                raise ValueError(f"In {where}: {_said(error)}") from error
            if processes.world_size() > 1:  # said where it happens; its sum with others is not finite either
                self._finite_norm(loss, batch, state, where)
            return loss * len(batch[0]), bound * len(batch[0]), len(batch[0])

        try:
            terms = sharing.summed(differentiate, self.parameters, len(batch[0]))
        except processes.FailedElsewhere:
            self.restore(self.last_good)
            raise
        if self.first:
            parameters.check_gradients(self.parameters, self._gradients(), self.objective)
            self.first = False
        norm = self._finite_norm(terms[0], batch, state, where)
        if self.clip_norm is not None:
            clip_grads_with_norm_(self.parameters.values(), self.clip_norm, torch.as_tensor(norm))
        if self.steps % KEPT_EVERY == 0:
            self._keep()
            self._make_good()
        self.steps += 1
        self.optimizer.step()
        return terms

    def _updated(self, batch: Batch) -> Step | None:
        """The step in the graph, if there is one that updates the parameters too, and if all is finite."""
        if self.graph is None or self.graph.update is None:
            return None
        if self.steps % KEPT_EVERY == 0:
            self._keep()
        step = self.graph(batch)
        if step is not None:
            if self.steps % KEPT_EVERY == 0:
                self._make_good()
            self.steps += 1
        return step

    def _counted_once(self, batch: Batch) -> AbstractContextManager[Any]:
        """What all data have in common counts once in all processes; with a subsampled plate it does so anyway."""
        if self.has_globals and self.num_data is None:
            return sharing.counted_once(self.plates, len(batch[0]))
        return nullcontext()

    def _gradients(self) -> parameters.Parameters:
        return {name: p.grad for name, p in self.parameters.items() if p.grad is not None}

    def _finite_norm(self, loss: float, batch: Batch, state: Tensor, where: str) -> float:
        """The norm of the gradient; when it or the loss is not finite, back to the last good weights and an error."""
        gradients = self._gradients()
        norm = get_total_norm(gradients.values()).item() if self.norm is None else self.norm
        if not (isfinite(loss) and isfinite(norm)):
            self._raise_if_not_finite(batch, state, where)
            self.restore(self.last_good)
            bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
            what = f"The gradient of {bad[0]}" if isfinite(loss) and bad else "The loss"
            raise RuntimeError(f"{what} is no longer finite in {where}. {_REMEDY}")
        return norm

    def warm_up(self, batches: Batches) -> None:
        """Lets the objective do what it does in its first step only, such as counting plates or recording the pair.

        That moves random numbers, which a run that goes on must find where they were.
        """
        batch = next(batches.ordered())
        if self.graph is not None and self.graph.update is not None:
            self.graph.is_first(batch)
        with pyro.validation_enabled(False):  # what it finds is said in the first step
            self._backward(batch)
        for parameter in self.parameters.values():
            parameter.grad = None

    def _backward(self, batch: Batch) -> tuple[float, float]:
        """Adds the gradient of the loss per datum to the parameters; the loss, and the bound."""
        step = self.graph(batch) if self.graph is not None and self.graph.update is None else None
        # What several processes have added up has another norm than each share.
        self.norm = None if step is None or processes.world_size() > 1 else step.norm
        return self._backward_eagerly(batch) if step is None else self._take(step)

    def _take(self, step: Step) -> tuple[float, float]:
        for name, gradient in step.gradients.items():
            parameter = self.parameters[name]
            # Adam, fused, takes for granted that both lie in memory in the same order, as autograd sees to.
            same = gradient.stride() == parameter.stride()
            parameter.grad = gradient if same else torch.empty_like(parameter).copy_(gradient)
        if isinstance(self.objective, Objective) and not isfinite(step.bound):
            self.objective.check(Terms(torch.tensor(step.loss), step.bounds))
        return step.loss, step.bound

    def _backward_eagerly(self, batch: Batch) -> tuple[float, float]:
        if isinstance(self.objective, Objective):
            loss, bound = self.objective.terms(self.model, self.guide, *batch)
            return self._differentiate(self.per_datum(loss, batch)), bound.mean().item()
        if hasattr(self.objective, "differentiable_loss"):
            loss = self.objective.differentiable_loss(self.model, self.guide, *batch)
            value = self._differentiate(self.per_datum(loss, batch))
            return value, -value
        loss = self.objective.loss_and_grads(self.model, self.guide, *batch)
        if isinstance(loss, tuple):
            raise TypeError(
                f"{type(self.objective).__name__} has a loss for each program, which one optimiser cannot lower "
                "together. Train with pyro.infer.SVI."
            )
        for p in self.parameters.values():
            if p.grad is not None:
                p.grad = self.per_datum(p.grad, batch)
        value = float(self.per_datum(loss, batch))
        return value, -value

    def _differentiate(self, loss: Any) -> float:
        """Adds the gradient of a loss to the parameters; the loss as a number."""
        if not torch.is_tensor(loss) or not loss.requires_grad:
            return float(loss)
        if self.first:
            parameters.check_graph(loss, self.parameters)
        loss.backward()
        return loss.item()

    def evaluate(self, batches: Batches) -> float:
        """Minus the bound per datum over all batches, with the same random numbers every time."""
        with (
            isolation.evaluation(self.model, self.guide, seed=0),
            processes.summing(2, len(batches) * processes.world_size()) as sums,
        ):
            for number, batch in batches.dealt():
                torch.manual_seed(number)  # so that it does not matter who evaluates the batches before
                try:
                    loss = self._minus_bound(batch)
                except ValueError as error:
                    raise ValueError(f"In the validation data: {_said(error)}") from error
                sums[:, number] = torch.tensor([loss, 1.0], dtype=torch.float64) * len(batch[0])
        total, count = sums.sum(1).tolist()
        return total / count

    def _minus_bound(self, batch: Batch) -> float:
        if isinstance(self.objective, Objective):
            return -float(self.objective.terms(self.model, self.guide, *batch).bound.mean())
        return float(self.per_datum(self.objective.loss(self.model, self.guide, *batch), batch))

    def buffers(self) -> dict[str, Tensor]:
        """The buffers of the modules that run; by way of the modules, which may replace them."""
        return self._of_modules(lambda module: module.named_buffers(recurse=False))

    def frozen(self) -> dict[str, Tensor]:
        """The parameters of the modules that run which are not trained."""
        trained = {id(p) for p in self.parameters.values()}
        found = self._of_modules(lambda module: module.named_parameters(recurse=False))
        return {name: parameter for name, parameter in found.items() if id(parameter) not in trained}

    def _of_modules(self, named: Callable[[nn.Module], Iterable[tuple[str, Tensor]]]) -> dict[str, Tensor]:
        """Tensors by the place of their module in the order of running: in a function it has no other name."""
        return {
            f"{place} {type(module).__name__}.{name}": tensor
            for place, module in enumerate(self.called)
            for name, tensor in named(module)
        }

    def copy(self) -> dict[str, Tensor]:
        """The values of all that a step changes, parameters and buffers."""
        return {name: tensor.detach().clone() for name, tensor in (self.parameters | self.buffers()).items()}

    def restore(self, values: dict[str, Tensor]) -> None:
        """Goes back to a `copy`."""
        with torch.no_grad():
            for name, tensor in (self.parameters | self.buffers()).items():
                tensor.copy_(values[name])

    def synchronise_buffers(self) -> None:
        """Gives every process the buffers of the first, such as the statistics of a BatchNorm."""
        if buffers := self.buffers():
            sharing.synchronise(buffers)

    def _keep(self) -> None:
        """Copies the state before a step, of which it is not known yet whether it is good."""
        # Parameters into the same memory, which is faster.
        kept = [self.spare[name] for name in self.parameters]
        torch._foreach_copy_(kept, [p.detach() for p in self.parameters.values()])
        for name, buffer in self.buffers().items():
            self.spare[name] = buffer.clone()

    def _make_good(self) -> None:
        """Makes what was kept the state to go back to."""
        self.last_good, self.spare = self.spare, self.last_good

    def _raise_if_not_finite(self, batch: Batch, state: Tensor, where: str) -> None:
        """Runs the pair again with the same random numbers, and names the first site that is not finite."""
        if not all(torch.isfinite(a).all() for a in batch if torch.is_tensor(a)):
            raise ValueError(f"In {where} the data hold NaN or infinite values. Fill missing values first.")
        torch.set_rng_state(state)
        with isolation.evaluation(self.model, self.guide), pyro.validation_enabled(False):
            guide_trace = poutine.trace(self.guide).get_trace(*batch)
            model_trace = poutine.trace(poutine.replay(self.model, trace=guide_trace)).get_trace(*batch)
            for program, trace in (("guide", guide_trace), ("model", model_trace)):
                for name, site in scoring.scored_sites(trace).items():
                    log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
                    if not (torch.isfinite(site["value"]).all() and torch.isfinite(log_prob).all()):
                        self.restore(self.last_good)
                        raise RuntimeError(
                            f"The loss is no longer finite in {where}: site '{name}' of the {program} has values or "
                            f"log-probabilities that are NaN or infinite. {_REMEDY}"
                        )


def _said(error: ValueError) -> str:
    """What a distribution said, without the trace of shapes that Pyro adds to it."""
    return str(error.__cause__ or error).split("\nTrace Shapes")[0]


_REMEDY = (
    "The weights are those of the last step whose loss was finite. Lower the learning rate, clip the gradient "
    "(clip_norm=10.0, say), or put a floor under the scales."
)


def _check_arguments(model: Program, batch: Batch) -> None:
    if not torch.is_tensor(batch[0]):
        raise TypeError(f"A batch must be a tensor or a tuple of tensors; got {type(batch[0]).__name__}.")
    signature = inspect.signature(getattr(model, "forward", model))
    try:
        signature.bind(*batch)
    except TypeError as error:
        raise TypeError(
            f"The data give {len(batch)} arguments, which model{signature} does not take ({error}). Give the data it "
            "takes; of a data set with labels, only the images."
        ) from None
