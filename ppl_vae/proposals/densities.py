"""Densities over the unconstrained coordinates of a pair that can be drawn from: what weights are taken against."""

from __future__ import annotations

from math import lgamma, log, pi, sqrt
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Chi2

from ppl_vae.scoring import Target

# A location and a scale are taken from as many draws; they are fixed before any draw that is weighted.
MOMENT_SAMPLES = 256


class Density:
    """A normalised density over u `(num_samples, batch, dim)` for the data of one `Target`."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def draw(self, start: int, stop: int) -> Tensor:
        """Draws number `start` to `stop`, `(stop - start, batch, dim)`; to mixtures it matters which they are."""
        raise NotImplementedError

    def log_prob(self, u: Tensor, log_prior: Tensor) -> Tensor:
        """log of the density at any u, float64 `(num_samples, batch)`, given the prior's there."""
        raise NotImplementedError

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation `(batch, dim)`, from draws."""
        u = self.draw(0, MOMENT_SAMPLES)
        return u.mean(0), u.std(0).clamp(min=1e-6)


class Proposal:
    """What to draw latents from: makes a `Density` for each batch of data.

    Attributes:
        in_proportions: whether its draws come from parts in fixed proportions, so that they are not all alike.
    """

    in_proportions = False

    def fitted(self, target: Target, num_samples: int) -> Density:
        """The density for these data, fixed before `num_samples` of its draws are weighted."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self})"


def checked(proposal: Any) -> Proposal:
    """What was given as a proposal, when it is one."""
    if isinstance(proposal, Proposal):
        return proposal
    got = f"the class {proposal.__name__}, without parentheses" if isinstance(proposal, type) else repr(proposal)
    raise TypeError(f"A proposal is one of pv.proposals, such as Guide() or Defensive(); got {got}.")


class Guide(Proposal):
    """q(z given x) itself.

    Example:
        >>> import ppl_vae as pv
        >>> lg = pv.LinearGaussian(torch.tensor([[1.0], [2.0]]).double(), mean=0.0, noise=1.0)
        >>> evidence = pv.importance_sampling(lg.model, lg.guide, lg.model(num_data=3), proposal=Guide())
        >>> evidence.ess.round(decimals=6)                  # the exact posterior: every draw counts
        tensor([1000., 1000., 1000.], dtype=torch.float64)
    """

    def fitted(self, target: Target, num_samples: int) -> Density:
        return _Guide(target)

    def __str__(self) -> str:
        return "the guide"


class _Guide(Density):
    def draw(self, start: int, stop: int) -> Tensor:
        return self.target.draw_guide(stop - start)

    def log_prob(self, u: Tensor, log_prior: Tensor) -> Tensor:
        return self.target.log_guide(u)


class Prior(Proposal):
    """p(z), the model's own prior.

    Annealing that starts there can find a mode of the posterior that the guide does not know of; plain importance
    sampling from it is hopeless for anything but the vaguest likelihood.

    Example:
        >>> import ppl_vae as pv
        >>> lg = pv.LinearGaussian(torch.tensor([[1.0], [2.0]]).double(), mean=0.0, noise=1.0)
        >>> x = lg.model(num_data=3)
        >>> found = pv.annealed_importance_sampling(lg.model, lg.guide, x, proposal=Prior())
        >>> bool(((found.log_px - lg.log_px(x)).abs() < 1).all())
        True
    """

    def fitted(self, target: Target, num_samples: int) -> Density:
        return _Prior(target)

    def __str__(self) -> str:
        return "the prior"


class _Prior(Density):
    def draw(self, start: int, stop: int) -> Tensor:
        return self.target.draw_prior(stop - start)

    def log_prob(self, u: Tensor, log_prior: Tensor) -> Tensor:
        return log_prior


class Widened(Proposal):
    """Another proposal stretched about its mean, so that its tails reach further than the posterior's.

    u = m + √factor (u₀ − m), in unconstrained coordinates: a normal's covariance is multiplied by `factor`. Where the
    proposal was right already, the effective sample size falls to K ((2 factor − 1) / factor²)^(dim / 2).

    Args:
        base: what to stretch.
        factor: of the variance, above 0; None takes 1 + 1 / √dim, whose price is about e^−½.

    Raises:
        ValueError: for a factor that is not above 0.
        TypeError: for a base that is no proposal.

    Example:
        >>> Widened(factor=1.5)
        Widened(the guide, widened by 1.5)
    """

    def __init__(self, base: Proposal | None = None, *, factor: float | None = None) -> None:
        if factor is not None and not factor > 0:
            raise ValueError(f"factor multiplies a variance and must be above 0; got {factor!r}.")
        self.base = Guide() if base is None else checked(base)
        self.factor, self.in_proportions = factor, self.base.in_proportions

    def fitted(self, target: Target, num_samples: int) -> Density:
        factor = 1 + 1 / sqrt(target.dim) if self.factor is None else self.factor
        return _Widened(self.base.fitted(target, num_samples), sqrt(factor))

    def __str__(self) -> str:
        return f"{self.base}, widened" + ("" if self.factor is None else f" by {self.factor:g}")


class _Widened(Density):
    def __init__(self, base: Density, spread: float) -> None:
        super().__init__(base.target)
        self.base, self.spread = base, spread
        self.loc, _ = base.moments()

    def draw(self, start: int, stop: int) -> Tensor:
        return self.loc + self.spread * (self.base.draw(start, stop) - self.loc)

    def log_prob(self, u: Tensor, log_prior: Tensor) -> Tensor:
        inner = self.loc + (u - self.loc) / self.spread
        return self.base.log_prob(inner, log_prior) - u.shape[-1] * log(self.spread)


