"""One step of a pair and an objective, and the weights to go back to when its loss or gradient is not finite."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from math import isfinite
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import JitTrace_ELBO, JitTraceEnum_ELBO, JitTraceGraph_ELBO, JitTraceMeanField_ELBO
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.guide import GuideMessenger
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ppl_vae import isolation, parameters, scoring
from ppl_vae.batches import Batch, Batches
from ppl_vae.objectives import Objective
from ppl_vae.scoring import Program

RECORDED = (JitTrace_ELBO, JitTraceEnum_ELBO, JitTraceGraph_ELBO, JitTraceMeanField_ELBO)


class Trained:
    """A pair and an objective, with every parameter that a step changes."""

    def __init__(self, model: Program, guide: Program, objective: Any, batches: Batches) -> None:
        self.model, self.guide, self.objective = model, guide, objective
        self.first = True
        batch = next(batches.ordered())
        _check_arguments(model, batch)
        self.parameters, self.called, sites = parameters.find(model, guide, batch)
        self.stored = set(pyro.get_param_store().keys())
        self.last_good = self.copy()
        # With plate(N, subsample_size=B) the loss of a batch is an estimate for all N data.
        names = scoring.data_plates(sites, len(batch[0]))
        frames = {f for site in sites.values() for f in site["cond_indep_stack"] if f.name in names}
        self.num_data = max((f.full_size for f in frames if f.full_size not in (None, f.size)), default=None)
        if isinstance(guide, (AutoGuide, GuideMessenger)) and len(batches) > 1 and self.num_data is None:
            inside = [n for n, s in sites.items() if not s["is_observed"] and frames & set(s["cond_indep_stack"])]
            if inside:
                raise ValueError(
                    f"{type(guide).__name__} has a parameter of '{inside[0]}' for each datum of a batch, and there are "
                    f"{len(batches)} batches. Train on all the data at once, with batch_size=len(x), or write a guide "
                    "with an encoder."
                )
        shared = [n for n, s in sites.items() if not s["is_observed"] and frames.isdisjoint(s["cond_indep_stack"])]
        if frames and shared and len(batches) > 1 and self.num_data is None:
            raise ValueError(
                f"All data share the latent '{shared[0]}', and each of {len(batches)} batches would count its prior in "
                "full. Train on all the data at once, with batch_size=len(x), or say how many there are: "
                f'`pyro.plate("{next(iter(names))}", N, subsample_size=len(x))`.'
            )
        self.recorded_size = len(batch[0]) if isinstance(objective, RECORDED) else None

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

    def step(self, optimizer: torch.optim.Optimizer, batch: Batch, clip_norm: float | None, where: str) -> Tensor:
        """One step of the optimiser on one batch: the loss and the bound per datum before it."""
        state = torch.get_rng_state()
        optimizer.zero_grad()
        try:
            loss, bound = self._backward(batch)
        except ValueError as error:
            # With validation on, NaN parameters are refused by the distributions before a loss comes of them.
            self._raise_if_not_finite(batch, state, where)
            raise ValueError(f"In {where}: {_said(error)}") from error
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        if self.first:
            parameters.check_gradients(self.parameters, gradients, self.objective)
            self.first = False
        norm = get_total_norm(gradients.values())
        if not (isfinite(loss) and norm.isfinite()):
            self._raise_if_not_finite(batch, state, where)
            self.restore(self.last_good)
            bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
            what = f"The gradient of {bad[0]}" if isfinite(loss) and bad else "The loss"
            raise RuntimeError(f"{what} is no longer finite in {where}. {_REMEDY}")
        if clip_norm is not None:
            clip_grads_with_norm_(self.parameters.values(), clip_norm, norm)
        self._keep()
        optimizer.step()
        return torch.tensor([loss, bound], dtype=torch.float64)

    def warm_up(self, batches: Batches) -> None:
        """Lets the objective do what it does in its first step only, such as counting plates or recording the pair.

        That moves random numbers, which a run that goes on must find where they were.
        """
        with pyro.validation_enabled(False):  # what it finds is said in the first step
            self._backward(next(batches.ordered()))
        for parameter in self.parameters.values():
            parameter.grad = None

    def _backward(self, batch: Batch) -> tuple[float, float]:
        """Adds the gradient of the loss per datum to the parameters; the loss, and the bound."""
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
        total, count = 0.0, 0
        with isolation.evaluation(self.model, self.guide, seed=0):
            for batch in batches.ordered():
                try:
                    loss = self._minus_bound(batch)
                except ValueError as error:
                    raise ValueError(f"In the validation data: {_said(error)}") from error
                total, count = total + loss * len(batch[0]), count + len(batch[0])
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

    def _keep(self) -> None:
        """Makes the state before a step the last good one: parameters into the same memory, which is faster."""
        for name, parameter in self.parameters.items():
            self.last_good[name].copy_(parameter.detach())
        for name, buffer in self.buffers().items():
            self.last_good[name] = buffer.clone()

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
