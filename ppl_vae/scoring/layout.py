"""Where samples, plates and data lie in the shapes of a pair's sites."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """What the plates of a pair are.

    Attributes:
        plate: name of the plate over the data.
        dim: its dimension, counted from the right of a site's batch shape.
        nesting: how many levels of plates there are; samples lie to the left of them all.
        ranks: how many plate dimensions each site of the guide has by itself.
        most_rows: how long the plate over the data may be: N for `plate("data", N, subsample_size=len(x))`.
    """

    plate: str
    dim: int
    nesting: int
    ranks: dict[str, int]
    most_rows: float

    def plate_scale(self, num_data: int) -> float:
        """N / B of a subsampled plate, by which a sum over the batch estimates that over all data; 1 of any other."""
        return 1.0 if self.most_rows == torch.inf else self.most_rows / num_data

    def per_datum(self, log_probs: Iterable[Tensor], args: tuple[Any, ...]) -> Tensor:
        """Sums log-probabilities over all but samples and data, in float64: `(num_samples or 1, batch)`."""
        total = torch.zeros(1, len(args[0]), dtype=torch.float64, device=args[0].device)
        others = [d for d in range(1, self.nesting + 1) if d != self.nesting + 1 + self.dim]
        for log_prob in log_probs:
            full = log_prob.reshape((1,) * (self.nesting + 1 - log_prob.dim()) + log_prob.shape)
            total = total + (full.sum(others, dtype=torch.float64) if others else full)
        return total

    def natural(self, name: str, value: Tensor) -> Tensor:
        """A latent in canonical form with no more plate dimensions than the guide gave it."""
        return value.reshape(len(value), *value.shape[1 + self.nesting - self.ranks[name] :])

    def canonical(self, name: str, value: Tensor) -> Tensor:
        """The inverse of `natural`."""
        return value.reshape(len(value), *(1,) * (self.nesting - self.ranks[name]), *value.shape[1:])

    def full_rank(self, fn: Any) -> Any:
        """A distribution with a dimension for every level of plates, so that a sample shape comes left of them all."""
        return fn.expand((1,) * (self.nesting - len(fn.batch_shape)) + fn.batch_shape)
