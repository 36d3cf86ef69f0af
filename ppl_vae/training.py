"""Training any Pyro pair by stochastic variational inference: `fit` and its `History`."""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Any

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
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.data import DataLoader, Dataset, TensorDataset
from tqdm.auto import tqdm

from ppl_vae import isolation, parameters, scoring
from ppl_vae.scoring import Program

Batch = tuple[Any, ...]
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
    if not isinstance(epochs, int) or epochs < 1:
        raise ValueError(f"epochs must be an integer of at least 1; got {epochs!r}.")
    batches = _Batches(data, batch_size)
    held_out = None if validation is None else _Batches(_as_tuple(validation), batch_size)
    rate = learning_rate if callable(learning_rate) else lambda _: learning_rate
    history, began = History(), time.perf_counter()
    with isolation.seeded(seed), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered NaN", category=UserWarning)  # said below, with the site
        trained = _Trained(model, guide, Trace_ELBO() if objective is None else objective, next(batches.ordered()))
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

    def __init__(self, model: Program, guide: Program, objective: Any, batch: Batch) -> None:
        self.model, self.guide, self.objective = model, guide, objective
        self.first = True
        _check_arguments(model, batch)
        self.parameters, called, sites = parameters.find(model, guide, batch)
        self.buffers = list({id(b): b for module in called for b in module.buffers()}.values())
        frame = scoring.data_plate(sites, len(batch[0]))
        # With plate(N, subsample_size=B) the loss of a batch is an estimate for all N data.
        subsampled = frame is not None and frame.full_size not in (None, frame.size)
        self.num_data = frame.full_size if subsampled else None
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
            raise ValueError(f"In {where}: {error.__cause__ or error}") from error
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        if self.first:
            parameters.check_gradients(self.parameters, gradients, self.objective)
            self.first = False
        norm = get_total_norm(gradients.values())
        if not (isfinite(loss) and norm.isfinite()):
            self._raise_if_not_finite(batch, state, where)
            bad = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
            what = f"The gradient of {bad[0]}" if isfinite(loss) and bad else "The loss"
            raise RuntimeError(f"{what} is no longer finite in {where}. {_REMEDY}")
        if clip_norm is not None:
            clip_grads_with_norm_(self.parameters.values(), clip_norm, norm)
        optimizer.step()
        return loss

    def _backward(self, batch: Batch) -> float:
        """Adds the gradient of the loss per datum to the parameters; the loss."""
        if hasattr(self.objective, "differentiable_loss"):
            loss = self.per_datum(self.objective.differentiable_loss(self.model, self.guide, *batch), batch)
            if not torch.is_tensor(loss) or not loss.requires_grad:
                return float(loss)
            loss.backward()
            return loss.item()
        loss = self.objective.loss_and_grads(self.model, self.guide, *batch)
        for p in self.parameters.values():
            if p.grad is not None:
                p.grad = self.per_datum(p.grad, batch)
        return float(self.per_datum(loss, batch))

    def evaluate(self, batches: _Batches) -> float:
        """The loss per datum over all batches, with the same random numbers every time."""
        with isolation.evaluation(seed=0):
            batch_losses = [
                (self.per_datum(self.objective.loss(self.model, self.guide, *b), b), len(b[0]))
                for b in batches.ordered()
            ]
        return float(sum(loss * size for loss, size in batch_losses) / sum(size for _, size in batch_losses))

    def state(self) -> list[Tensor]:
        """A copy of every parameter and buffer."""
        return [t.detach().clone() for t in (*self.parameters.values(), *self.buffers)]

    def restore(self, state: list[Tensor]) -> None:
        with torch.no_grad():
            for tensor, value in zip((*self.parameters.values(), *self.buffers), state, strict=True):
                tensor.copy_(value)

    def _raise_if_not_finite(self, batch: Batch, state: Tensor, where: str) -> None:
        """Runs the pair again with the same random numbers, and names the first site that is not finite."""
        torch.set_rng_state(state)
        with isolation.evaluation(), pyro.validation_enabled(False):
            guide_trace = poutine.trace(self.guide).get_trace(*batch)
            model_trace = poutine.trace(poutine.replay(self.model, trace=guide_trace)).get_trace(*batch)
            for program, trace in (("guide", guide_trace), ("model", model_trace)):
                for name, site in scoring.scored_sites(trace).items():
                    log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
                    if not (torch.isfinite(site["value"]).all() and torch.isfinite(log_prob).all()):
                        raise RuntimeError(
                            f"The loss is no longer finite in {where}: site '{name}' of the {program} has values or "
                            f"log-probabilities that are NaN or infinite. {_REMEDY}"
                        )


_REMEDY = (
    "The weights are those before this step. Lower the learning rate, clip the gradient (clip_norm=10.0, say), or put "
    "a floor under the scales."
)


class _Batches:
    """Batches as tuples of arguments, in random order when iterated, in their own order from `ordered`."""

    def __init__(self, data: tuple[Any, ...], batch_size: int) -> None:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be an integer of at least 1; got {batch_size!r}.")
        self.source = data[0] if len(data) == 1 else None
        if isinstance(self.source, DataLoader):
            self.num_data, self.size = len(self.source) * (self.source.batch_size or 1), self.source.batch_size or 1
        elif isinstance(self.source, Dataset):
            self.num_data, self.size = len(self.source), batch_size  # type: ignore[arg-type]
        else:
            self.source = None
            self.data, self.num_data, self.size = data, scoring.check_data(*data), batch_size
        if self.num_data == 0:
            raise ValueError(f"There are no data: the {type(self.source).__name__} is empty.")

    def __len__(self) -> int:
        return len(self.source) if isinstance(self.source, DataLoader) else -(-self.num_data // self.size)

    def __iter__(self) -> Iterator[Batch]:
        return self._over(torch.randperm)

    def ordered(self) -> Iterator[Batch]:
        return self._over(torch.arange)

    def _over(self, order: Callable[[int], Tensor]) -> Iterator[Batch]:
        if isinstance(self.source, DataLoader):
            yield from map(_as_tuple, self.source)
            return
        # All the data in one batch keep their order: an autoguide has a parameter for each datum, in that order.
        indices = order(self.num_data) if self.num_data > self.size else torch.arange(self.num_data)
        for index in indices.split(self.size):
            if isinstance(self.source, TensorDataset):
                yield _as_tuple(self.source[index])
            elif self.source is not None:
                yield _as_tuple(torch.utils.data.default_collate([self.source[i] for i in index.tolist()]))
            else:
                yield scoring.rows(self.data, index)


def _as_tuple(batch: Any) -> Batch:
    return tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)


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
