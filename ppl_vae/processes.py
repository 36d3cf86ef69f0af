"""Several processes that train or score as one: `torchrun` starts them, on one machine or on many.

Each is told its rank and how many there are, the world size. With one process, nothing here does anything, so that
`fit` and the estimators need not be told: they look whether a process group of `torch.distributed` has been
initialised, by `joined` or by a program of your own.

A process that fails inside a shared sum says so in the sum, so that all stop at the same step. One that fails
elsewhere, or is killed, ends the connection, which the others notice at their next sum.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from math import prod
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

# Were it first imported inside a group, as torch's compiler and optimisers do, its functions would keep the group as
# their default: the group's threads would outlive `destroy_process_group`, and may abort the process as it ends.
import torch.distributed.nn.functional
from torch import Tensor

Value = TypeVar("Value")

# How long a process waits for the others, which may be slower. One that has died is noticed at once.
PATIENCE = timedelta(hours=1)


class FailedElsewhere(RuntimeError):
    """Another process has failed, and says why; or it has gone without a word."""


def world_size() -> int:
    """How many processes work together.

    Example:
        >>> world_size(), rank(), is_first()
        (1, 0, True)
    """
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_first() -> bool:
    """Whether this process has rank 0: the one that writes files and talks."""
    return rank() == 0


@contextmanager
def joined() -> Iterator[None]:
    """Joins the process group that `torchrun` has described in the environment, and leaves it; without one, nothing.

    Tensors on a CPU go through gloo, those on a GPU through nccl; of several GPUs each process takes the one of its
    local rank. What processes other than the first print is dropped.

    Raises:
        SystemExit: in all processes but one, when any of them fails: one error is enough, the first.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, number, count = next(dist.rendezvous("env://", timeout=PATIENCE))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=PATIENCE)
    try:
        with ExitStack() as stack:
            if not is_first():
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(redirect_stdout(nowhere))
                stack.enter_context(redirect_stderr(nowhere))
            yield
    except Exception as error:
        if isinstance(error, FailedElsewhere):
            time.sleep(2.0)  # the one that knows more comes first
        if not _is_first_to_fail(store):
            sys.exit(2)
        raise
    finally:
        dist.destroy_process_group()


def _is_first_to_fail(store: dist.Store) -> bool:
    try:
        # torchrun may start all of them again, with the same store.
        return store.add(f"failures {os.environ.get('TORCHELASTIC_RESTART_COUNT', '')}", 1) == 1
    except RuntimeError:  # what kept count is gone, and has perhaps said nothing
        return True


@contextmanager
def summing(
    *shape: int, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
) -> Iterator[Tensor]:
    """A tensor of zeros, which every process changes inside by its own part, and which is their sum afterwards.

    That is one all-reduce. It also tells whether the body failed anywhere, and whether Ctrl-C was pressed anywhere
    (see `interrupted_together`), so that all processes stop at the same place.

    Raises:
        FailedElsewhere: when the body failed in another process. Where it failed, its own error goes on.

    Example:
        >>> with summing(2) as total:
        ...     total += torch.tensor([1.0, 2.0])
        >>> total
        tensor([1., 2.], dtype=torch.float64)
    """
    whole = torch.zeros(prod(shape) + 2, dtype=dtype, device=device)
    part, failed, interrupted = whole[:-2].view(shape), whole[-2], whole[-1]
    if world_size() == 1:
        yield part
        return
    try:
        yield part
    except FailedElsewhere:
        raise
    except BaseException:
        part.zero_()
        failed.fill_(1)
        with suppress(FailedElsewhere):
            _all_reduce(whole)
        raise
    interrupted.fill_(_ctrl_c.is_set())
    _all_reduce(whole)
    if failed > 0:
        raise FailedElsewhere("Another process has failed, and says why.")
    if interrupted > 0:
        raise KeyboardInterrupt


def from_first(compute: Callable[[], Value]) -> Value:
    """What `compute` returns in the first process, the only one that calls it; a copy of it in the others.

    Raises:
        FailedElsewhere: when it failed. In the first process its own error goes on.

    Example:
        >>> from_first(lambda: 3)
        3
    """
    if world_size() == 1:
        return compute()
    message: list[Any] = [None, False]
    if is_first():
        try:
            message = [compute(), True]
        except BaseException:
            with suppress(FailedElsewhere):
                _broadcast(message)
            raise
    _broadcast(message)
    if not message[1]:
        raise FailedElsewhere("Another process has failed, and says why.")
    return message[0]


def part_ways() -> None:
    """Starts the random numbers of every process but the first from a seed of its own.

    The seeds follow from the random state of the first, whose numbers go on as those of one process would.
    """
    if world_size() > 1:
        root = from_first(_next_seed)
        if not is_first():
            torch.manual_seed(int(np.random.SeedSequence((root, rank())).generate_state(1, np.uint64)[0] >> 1))


def _next_seed() -> int:
    with torch.random.fork_rng(devices=[]):
        return int(torch.randint(2**62, ()))


@contextmanager
def interrupted_together() -> Iterator[None]:
    """Ctrl-C in any process raises KeyboardInterrupt in all, after their next shared sum and not before.

    With one process, and outside the main thread, Ctrl-C is what it was.
    """
    if world_size() == 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: _ctrl_c.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        _ctrl_c.clear()


_ctrl_c = threading.Event()


def _all_reduce(tensor: Tensor) -> None:
    with _in_words():
        dist.all_reduce(tensor)


def _broadcast(message: list[Any]) -> None:
    with _in_words():
        dist.broadcast_object_list(message, src=0)


@contextmanager
def _in_words() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # the kind of error depends on the backend
        raise FailedElsewhere(
            f"Process {rank()} of {world_size()} has lost the others: one of them has ended without a word, or has not "
            f"come for {PATIENCE.total_seconds() / 3600:.0f} hour. Look for what the others said."
        ) from error
