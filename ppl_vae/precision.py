"""How many digits products of matrices have: all of float32, by the faster of two libraries; fewer where asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Sums of 512 products are off by about 3e-7 of their size in float32, by 3e-4 in TF32 and by 3e-3 in bfloat16.
LARGEST_ERROR = 1e-5
FEWER_DIGITS = torch.bfloat16, torch.float16


@contextmanager
def fast_and_exact() -> Iterator[None]:
    """Lets oneDNN multiply matrices on a processor inside, if that is ordinary float32 there; and restores what was.

    PyTorch takes oneDNN only when told that less than float32 would do ("medium"), which it then does with all of
    float32 on a processor without units for less, and with up to twice MKL's speed on one of AMD's. Whether the
    processor has such units is found out once, by a small product. Nothing changes where a GPU is in use, for which
    the same words mean less than float32, nor where the user has asked for something other than the default.

    `torch.autocast` around it rounds products as ever, but it rounds weights anew each time: it would otherwise keep
    what it has once rounded for as long as it lasts, and a training inside would see the weights of its first step.

    Example:
        >>> import torch
        >>> with fast_and_exact():
        ...     product = torch.ones(2, 3) @ torch.ones(3, 2)
        >>> torch.get_float32_matmul_precision()
        'highest'
    """
    with ExitStack() as stack:
        stack.enter_context(_rounded_anew())
        if not torch.cuda.is_initialized() and _is_default() and _is_exact():
            stack.enter_context(_by_onednn())
        yield


@contextmanager
def _by_onednn() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@contextmanager
def _rounded_anew() -> Iterator[None]:
    before = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


class Digits(TorchDispatchMode):
    """Sees whether operations inside round to fewer digits than float32 has, whoever asks for it.

    Attributes:
        rounded_to: to what the first such operation rounds, such as "bfloat16"; None for none.

    Example:
        >>> weight = torch.ones(3, 2)
        >>> with Digits() as digits, torch.autocast("cpu", torch.bfloat16):
        ...     product = torch.ones(2, 3) @ weight
        >>> digits.rounded_to
        'bfloat16'
    """

    def __init__(self) -> None:
        super().__init__()
        self.rounded_to: str | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # PyTorch would import its compiler, for over a second, to tell it not to look in here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if self.rounded_to is None and not func.is_view:  # data of fewer digits are as exact as they were given
            fewer = (t.dtype for t in tree_leaves(found) if isinstance(t, Tensor) and t.dtype in FEWER_DIGITS)
            self.rounded_to = next((str(dtype).removeprefix("torch.") for dtype in fewer), None)
        return found


@dataclass(frozen=True, eq=False, repr=False)
class Rounded:
    """A result that knows how it was computed.

    Attributes:
        rounded_to: to what the programs round, such as "bfloat16", inside of `torch.autocast` or by the type of their
            weights; None for not at all.
    """

    rounded_to: str | None = field(default=None, kw_only=True)

    def _rounding(self) -> list[str]:
        """The warning of it."""
        if self.rounded_to is None:
            return []
        return [
            f"Numbers inside of the programs were rounded to {self.rounded_to}, by torch.autocast or by the type of "
            "their weights: these results are off by more than their errors say. Compute them in float32."
        ]


def _is_default() -> bool:
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # precision was set backend by backend, which torch does not mix with this
        return False


@cache
def _is_exact() -> bool:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator) for shape in ((64, 512), (512, 64)))
    with _by_onednn(), torch.autocast("cpu", enabled=False):
        product = a @ b
    exact = a.double() @ b.double()
    return bool((product.double() - exact).norm() < LARGEST_ERROR * exact.norm())
