"""Evaluation that leaves nothing behind: no gradients, no training mode, no trace in the random state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook


@contextmanager
def on_call(action: Callable[[nn.Module], object]) -> Iterator[None]:
    """Runs `action(module)` just before each call of any `nn.Module`.

    A pair may be plain functions that reach their networks through a closure or a global name; this finds them all.

    Example:
        >>> called = []
        >>> with on_call(called.append):
        ...     _ = nn.Linear(2, 3)(torch.zeros(2))
        >>> called
        [Linear(in_features=2, out_features=3, bias=True)]
    """

    def hook(module: nn.Module, _: object) -> None:
        action(module)

    handle = register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def evaluation(*programs: object, seed: int | None = None) -> Iterator[None]:
    """No gradients; every module that is called is in evaluation mode; random numbers start from `seed`.

    On leaving, training modes and the random state of every device are as they were. With `seed=None` the random
    state is used and moved as usual.

    Args:
        *programs: what will run. Modules among them, and modules whose methods they are, are put in evaluation mode
            as a whole: one that is never called itself may still ask for its own mode.
        seed: of random numbers.

    Example:
        >>> dropout = nn.Dropout(0.5)
        >>> with evaluation(seed=0):
        ...     dropout(torch.ones(3))
        tensor([1., 1., 1.])
        >>> dropout.training
        True
    """
    switched: list[nn.Module] = []

    def switch(module: nn.Module) -> None:
        # What a scripted module calls is not seen from here.
        parts = module.modules() if isinstance(module, torch.jit.ScriptModule) else [module]
        for part in parts:
            if part.training:
                part.training = False
                switched.append(part)

    try:
        for program in programs:
            owner = program if isinstance(program, nn.Module) else getattr(program, "__self__", None)
            for module in owner.modules() if isinstance(owner, nn.Module) else []:
                switch(module)
        with torch.no_grad(), on_call(switch), seeded(seed):
            yield
    finally:
        for module in switched:
            module.training = True


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Random numbers start from `seed` inside, and the random state is restored after; nothing for None.

    Example:
        >>> with seeded(1):
        ...     a = torch.rand(2)
        >>> with seeded(1):
        ...     b = torch.rand(2)
        >>> torch.equal(a, b)
        True
    """
    if seed is None:
        yield
        return
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
