"""Products of float32 matrices by the faster of two libraries, where it is as exact as the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

# Sums of 512 products are off by about 3e-7 of their size in float32, by 3e-4 in TF32 and by 3e-3 in bfloat16.
LARGEST_ERROR = 1e-5


@contextmanager
def fast_and_exact() -> Iterator[None]:
    """Lets oneDNN multiply matrices on a processor inside, if that is ordinary float32 there; and restores what was.

    PyTorch takes oneDNN only when told that less than float32 would do ("medium"), which it then does with all of
    float32 on a processor without units for less, and with up to twice MKL's speed on one of AMD's. Whether the
    processor has such units is found out once, by a small product. Nothing changes where a GPU is in use, for which
    the same words mean less than float32, nor where the user has asked for something other than the default.

    Example:
        >>> import torch
        >>> with fast_and_exact():
        ...     product = torch.ones(2, 3) @ torch.ones(3, 2)
        >>> torch.get_float32_matmul_precision()
        'highest'
    """
    if torch.cuda.is_initialized() or not _is_default() or not _is_exact():
        yield
        return
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def _is_default() -> bool:
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # precision was set backend by backend, which torch does not mix with this
        return False


@cache
def _is_exact() -> bool:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator) for shape in ((64, 512), (512, 64)))
    torch.set_float32_matmul_precision("medium")
    try:
        product = a @ b
    finally:
        torch.set_float32_matmul_precision("highest")
    exact = a.double() @ b.double()
    return bool((product.double() - exact).norm() < LARGEST_ERROR * exact.norm())
