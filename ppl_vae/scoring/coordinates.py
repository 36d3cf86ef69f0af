"""The continuous latents of a datum as one vector of real numbers, and back."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints

from ppl_vae.scoring.layout import Layout
from ppl_vae.scoring.running import Sites, Values
from ppl_vae.scoring.supports import elementwise, inside, is_unbounded, support_of


@dataclass(frozen=True)
class _Site:
    """Where one latent lies in the vector."""

    name: str
    fn: Any
    transform: Any
    is_real: bool
    dtype: torch.dtype
    shape: torch.Size  # of one datum in unconstrained coordinates: the other plates, then the event
    part: slice


class Coordinates:
    """z = T(u) for each latent, T being `biject_to` of its prior's support, and u flattened to `(*, batch, dim)`.

    Args:
        layout: of the pair.
        sites: the continuous latents of the model, on the data at hand.
        auxiliary: names that end in `_unconstrained` and stand for a latent's unconstrained value.

    Raises:
        ValueError: when a support has no such T.
    """

    def __init__(self, layout: Layout, sites: Sites, auxiliary: Collection[str] = ()) -> None:
        self.layout, self.auxiliary = layout, auxiliary
        self.axis = 1 + layout.nesting + layout.dim
        self.sites: list[_Site] = []
        self.dim = 0
        for name, site in sites.items():
            fn = site["fn"]
            support = support_of(fn)
            is_real = is_unbounded(fn)
            try:
                if not is_real and elementwise(support) is constraints.real:
                    raise NotImplementedError  # a transformed distribution whose base is bounded
                transform = biject_to(support)
            except NotImplementedError as error:
                raise ValueError(
                    f"The latent '{name}' lives where no map from the real numbers is known to lead ({fn}), so that it "
                    "has no unconstrained coordinates. Use importance_sampling, which needs none."
                ) from error
            value = transform.inv(layout.canonical(name, site["value"].unsqueeze(0)))
            shape = value.movedim(self.axis, 1).shape[2:]
            part = slice(self.dim, self.dim + shape.numel())
            self.sites.append(_Site(name, fn, transform, is_real, site["value"].dtype, shape, part))
            self.dim = part.stop

    def flatten(self, z: Values) -> Tensor:
        """Latents in canonical form to u `(num_samples, batch, dim)`.

        Raises:
            ValueError: for a latent outside its prior's support, which has no u; it may be just beyond what numbers
                of its type can tell from the edge.
        """
        for site in self.sites:
            if not (site.is_real or inside(site.fn, z[site.name]).all()):
                raise ValueError(
                    f"A draw of the latent '{site.name}' lies outside the support of its prior ({site.fn}), or at its "
                    "edge, where it has no unconstrained coordinates. Give the guide the prior's support, or use "
                    "importance_sampling from the guide, where such draws have weight 0."
                )
        parts = [s.transform.inv(z[s.name]).movedim(self.axis, 1) for s in self.sites]
        return torch.cat([part.reshape(*part.shape[:2], -1) for part in parts], -1)

    def restore(self, u: Tensor) -> tuple[Values, Tensor]:
        """u to latents in canonical form, and log|dz/du| `(num_samples, batch)`, float64.

        Unconstrained values are there too, under the `auxiliary` names, where Pyro's `AutoNormal` draws them.
        """
        values: Values = {}
        log_det = torch.zeros(u.shape[:2], dtype=torch.float64, device=u.device)
        for site in self.sites:
            raw = u[..., site.part].reshape(*u.shape[:2], *site.shape).movedim(1, self.axis).to(site.dtype)
            z = values[site.name] = site.transform(raw)
            if (auxiliary := f"{site.name}_unconstrained") in self.auxiliary:
                values[auxiliary] = raw
            if not site.is_real:
                terms = site.transform.log_abs_det_jacobian(raw, z).movedim(self.axis, 1)
                log_det = log_det + terms.reshape(*u.shape[:2], -1).sum(-1, dtype=torch.float64)
        return values, log_det

    def is_faithful(self, u: Tensor) -> Tensor:
        """Whether T(u) can be told from T of its neighbours in the numbers at hand, `(num_samples, batch)`."""
        values, _ = self.restore(u)
        parts = [s.transform.inv(values[s.name]).movedim(self.axis, 1).reshape(*u.shape[:2], -1) for s in self.sites]
        return ((torch.cat(parts, -1) - u).abs() < 1e-2 * (1 + u.abs())).all(-1)
