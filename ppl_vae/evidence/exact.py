"""What an exact log p(x) is: per datum, with how far the sum behind it can be trusted, and the guide's exact ELBO."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import nan, sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl_vae.precision import Rounded
from ppl_vae.scoring import Pair, Values


@dataclass(frozen=True, eq=False, repr=False)
class Exact(Rounded):
    """log p(x) without sampling, per datum: what estimates are to be compared with. In nats, float64, `(N,)`.

    Attributes:
        log_px: log p(x).
        error: of log_px: how far, at most, the sum over every second point along each axis was from that over all,
            whichever points were left out. What error is left is less: about error⁴ for smooth densities, of the
            same order for a decoder with kinks, as with ReLU. 0 for a sum over all values.
        elbo: of the guide, E_q[log p(x, z) − log q(z given x)], summed as log_px is; NaN where q was too narrow, or
            its tails too heavy, for the finest grid, and where q does not sum to 1 over the values enumerated.
        kl: KL(q, posterior) = log_px − elbo.
        accepted: whether log_px passed every check. Nothing is known of one that did not.
        method: how the sum was made, in words.
        draws: of the posterior p(z given x), by name of the latent, `(num_draws, N, *plates, *event)` with the plates
            inside that of the data that are longer than 1; independent of each other, in the latents' own space.
            Empty unless asked for.
    """

    log_px: Tensor
    error: Tensor
    elbo: Tensor
    accepted: Tensor
    method: str
    draws: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def kl(self) -> Tensor:
        """KL(q, posterior), `(N,)`: the whole gap between the ELBO and log p(x). Never clipped at 0."""
        return self.log_px - self.elbo

    @property
    def mean(self) -> float:
        """Mean log_px over the data."""
        return self.log_px.mean().item()

    @property
    def mean_standard_error(self) -> float:
        """Of `mean`, for other data: sd(log_px) / √N. NaN for one datum."""
        return (self.log_px.std() / sqrt(len(self.log_px))).item() if len(self.log_px) > 1 else nan

    def summary(self) -> None:
        """Prints the means, and says in words when not to believe them."""
        print(self)

    def __repr__(self) -> str:
        return (
            f"Exact({self.method}: {self.mean:.3f}, accepted for {int(self.accepted.sum())} of {len(self.log_px)} data)"
        )

    def __str__(self) -> str:
        rows = [
            ("log p(x)", f"{self.mean:.4f}", "nats per datum, mean over the data"),
            ("  ± other data", f"{self.mean_standard_error:.3f}", "standard error over data"),
            ("  error, largest", f"{self.error.max().item():.1e}", "of one datum, nats"),
            ("ELBO", f"{self.elbo.mean().item():.4f}", "nats per datum"),
            ("KL(q, posterior)", f"{self.kl.mean().item():.4f}", "nats per datum"),
        ]
        lines = [f"{name:<18}{'–' if value in ('nan', '-nan') else value:>12}  {unit}" for name, value, unit in rows]
        title = f"{self.method[0].upper()}{self.method[1:]}: {len(self.log_px)} data"
        return "\n".join([title, *lines, *(f"! {warning}" for warning in self.warnings())])

    def warnings(self) -> list[str]:
        """In sentences, which of these numbers should not be believed; empty when nothing speaks against them."""
        found = self._rounding()
        if (refused := ~self.accepted).any():
            found.append(
                f"log p(x) of {int(refused.sum())} of {len(refused)} data was not accepted, datum "
                f"{int(refused.nonzero()[0])} the first: halving the grid's spacing still changed it, or mass lay at "
                "the grid's edge. Take them out by `accepted`, or allow more levels."
            )
        if (unknown := self.elbo.isnan()).any():
            found.append(
                f"The ELBO of {int(unknown.sum())} data is NaN: on the finest grid the guide's density still did not "
                "sum to 1, or E_q[log p − log q] had not settled. It is too narrow, or its tails too heavy, for a "
                "grid, or the guide has values that the model has not."
            )
        if (impossible := int(self.log_px.isneginf().sum())) > 0:
            found.append(f"{impossible} data have probability 0, so that the mean is −∞.")
        return found


def check_num_draws(value: Any) -> int:
    """Refuses what is no count."""
    if not isinstance(value, (int, np.integer)) or value < 0:
        raise ValueError(f"num_draws must be an integer, 0 for none; got {value!r}.")
    return int(value)


def as_draws(pair: Pair, values: Values) -> Values:
    """Latents in canonical form as `(num_draws, batch, *plates, *event)`, without plates of length 1."""
    data = 1 + pair.layout.nesting + pair.layout.dim
    found = {}
    for name in pair.latents:
        value = values[name].movedim(data, 1)
        plates, event = value.shape[2 : 1 + pair.layout.nesting], value.shape[1 + pair.layout.nesting :]
        found[name] = value.reshape(*value.shape[:2], *(size for size in plates if size > 1), *event)
    return found


def picked(pair: Pair, tables: Values, index: Tensor) -> Values:
    """Of configurations in canonical form those numbered `index`, `(num_draws, batch)`, in canonical form."""
    data = 1 + pair.layout.nesting + pair.layout.dim
    every = torch.arange(index.shape[1], device=index.device)
    return {name: table.movedim(data, 1)[index, every].movedim(1, data) for name, table in tables.items()}


def joined(parts: list[Values]) -> Values:
    """The draws of several blocks of data as one."""
    return {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
