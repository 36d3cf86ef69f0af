"""`fit`: the loop over epochs and batches."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from math import inf
from typing import Any

import numpy as np
import pyro
from pyro.infer import ELBO, Trace_ELBO
from tqdm.auto import tqdm

from ppl_vae import isolation, parameters, precision, processes
from ppl_vae.batches import Batches, as_tuple
from ppl_vae.objectives import Objective
from ppl_vae.scoring import Program
from ppl_vae.training.checkpoints import Checkpoint, Run
from ppl_vae.training.history import History
from ppl_vae.training.steps import Trained


def fit(
    model: Program,
    guide: Program,
    *data: Any,
    objective: ELBO | None = None,
    epochs: int = 20,
    batch_size: int = 128,
    learning_rate: float | Callable[[float], float] = 1e-3,
    eps: float = 1e-8,
    validation: Any = None,
    patience: int | None = None,
    clip_norm: float | None = None,
    time_limit: float | None = None,
    compile: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    seed: int | None = 0,
    progress: bool = True,
) -> History:
    """Trains a pair by stochastic gradient descent on a Pyro `ELBO`, with Adam, and returns the history.

    The parameters are those of the two programs where they are modules (or methods of one), and those that
    `pyro.module` and `pyro.param` make known to Pyro. A network that is called but not among them is an error, so
    that nothing is left untrained in silence.

    Several processes (see `processes`) train together as one would. All begin with the parameters of the first, and
    keep the same ones. Each has a share of every batch and draws its own noise, and they take the step of their joint
    gradient: that of one process on the whole batch, for every objective that is a sum over the data and over what
    these have in common. For others, as `FreeBits` and Pyro's `RenyiELBO`, and for a `BatchNorm`, each share is a batch
    of its own; running statistics are those of the first process. It alone writes the checkpoint and shows the bar.

    Inside `torch.autocast` products of matrices are rounded as it says, of weights that stay as they are and are
    rounded anew in each step; the history says so, in `rounded_to`.

    Args:
        model: p(x, z): a module, a bound method or a function.
        guide: q(z given x), with the same arguments.
        *data: the training data: tensors with one row per datum, or one `Dataset`, or one `DataLoader` (which brings
            its own batches).
        objective: any `pyro.infer.ELBO`, of Pyro or of `ppl_vae.objectives`; `Trace_ELBO()` by default. A schedule
            in it, such as of a KL warm-up, follows the share of training done.
        epochs: passes over the data.
        batch_size: of a step, in all processes together; the last batch of an epoch may be shorter.
        learning_rate: of Adam, a number or a function of the share of training done, from 0 to 1; so
            `lambda t: 1e-3 * 0.1**t` decays from 1e-3 to 1e-4.
        eps: of Adam, for the gradient of the loss per datum.
        validation: data of the same kind (a tuple where there are several tensors), scored after each epoch.
        patience: stop when validation has not improved for so many epochs, and go back to the best weights.
        clip_norm: the largest norm of the gradient of the loss per datum.
        time_limit: seconds, those before a resumption among them, after which no epoch begins but the first.
        compile: record the training step of this pair to one graph and compile it, which takes some seconds at first.
            The loss is that of an eager run with the same seed, to rounding. What cannot be compiled runs eagerly,
            with a warning that says why; but what a program would do only later, as `if step > 1000`, cannot be seen
            when it is recorded. It needs a C++ compiler.
        checkpoint: a folder, for a file from which the run can go on as if it had never stopped. It is written after
            an epoch, at most every ten seconds, and when training ends for whatever reason; a kill leaves the earlier
            one whole. An epoch cut short is begun again.
        resume: go on from the checkpoint; begin where there is none yet. On a CPU the end is the same to the last bit
            (of random numbers, those of torch's own generator are kept), if there are as many processes as before.
            `epochs` may be raised; a learning rate that depends on the share of training done is then that of a run of
            so many epochs, so it may go up again.
        seed: of batches and samples; None uses the global random state.
        progress: show a bar.

    Returns:
        A `History`, also when interrupted by Ctrl-C: the weights are then those of the last step. When resumed, of
        the whole run.

    Raises:
        TypeError: for data of no known kind, or batches with more tensors than the programs take.
        ValueError: for no data, NaN in them, or data outside the likelihood's support (every datum is checked in the
            first epoch); for a latent that all data share in more than one batch, unless the plate over the data says
            how many there are (`subsample_size`); for a checkpoint that is corrupt, of another pair, or of a run with
            other settings; of several processes, for a pair without a plate over the data, or whose plate does not
            follow their number.
        FileExistsError: when there is a checkpoint in the folder and `resume` is False.
        RuntimeError: when there is nothing to train, when a network is not registered or hides behind an earlier one
            of the same name in the parameter store, and when loss or gradient are no longer finite. The sentence
            names the parameter, or epoch, batch and site; the weights are those of one of the last few steps whose loss
            was finite.
        FailedElsewhere: when another process has failed, which says why.

    Example:
        >>> import torch
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
    if time_limit is not None and not time_limit > 0:
        raise ValueError(f"time_limit is in seconds and must be positive; got {time_limit!r}.")
    objective = Trace_ELBO() if objective is None else objective
    if not isinstance(objective, ELBO):
        raise TypeError(f"objective must be an instance of a pyro.infer.ELBO, such as Trace_ELBO(); got {objective!r}.")
    batches = Batches(data, batch_size)
    held_out = None if validation is None else Batches(as_tuple(validation), batch_size)
    rate = learning_rate if callable(learning_rate) else lambda _: learning_rate
    settings = {
        "objective": repr(objective) if isinstance(objective, Objective) else _described(objective),
        "data": batches.num_data,
        "batch_size": batches.size,
        "validation data": held_out.num_data if held_out else None,
        "patience": patience,
        "seed": seed,
    }
    kept = processes.from_first(lambda: Checkpoint(checkpoint, settings, resume=resume))
    if kept.epochs > epochs:
        raise ValueError(f"{kept} has {kept.epochs} epochs behind it, more than epochs={epochs}. Raise epochs.")
    with (
        isolation.seeded(seed),
        precision.fast_and_exact(),
        warnings.catch_warnings(),
        processes.interrupted_together(),
    ):
        warnings.filterwarnings("ignore", message="Encountered NaN", category=UserWarning)  # said below, with the site
        adam: dict[str, Any] = {"learning_rate": rate(0.0), "eps": eps, "clip_norm": clip_norm}
        trained = Trained(model, guide, objective, batches, **adam, compile=compile)
        run = Run(trained)
        trained.set_progress(kept.epochs / epochs)
        kept.restore(run, batches)
        history, start = run.history, kept.epochs
        history.rounded_to = trained.rounded_to or history.rounded_to
        began, limit = time.perf_counter() - history.seconds, inf if time_limit is None else time_limit
        # Without a word here the environment's TQDM_DISABLE has the say.
        quiet = {} if progress and processes.is_first() else {"disable": True}
        left = range(start, epochs) if history.stopped != "early stopping" else ()
        bar = tqdm(left, desc="fit", unit="epoch", initial=start, total=epochs, **quiet)
        sums = (0.0, 0.0, 0.0)
        try:
            for epoch in bar:
                if epoch > 0 and processes.from_first(lambda: time.perf_counter() - began >= limit):
                    history.stopped = "time limit"
                    break
                processes.part_ways()
                # Pyro's validation finds data outside a likelihood's support; once over the data is enough.
                with pyro.validation_enabled(epoch == start):
                    for index, batch in enumerate(batches):
                        share = (epoch + index / len(batches)) / epochs
                        trained.set_progress(share)
                        trained.set_learning_rate(rate(share))
                        step = trained.step(batch, f"epoch {epoch + 1}, batch {index + 1}")
                        sums = sums[0] + step[0], sums[1] + step[1], sums[2] + step[2]
                history.add(sums[0] / sums[2], sums[1] / sums[2])
                sums = (0.0, 0.0, 0.0)
                trained.synchronise_buffers()
                parameters.check_store(trained.stored)
                shown = {"loss": f"{history.loss[-1]:.3f}"}
                if held_out is not None:
                    history.validation.append(trained.evaluate(held_out))
                    shown["validation"] = f"{history.validation[-1]:.3f}"
                    if patience and run.no_better_for(patience):
                        history.stopped = "early stopping"
                bar.set_postfix(shown)
                history.seconds = time.perf_counter() - began
                kept.keep(run)
                if history.stopped == "early stopping":
                    break
            if run.best:
                trained.restore(run.best)
        except KeyboardInterrupt:
            history.stopped = "interrupted"
            trained.synchronise_buffers()
            if sums[2]:
                history.add(sums[0] / sums[2], sums[1] / sums[2])
        finally:
            bar.close()
            trained.optimizer.zero_grad()
            kept.write()
    history.seconds = time.perf_counter() - began
    return history


def _described(objective: ELBO) -> str:
    return f"{type(objective).__name__}(num_particles={objective.num_particles})"