class StudentT(Proposal):
    """A multivariate Student-t with the guide's means m and standard deviations s, in unconstrained coordinates.

    r(u) ∝ (1 + Σ_d ((u_d − m_d) / s_d)² / df)^−(df + dim)/2. Its tails are heavier than those of any normal, which
    bounds the weights of most posteriors; the price grows with the dimension, and is fair up to about 20.

    Args:
        df: degrees of freedom, above 2; the fewer, the heavier the tails.

    Raises:
        ValueError: for a df that is not above 2.

    Example:
        >>> StudentT(df=7.0)
        StudentT(a Student-t (7 degrees of freedom) at the guide's moments)

    Reference:
        Geweke, Bayesian Inference in Econometric Models Using Monte Carlo Integration, 1989.
        https://doi.org/10.2307/1913710
    """

    def __init__(self, *, df: float = 5.0) -> None:
        if not df > 2:
            raise ValueError(f"df must be above 2, for a variance to exist; got {df!r}.")
        self.df = df

    def fitted(self, target: Target, num_samples: int) -> Density:
        return _StudentT(target, self.df)

    def __str__(self) -> str:
        return f"a Student-t ({self.df:g} degrees of freedom) at the guide's moments"


class _StudentT(Density):
    def __init__(self, target: Target, df: float) -> None:
        super().__init__(target)
        self.df = df
        self.loc, self.scale = _Guide(target).moments()

    def draw(self, start: int, stop: int) -> Tensor:
        normal = self.target.normal(stop - start)
        chi2 = Chi2(torch.tensor(self.df).to(normal)).sample((stop - start, self.target.width))[:, : normal.shape[1]]
        return self.loc + self.scale * normal * (self.df / chi2).sqrt().unsqueeze(-1)

    def log_prob(self, u: Tensor, log_prior: Tensor) -> Tensor:
        df, dim = self.df, u.shape[-1]
        square = ((u - self.loc) / self.scale).double().square().sum(-1)
        normaliser = lgamma((df + dim) / 2) - lgamma(df / 2) - dim / 2 * log(df * pi)
        return normaliser - self.scale.double().log().sum(-1) - (df + dim) / 2 * torch.log1p(square / df)


class Defensive(Proposal):
    """A mixture of another proposal with the prior, which bounds every weight by p(x given z) / share.

    r(u) = (1 − share) q(u) + share p(u). Drawn in fixed proportions, and each draw weighed against the whole mixture,
    whichever part it came from (the balance heuristic): no posterior mode that has mass under the prior is missed
    without a trace.

    Args:
        base: the greater part; None takes the guide, widened.
        share: of the draws that come from the prior, in (0, 1). At least one draw in two or more does.

    Raises:
        ValueError: for a share outside (0, 1).
        TypeError: for a base that is no proposal.

    Example:
        >>> Defensive(share=0.2)
        Defensive(the guide, widened, mixed with 20 % of the prior)

    Reference:
        Hesterberg, Weighted Average Importance Sampling and Defensive Mixture Distributions, 1995.
        https://doi.org/10.1080/00401706.1995.10484303
        Veach & Guibas, Optimally Combining Sampling Techniques for Monte Carlo Rendering, 1995.
        https://doi.org/10.1145/218380.218498
    """

    def __init__(self, base: Proposal | None = None, *, share: float = 0.1) -> None:
        if not 0 < share < 1:
            raise ValueError(f"share is the part of the draws that the prior gives, between 0 and 1; got {share!r}.")
        self.base = Widened() if base is None else checked(base)
        self.share = share

    in_proportions = True

    def fitted(self, target: Target, num_samples: int) -> Density:
        count = min(max(1, round(self.share * num_samples)), num_samples - 1)  # none of a single draw
        # A mixture in this one keeps its own proportions among the draws that are left to it.
        return _Defensive(self.base.fitted(target, num_samples - count), count, num_samples)

    def __str__(self) -> str:
        return f"{self.base}, mixed with {100 * self.share:g} % of the prior"


class _Defensive(Density):
    def __init__(self, base: Density, count: int, num_samples: int) -> None:
        super().__init__(base.target)
        self.base, self.prior = base, _Prior(base.target)
        # Spread evenly, so that every part of the draws is a mixture too.
        self.from_prior = torch.zeros(num_samples, dtype=torch.bool)
        self.from_prior[[int((j + 0.5) * num_samples / count) for j in range(count)]] = True
        self.share = count / num_samples

    def draw(self, start: int, stop: int) -> Tensor:
        numbers = torch.arange(stop) % len(self.from_prior)
        here = self.from_prior[numbers[start:]]
        before = int(self.from_prior[numbers[:start]].sum())
        count = int(here.sum())
        parts = []
        if count < len(here):
            parts.append(self.base.draw(start - before, stop - before - count))
        if count:
            parts.append(self.prior.draw(before, before + count))
        # The draws came sorted by part; each goes to its place.
        order = torch.cat([(~here).nonzero(), here.nonzero()]).flatten().argsort()
        return torch.cat(parts)[order.to(parts[0].device)]

    def moments(self) -> tuple[Tensor, Tensor]:
        return self.base.moments()

    def log_prob(self, u: Tensor, log_prior: Tensor) -> Tensor:
        base = self.base.log_prob(u, log_prior) + log(1 - self.share)
        return torch.logaddexp(base, log_prior + log(self.share)) if self.share > 0 else base
