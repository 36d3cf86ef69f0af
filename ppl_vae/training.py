"""Training any Pyro pair by stochastic variational inference: `fit` and its `History`."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import (
    ELBO,
    JitTrace_ELBO,
    JitTraceEnum_ELBO,
    JitTraceGraph_ELBO,
    JitTraceMeanField_ELBO,
    Trace_ELBO,
)
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.guide import GuideMessenger
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm.auto import tqdm

from ppl_vae import isolation, parameters, scoring
from ppl_vae.batches import Batch, Batches, as_tuple
from ppl_vae.scoring import Program

RECORDED = (JitTrace_ELBO, JitTraceEnum_ELBO, JitTraceGraph_ELBO, JitTraceMeanField_ELBO)


@dataclass
class History:
    """What happened during `fit`, in nats per datum.

    Attributes:
        loss: mean training loss of each epoch, the negative ELBO for `Trace_ELBO`.
        validation: loss on the validation data after each epoch; empty without them.
        stopped: why training ended: "finished", "early stopping" or "interrupted".
        seconds: spent.
    """

    loss: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    stopped: str = "finished"
    seconds: float = 0.0

    def __repr__(self) -> str:
        if not self.loss:
            return f"History({self.stopped} before the first step)"
        text = f"loss {self.loss[-1]:.3f}"
        if self.validation:
            text += f", validation {self.validation[-1]:.3f}"
        return f"History({self.stopped} after {len(self.loss)} epochs, {self.seconds:.0f} s: {text} nats per datum)"


def fit(
    model: Program,
    guide: Program,
    *data: Any,
    objective: ELBO | None = None,
    epochs: int = 20,
    batch_size: int = 128,
    learning_rate: float | Callable[[float], float] = 1e-3,
    validation: Any = None,
    patience: int | None = None,
    clip_norm: float | None = None,
    seed: int | None = 0,
    progress: bool = True,
) -> History:
    """Trains a pair by stochastic gradient descent on a Pyro `ELBO`, with Adam, and returns the history.

    The parameters are those of the two programs where they are modules (or methods of one), and those that
    `pyro.module` and `pyro.param` make known to Pyro. A network that is called but not among them is an error, so
    that nothing is left untrained in silence.

    Args:
        model: p(x, z): a module, a bound method or a function.
        guide: q(z given x), with the same arguments.
        *data: the training data: tensors with one row per datum, or one `Dataset`, or one `DataLoader` (which brings
            its own batches).
        objective: any `pyro.infer.ELBO`; `Trace_ELBO()` by default.
        epochs: passes over the data.
        batch_size: of a step; the last batch of an epoch may be shorter.
        learning_rate: of Adam, a number or a function of the share of training done, from 0 to 1; so
            `lambda t: 1e-3 * 0.1**t` decays from 1e-3 to 1e-4.
        validation: data of the same kind (a tuple where there are several tensors), scored after each epoch.
        patience: stop when validation has not improved for so many epochs, and go back to the best weights.
        clip_norm: the largest norm of the gradient of the loss per datum.
        seed: of batches and samples; None uses the global random state.
        progress: show a bar.

    Returns:
        A `History`, also when interrupted by Ctrl-C: the weights are then those of the last step.

    Raises:
        TypeError: for data of no known kind, or batches with more tensors than the programs take.
        ValueError: for no data, NaN in them, or data outside the likelihood's support (every datum is checked in the
            first epoch).
        RuntimeError: when there is nothing to train, when a network is not registered or hides behind an earlier one
            of the same name in the parameter store, and when loss or gradient are no longer finite. The sentence
            names the parameter, or epoch, batch and site; the weights are the last good ones.

    Example:
        >>> from ppl_vae.vae import VAE
        >>> vae = VAE((3,), latent_dim=2)
        >>> x = torch.eye(3).repeat(20, 1)
        >>> history = fit(vae.model, vae.guide, x, epochs=30, batch_size=10, learning_rate=1e-2, progress=False)
        >>> history.loss[-1] < history.loss[0]
        True
    """
    if patience is not None and validation is None:
        raise ValueError("Early stopping (patience) needs validation data; pass validation=x_valid.")
    for name, number in (("epochs", epochs), ("patience", patience)):
        if number is not None and not (isinstance(number, (int, np.integer)) and number >= 1):
            raise ValueError(f"{name} must be an integer of at least 1; got {number!r}.")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm is the largest norm a gradient may have and must be positive; got {clip_norm!r}.")
    objective = Trace_ELBO() if objective is None else objective
    if not isinstance(objective, ELBO):
        raise TypeError(f"objective must be an instance of a pyro.infer.ELBO, such as Trace_ELBO(); got {objective!r}.")
    batches = Batches(data, batch_size)
    held_out = None if validation is None else Batches(as_tuple(validation), batch_size)
    rate = learning_rate if callable(learning_rate) else lambda _: learning_rate
    history, began = History(), time.perf_counter()
    with isolation.seeded(seed), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered NaN", category=UserWarning)  # said below, with the site
        trained = _Trained(model, guide, objective, batches)
        optimizer = torch.optim.Adam(trained.parameters.values(), lr=rate(0.0), fused=True)
        best, best_state, waited = inf, trained.state(), 0
        quiet = {} if progress else {"disable": True}  # else the environment's TQDM_DISABLE has the say
        bar = tqdm(range(epochs), desc="fit", unit="epoch", **quiet)
        total, count = 0.0, 0
        try:
            for epoch in bar:
                # Pyro's validation finds data outside a likelihood's support; once over the data is enough.
                with pyro.validation_enabled(epoch == 0):
                    for index, batch in enumerate(batches):
                        for group in optimizer.param_groups:
                            group["lr"] = rate((epoch + index / len(batches)) / epochs)
                        loss = trained.step(optimizer, batch, clip_norm, f"epoch {epoch + 1}, batch {index + 1}")
                        total, count = total + loss * len(batch[0]), count + len(batch[0])
                history.loss.append(total / count)
                total, count = 0.0, 0
                parameters.check_store(trained.stored)
                if held_out is None:
                    bar.set_postfix(loss=f"{history.loss[-1]:.3f}")
                    continue
                history.validation.append(trained.evaluate(held_out))
                bar.set_postfix(loss=f"{history.loss[-1]:.3f}", validation=f"{history.validation[-1]:.3f}")
                waited += 1
                if history.validation[-1] < best:
                    best, waited = history.validation[-1], 0
                    best_state = trained.state() if patience else best_state
                if waited == patience:
                    history.stopped = "early stopping"
                    break
            if patience:
                trained.restore(best_state)
        except KeyboardInterrupt:
            history.stopped = "interrupted"
            if count:
                history.loss.append(total / count)
        finally:
            bar.close()
            optimizer.zero_grad()
    history.seconds = time.perf_counter() - began
    return history


class _Trained:
    """A pair and an objective, with every parameter that a step changes."""

    def __init__(self, model: Program, guide: Program, objective: Any, batches: Batches) -> None:
        self.model, self.guide, self.objective = model, guide, objective
        self.first = True
        batch = next(batches.ordered())
        _check_arguments(model, batch)
        self.parameters, self.called, sites = parameters.find(model, guide, batch)
        self.stored = set(pyro.get_param_store().keys())
        self.last_good = self.state()
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
        self.recorded_size = len(batch[0]) if isinstance(objective, RECORDED) else None

    def per_datum(self, loss: Any, batch: Batch) -> Any:
        if self.recorded_size not in (None, len(batch[0])):
            raise ValueError(
                f"{type(self.objective).__name__} records the program for the first batch, of {self.recorded_size} "
                f"data, and gives a wrong loss for a batch of {len(batch[0])}. Take a batch_size that divides "
                "the number of data, or another objective."
            )
        return loss / (self.num_data or len(batch[0]))

    def step(self, optimizer: torch.optim.Optimizer, batch: Batch, clip_norm: float | None, where: str) -> float:
        """One step of the optimiser on one batch: the loss per datum before it."""
        state = torch.get_rng_state()
        optimizer.zero_grad()
        try:
            loss = self._backward(batch)
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
        self.last_good = self.state()
        optimizer.step()
        return loss

    def _backward(self, batch: Batch) -> float:
        """Adds the gradient of the loss per datum to the parameters; the loss."""
        if hasattr(self.objective, "differentiable_loss"):
            loss = self.per_datum(self.objective.differentiable_loss(self.model, self.guide, *batch), batch)
            if not torch.is_tensor(loss) or not loss.requires_grad:
                return float(loss)
            if self.first:
                parameters.check_graph(loss, self.parameters)
            loss.backward()
            return loss.item()
        loss = self.objective.loss_and_grads(self.model, self.guide, *batch)
        if isinstance(loss, tuple):
            raise TypeError(
                f"{type(self.objective).__name__} has a loss for each program, which one optimiser cannot lower "
                "together. Train with pyro.infer.SVI."
            )
        for p in self.parameters.values():
            if p.grad is not None:
                p.grad = self.per_datum(p.grad, batch)
        return float(self.per_datum(loss, batch))

    def evaluate(self, batches: Batches) -> float:
        """The loss per datum over all batches, with the same random numbers every time."""
        total, count = 0.0, 0
        with isolation.evaluation(self.model, self.guide, seed=0):
            for batch in batches.ordered():
                try:
                    loss = float(self.per_datum(self.objective.loss(self.model, self.guide, *batch), batch))
                except ValueError as error:
                    raise ValueError(f"In the validation data: {_said(error)}") from error
                total, count = total + loss * len(batch[0]), count + len(batch[0])
        return total / count

    def _tensors(self) -> list[Tensor]:
        """Every parameter and buffer; buffers by way of their modules, which may replace them."""
        buffers = {id(b): b for module in self.called for b in module.buffers(recurse=False)}
        return [*self.parameters.values(), *buffers.values()]

    def state(self) -> list[Tensor]:
        """A copy of every parameter and buffer."""
        return [t.detach().clone() for t in self._tensors()]

    def restore(self, state: list[Tensor]) -> None:
        with torch.no_grad():
            for tensor, value in zip(self._tensors(), state, strict=True):
                tensor.copy_(value)

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
