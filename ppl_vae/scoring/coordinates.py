"""The continuous latents of a datum as one vector of real numbers, and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

from ppl_vae.scoring.layout import Layout
from ppl_vae.scoring.running import Sites, Values


@dataclass(frozen=True)
class _Site:
    """Where one latent lies in the vector."""

    name: str
    transform: Any
    is_real: bool
    shape: torch.Size  # of one datum in unconstrained coordinates: the other plates, then the event
    part: slice


class Coordinates:
    """z = T(u) for each latent, T being `biject_to` of its prior's support, and u flattened to `(*, batch, dim)`.

    Args:
        layout: of the pair.
        sites: the continuous latents of the model, on the data at hand.

    Raises:
        ValueError: when a support has no such T.
    """

    def __init__(self, layout: Layout, sites: Sites) -> None:
        self.layout = layout
        self.axis = 1 + layout.nesting + layout.dim
        self.sites: list[_Site] = []
        self.dim = 0
        for name, site in sites.items():
            support = site["fn"].support
            try:
                transform = biject_to(support)
            except NotImplementedError as error:
                raise ValueError(
                    f"The latent '{name}' lives on {support}, for which torch knows no map from the real numbers, so "
                    "that it has no unconstrained coordinates. Use importance_sampling, which needs none."
                ) from error
            while isinstance(support, constraints.independent):
                support = support.base_constraint
            value = transform.inv(layout.canonical(name, site["value"].unsqueeze(0)))
            shape = value.movedim(self.axis, 1).shape[2:]
            part = slice(self.dim, self.dim + shape.numel())
            self.sites.append(_Site(name, transform, support is constraints.real, shape, part))
            self.dim = part.stop

    def flatten(self, z: Values) -> Tensor:
        """Latents in canonical form to u `(num_samples, batch, dim)`."""
        parts = [s.transform.inv(z[s.name]).movedim(self.axis, 1) for s in self.sites]
        return torch.cat([part.reshape(*part.shape[:2], -1) for part in parts], -1)

    def restore(self, u: Tensor) -> tuple[Values, Tensor]:
        """u to latents in canonical form, and log|dz/du| `(num_samples, batch)`, float64.

        The unconstrained value of each site is there too, as `NAME_unconstrained`, where Pyro's `AutoNormal` draws it.
        """
        values: Values = {}
        log_det = torch.zeros(u.shape[:2], dtype=torch.float64, device=u.device)
        for site in self.sites:
            raw = u[..., site.part].reshape(*u.shape[:2], *site.shape).movedim(1, self.axis)
            z = site.transform(raw)
            values[site.name], values[f"{site.name}_unconstrained"] = z, raw
            if not site.is_real:
                terms = site.transform.log_abs_det_jacobian(raw, z).movedim(self.axis, 1)
                log_det = log_det + terms.reshape(*u.shape[:2], -1).sum(-1, dtype=torch.float64)
        return values, log_det
