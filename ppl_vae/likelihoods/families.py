"""What the distributions of this room share: refusals in words, expansion, and differences of exponentials."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor


class Refusing:
    """Mixed into a distribution: data outside its support are refused in sentences (while validation is on)."""

    rule: str
    remedy: str

    def _allowed(self, value: Tensor) -> Tensor:
        return self.support.check(value)  # type: ignore[attr-defined]

    def _validate_sample(self, value: Tensor) -> None:
        allowed = self._allowed(value)
        if not allowed.all():
            low, high, example = value.min().item(), value.max().item(), value[~allowed][0].item()
            raise ValueError(
                f"{self.rule}; got values from {low:.4g} to {high:.4g}, such as {example:.4g}. {self.remedy}"
            )
        super()._validate_sample(value)  # type: ignore[misc]


class Parametric(Refusing, dist.TorchDistribution):
    """A distribution given by tensors, the names of `arg_constraints`, that broadcast and expand together.

    Their shape is `(*batch, *event, *components)`, with as many dimensions of the last two as the class says.
    """

    num_event_dims = 0
    num_component_dims = 0

    def __init__(self, *, validate_args: bool | None = None, **parameters: Tensor) -> None:
        self._set(dict(zip(parameters, torch.broadcast_tensors(*parameters.values()), strict=True)))
        shape = next(iter(self._get().values())).shape
        end = len(shape) - self.num_component_dims
        start = end - self.num_event_dims
        super().__init__(shape[:start], shape[start:end], validate_args=validate_args)

    def _get(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.arg_constraints}

    def _set(self, parameters: dict[str, Any]) -> None:
        for name, value in parameters.items():
            setattr(self, name, value)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Parametric:
        new = copy(self)
        keep = len(self.batch_shape)
        new._set({name: value.expand(*batch_shape, *value.shape[keep:]) for name, value in self._get().items()})
        new._batch_shape = torch.Size(batch_shape)
        return new


def log_diff_exp(x: Tensor, y: Tensor) -> Tensor:
    """log(eˣ − eʸ) for x > y; finite, and with finite gradients, where the two are equal to rounding.

    Example:
        >>> log_diff_exp(torch.tensor(-1000.0), torch.tensor(-1001.0))
        tensor(-1000.4587)
    """
    return x + (-torch.expm1(-(x - y).clamp(min=torch.finfo(x.dtype).tiny))).log()


def open_uniform(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Uniform draws of that shape, never 0 or 1, where the inverses of distribution functions are infinite."""
    half = torch.finfo(like.dtype).eps / 2
    return torch.rand(torch.Size(shape), dtype=like.dtype, device=like.device).clamp(half, 1 - half)
