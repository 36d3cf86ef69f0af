"""Log weights that come in parts, added up in bounded memory."""

from __future__ import annotations

from math import inf, log, nan

import numpy as np
import torch
from torch import Tensor

from ppl_vae import pareto

# The jackknife needs the largest weights one by one; of few all, for then each is large.
KEPT = 128

COLUMNS = ("log_px", "standard_error", "ess", "pareto_k", "elbo", "jackknife", "pareto_smoothed")


class WeightStream:
    """Adds up log weights as they come, in float64 and in memory that does not depend on how many there are.

    Args:
        num_samples: how many will come for each datum; only the length of the tail that is kept depends on it.
        batch: number of data.

    Example:
        >>> stream = WeightStream(num_samples=5, batch=2)
        >>> stream.add(torch.zeros(3, 2))
        >>> stream.add(torch.zeros(2, 2))
        >>> log_px, standard_error, ess, *_ = stream.evidence()
        >>> ess.round(decimals=9)
        tensor([5., 5.], dtype=torch.float64)
    """

    def __init__(self, num_samples: int, batch: int, *, device: torch.device | None = None) -> None:
        self.count = 0
        self.kept = min(max(pareto.tail_length(num_samples) + 1, KEPT), num_samples)
        self.total = torch.zeros(batch, dtype=torch.float64, device=device)
        self.largest = torch.empty(batch, 0, dtype=torch.float64, device=device)
        # log of the sums of w, w² and w³ over the weights that are no longer kept; added, never subtracted, so that
        # nothing cancels.
        self.body = [torch.full_like(self.total, -inf) for _ in range(3)]

    def add(self, log_weights: Tensor) -> None:
        """Takes more log weights, `(any number, batch)`."""
        log_weights = log_weights.double()
        if self.count == 0:
            # Everything is kept relative to a typical weight: sums of numbers near −500 would lose three digits.
            self.shift = log_weights.max(0).values.nan_to_num(neginf=0.0)
        relative = (log_weights - self.shift).T
        self.count += relative.shape[1]
        self.total = self.total + relative.sum(1)
        seen = torch.cat([self.largest, relative], dim=1)
        self.largest, places = seen.topk(min(self.kept, seen.shape[1]), dim=1)
        if seen.shape[1] > self.kept:
            rest = seen.scatter(1, places, -inf)
            self.body = [torch.logaddexp(b, (power * rest).logsumexp(1)) for power, b in enumerate(self.body, start=1)]

    def evidence(self) -> tuple[Tensor, ...]:
        """The `COLUMNS` of what has come, each `(batch,)`.

        Divides by the weights that came, not by those that were announced.
        """
        n = self.count
        log_sum, log_squares, log_cubes = (
            torch.logaddexp(b, (power * self.largest).logsumexp(1)) for power, b in enumerate(self.body, start=1)
        )
        ess = (2 * log_sum - log_squares).exp().nan_to_num(0.0).clamp(max=n)
        standard_error = ((n / ess - 1) / (n - 1)).sqrt() if n > 1 else torch.full_like(ess, nan)
        tail = min(pareto.tail_length(n) + 1, n)
        pareto_k, smoothed_tail = pareto.smoothed(self.largest[:, :tail], n)
        smoothed_tail = torch.cat([smoothed_tail, self.largest[:, tail:]], 1)
        equal = ess > n * (1 - 1e-6)
        pareto_k = torch.where(equal, -inf, pareto_k)
        log_px = self.shift + log_sum - log(n)
        smoothed = self.shift + torch.logaddexp(self.body[0], smoothed_tail.logsumexp(1)) - log(n)
        jackknife = log_px + self._jackknife(log_sum, ess, (log_cubes - 3 * log_sum).exp())
        return (
            log_px,
            standard_error,
            ess,
            pareto_k,
            self.shift + self.total / n,
            jackknife,
            torch.where(equal, log_px, smoothed),
        )

    def _jackknife(self, log_sum: Tensor, ess: Tensor, cubes: Tensor) -> Tensor:
        """(K − 1) [log(1 − 1/K) − mean log(1 − w̃)], w̃ being the normalised weights.

        The mean is a power series whose first three terms are known for all weights: Σ w̃ = 1, Σ w̃² = 1 / ess, Σ w̃³;
        what is left matters for the largest weights only.
        """
        n = self.count
        w = (self.largest - log_sum.unsqueeze(1)).exp().clamp(max=1.0)
        beyond = (-torch.log1p(-w) - w - w**2 / 2 - w**3 / 3).sum(1)
        correction = (n - 1) * (np.log1p(-1 / n) + (1 + 0.5 / ess + cubes / 3 + beyond) / n) if n > 1 else ess * nan
        return torch.where(w.max(1).values < 0.5, correction, nan)  # without its largest weight nothing would be left
