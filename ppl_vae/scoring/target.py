"""p(x, z) and q(z given x) of a few data as functions of one real vector per datum."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ppl_vae.scoring.configurations import check_alphabets, configurations, discrete_sites
from ppl_vae.scoring.coordinates import Coordinates
from ppl_vae.scoring.data import widened
from ppl_vae.scoring.inspection import mask_of
from ppl_vae.scoring.pair import Pair
from ppl_vae.scoring.running import Values

# Every density is a sum over as many runs of the model.
MOST_CONFIGURATIONS = 1024


class Target:
    """The densities of a pair over unconstrained coordinates u `(num_samples, batch, dim)`, for one batch of data.

    With z = T(u), the densities over u are those over z times |dT/du|, so that p(x) = ∫ p(x, u) du is what it was.
    Discrete latents are summed out where they have few values: p(x, u) = Σ_c p(x, c, u).

    Args:
        pair: that was looked at.
        *args: the batch of data.
        width: for how many data random numbers are drawn; the first `batch` of them are used. A fixed width makes
            the draws of a datum the same however many data come with it.

    Attributes:
        dim: length of u.
        width: for how many data random numbers are drawn.
        num_configurations: how many joint values the discrete latents have, 1 without any.

    Raises:
        ValueError: when there is no continuous latent; when a discrete one cannot be summed out; when the support of
            a latent depends on another latent; with the site's name.
    """

    def __init__(self, pair: Pair, *args: Any, width: int | None = None) -> None:
        self.pair, self.args, self.batch = pair, args, len(args[0])
        self._wide = widened(args, width or self.batch) if pair.splits else args
        self.width = len(self._wide[0])
        sites, again = ({n: pair.sites(args)[0][n] for n in pair.latents} for _ in range(2))
        for name, site in sites.items():
            if not mask_of(site).all():
                raise ValueError(
                    f"The latent '{name}' is masked, so that over a part of its values it has no density to move along "
                    "or to stretch. Use importance_sampling from the guide, where what is masked in both cancels."
                )
        discrete = discrete_sites(sites)
        continuous = {name: site for name, site in sites.items() if name not in discrete}
        if not continuous:
            raise ValueError(
                f"The pair has no continuous latent to integrate over (its latents: {discrete or 'none'}). Use "
                "enumeration for discrete latents, or importance_sampling."
            )
        self.num_configurations, self._configurations = configurations(
            pair.layout, {name: sites[name] for name in discrete}, self.batch, most=MOST_CONFIGURATIONS
        )
        check_alphabets(pair, args, {name: sites[name] for name in discrete}, self._configurations)
        auxiliary = [name for name in pair.drawn if name not in pair.latents]
        self.coordinates = Coordinates(pair.layout, continuous, auxiliary)
        self.dim = self.coordinates.dim
        self._refuse_moving_supports(Coordinates(pair.layout, {n: again[n] for n in continuous}))
        self._encoded = pair.encode(*args)
        self._wide_encoded = self._encoded if self._wide is args else pair.encode(*self._wide)
        values = [site["value"] for site in continuous.values()]
        self.dtype, self.device = reduce(torch.promote_types, [v.dtype for v in values]), values[0].device

    def draw_guide(self, num_samples: int) -> Tensor:
        """u from the guide, `(num_samples, batch, dim)`."""
        z, _ = self.pair.draw(self._wide_encoded, *self._wide, num_samples=num_samples)
        return self._flat(z)

    def draw_prior(self, num_samples: int) -> Tensor:
        """u from the prior, `(num_samples, batch, dim)`."""
        return self._flat(self.pair.draw_prior(*self._wide, num_samples=num_samples))

    def _flat(self, z: Values, start: int = 0) -> Tensor:
        """u of this batch, which begins at datum `start` of what was drawn."""
        axis = self.coordinates.axis
        return self.coordinates.flatten(
            {s.name: z[s.name].narrow(axis, start, self.batch) for s in self.coordinates.sites}
        )

    def from_trace(self, values: Values, start: int) -> Tensor:
        """u of the latents as one run of the model on all data has them, from datum `start`, `(1, batch, dim)`."""
        layout = self.pair.layout
        canonical = {s.name: layout.canonical(s.name, values[s.name].unsqueeze(0)) for s in self.coordinates.sites}
        return self._flat(canonical, start)

    def normal(self, num_samples: int) -> Tensor:
        """Standard normal numbers in the shape of u."""
        wide = torch.randn(num_samples, self.width, self.dim, dtype=self.dtype, device=self.device)
        return wide[:, : self.batch]

    def uniform(self, num_samples: int) -> Tensor:
        """Uniform numbers, one per sample and datum, `(num_samples, batch)`."""
        return torch.rand(num_samples, self.width, dtype=self.dtype, device=self.device)[:, : self.batch]

    def log_guide(self, u: Tensor) -> Tensor:
        """log q(u given x), float64 `(num_samples, batch)`."""
        z, log_det, num_samples = self._all(u)
        log_q = self.pair.log_q(self._encoded, z, *self.args, num_samples=num_samples)
        return self._summed(log_q) + log_det

    def log_parts(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """log p(u) and log p(x, u), both float64 `(num_samples, batch)`, from one run of the model."""
        z, log_det, num_samples = self._all(u)
        scores = self.pair.scores(z, *self.args, num_samples=num_samples)
        return self._summed(scores.latent) + log_det, self._summed(scores.total) + log_det

    def log_joint(self, u: Tensor) -> Tensor:
        """log p(x, u), float64 `(num_samples, batch)`."""
        return self.log_parts(u)[1]

    def latents(self, u: Tensor) -> Values:
        """All latents at one u `(1, batch, dim)`, the discrete ones in their first configuration."""
        return {name: value[:1] for name, value in self._all(u)[0].items()}

    def _all(self, u: Tensor) -> tuple[Values, Tensor, int]:
        """All latents for each configuration of the discrete ones, and log|dz/du|."""
        values, log_det = self.coordinates.restore(u)
        if self._configurations:
            values = {n: torch.cat([v] * self.num_configurations) for n, v in values.items()}
            values |= {n: c.repeat_interleave(len(u), 0) for n, c in self._configurations.items()}
        return values, log_det, self.num_configurations * len(u)

    def _summed(self, log_density: Tensor) -> Tensor:
        """Over the configurations of the discrete latents."""
        if not self._configurations:
            return log_density
        return log_density.reshape(self.num_configurations, -1, self.batch).logsumexp(0)

    def _refuse_moving_supports(self, other: Coordinates) -> None:
        probe = torch.full((1, self.batch, self.dim), 0.37, dtype=torch.float64)
        one, two = self.coordinates.restore(probe)[0], other.restore(probe)[0]
        for name in (site.name for site in self.coordinates.sites):
            if not torch.equal(one[name].double().cpu(), two[name].double().cpu()):
                raise ValueError(
                    f"The support of '{name}' changes from draw to draw, as when it depends on another latent, so it "
                    "has no unconstrained coordinates of its own. Use importance_sampling, which needs none."
                )
