"""The best q of a family for each datum by itself, found by gradient ascent on that datum's ELBO."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, cos, pi, sqrt

import pyro
import torch
from torch import Tensor

from ppl_vae.proposals.densities import Density, Guide, Proposal
from ppl_vae.proposals.families import DiagonalNormal, Family, Parameters
from ppl_vae.scoring import Target

FIRST_RATE, LAST_RATE = 5e-2, 5e-4
# Adam forgets within a hundred steps how steep it was at the start, for a guide that is far off.
BETAS = (0.9, 0.99)
# Whether a datum was still climbing is judged on so many fresh draws, the same for both halves of the run. The trace of
# the ELBO would not tell: it lies flat at the end of every run, because the learning rate has fallen.
JUDGED_SAMPLES = 512
TOLERANCE, STANDARD_ERRORS = 1e-2, 3.0


class Member(Density):
    """One member of a family for each datum, in coordinates v = (u − loc) / scale.

    Args:
        target: the densities it is made for.
        family: what `parameters` belong to.
        parameters: of each datum.
        loc: `(batch, dim)`.
        scale: `(batch, dim)`, positive.
    """

    def __init__(self, target: Target, family: Family, parameters: Parameters, loc: Tensor, scale: Tensor) -> None:
        super().__init__(target)
        self.family, self.parameters = family, parameters
        self.loc, self.scale = loc.double(), scale.double()

    def place(self, noise: Tensor) -> Tensor:
        """u at standard normal numbers, all `(num_samples, batch, dim)`."""
        v, _ = self.family.forward(self.parameters, noise.double())
        return (self.loc + self.scale * v).to(noise.dtype)

    def draw(self, start: int, stop: int) -> Tensor:
        return self.place(self.target.normal(stop - start))

    def log_prob(self, u: Tensor, log_prior: Tensor) -> Tensor:
        v = (u.double() - self.loc) / self.scale
        return self.family.log_prob(self.parameters, v) - self.scale.log().sum(-1)


class LocalDensity(Member):
    """What `Local` found, and how it went.

    Attributes:
        converged: for each datum whether the second half of the steps neither gained nor lost more than 0.01 nats and
            three standard errors, `(batch,)`. False also where a value or a gradient was not finite on the way; q is
            then the normal with the guide's moments.
        gain: how much greater the ELBO is for the second half of the steps, in nats, `(batch,)`.
        gain_error: its standard error.
    """

    def __init__(self, member: Member, *, converged: Tensor, gain: Tensor, gain_error: Tensor) -> None:
        super().__init__(member.target, member.family, member.parameters, member.loc, member.scale)
        self.converged, self.gain, self.gain_error = converged, gain, gain_error


class Local(Proposal):
    """q* = the member of a family with the greatest ELBO, for each datum by itself.

    ELBO(q) = E_q[log p(x, u) − log q(u)] in nats, maximised over the parameters of each datum by Adam, from the guide's
    mean and standard deviation onwards, with noise in antithetic pairs and the gradient that holds the parameters
    within log q fixed (it has no variance where q is the posterior). The ELBOs of the data are summed and Adam works
    coordinate by coordinate, so that no datum has any influence on another.

    The steps are made in two halves, each with a learning rate that falls along a cosine and an average over its later
    iterates, the second from where the first arrived. What the second gains on the first tells for each datum whether
    more steps would be of use.

    The networks are not touched; only gradients for q are computed. A run costs about 3 `num_steps` × `num_particles`
    evaluations of the model.

    Args:
        family: `DiagonalNormal()`, `FullCovarianceNormal()` or `CouplingFlow()`.
        num_steps: of Adam, in all.
        num_particles: draws of each datum's q in each step; even, for their noise comes in pairs.

    Raises:
        ValueError: for counts that are not positive; `CouplingFlow` refuses a single dimension.

    References:
        Cremer, Li & Duvenaud, Inference Suboptimality in Variational Autoencoders, 2018.
        https://arxiv.org/abs/1801.03558
        Roeder, Wu & Duvenaud, Sticking the Landing, 2017. https://arxiv.org/abs/1703.09194

    Example:
        >>> from ppl_vae.linear_gaussian import LinearGaussian
        >>> from ppl_vae.scoring import Pair
        >>> lg = LinearGaussian(torch.tensor([[1.0], [2.0]]).double(), mean=0.0, noise=1.0)
        >>> x = torch.tensor([[1.0, 3.0], [0.0, -1.0]]).double()
        >>> pair = Pair(lg.model, lg.perturbed_guide(shift=2.0), x)
        >>> with torch.no_grad():
        ...     q = Local(num_steps=200).fitted(Target(pair, x), num_samples=1)
        ...     error = q.moments()[0] - lg.posterior(x).mean
        >>> q.converged, bool(error.abs().max() < 0.1)
        (tensor([True, True]), True)
    """

    def __init__(
        self,
        family: Family = DiagonalNormal(),  # noqa: B008 - it is frozen
        *,
        num_steps: int = 1000,
        num_particles: int = 16,
    ) -> None:
        if not isinstance(family, Family):
            raise TypeError(
                "family is one of pv.proposals.DiagonalNormal(), FullCovarianceNormal() and CouplingFlow(); got "
                f"{family!r}."
            )
        if num_steps < 2 or num_particles < 2 or num_particles % 2:
            raise ValueError(
                "num_steps must be at least 2, and num_particles even and at least 2; got "
                f"{num_steps!r} and {num_particles!r}."
            )
        self.family, self.num_steps, self.num_particles = family, num_steps, num_particles

    def __str__(self) -> str:
        return f"{self.family}, fitted to each datum"

    def fitted(self, target: Target, num_samples: int) -> LocalDensity:
        # A parameter out of its range is one datum's misfortune, not an error of the program.
        with pyro.validation_enabled(False):
            return self._fitted(target)

    def _fitted(self, target: Target) -> LocalDensity:
        loc, scale = Guide().fitted(target, 1).moments()

        def member(parameters: Parameters) -> Member:
            return Member(target, self.family, parameters, loc, scale)

        start = self.family.start(target.batch, target.dim, target.device)
        half = self.num_steps // 2
        first, finite = self._ascended(member, start, half)
        second, still_finite = self._ascended(member, first, self.num_steps - half)
        gain, gain_error = self._gain(member(second), member(first))
        finite &= still_finite & gain.isfinite()
        found = {name: torch.where(_like(finite, p), p, start[name]) for name, p in second.items()}
        converged = finite & (gain.abs() <= TOLERANCE + STANDARD_ERRORS * gain_error)
        return LocalDensity(member(found), converged=converged, gain=gain, gain_error=gain_error)

    def _ascended(
        self, member: Callable[[Parameters], Member], start: Parameters, num_steps: int
    ) -> tuple[Parameters, Tensor]:
        """The average over the later half of `num_steps` steps of Adam, and for which data all was finite."""
        parameters = {name: p.clone().requires_grad_() for name, p in start.items()}
        optimiser = torch.optim.Adam(parameters.values(), betas=BETAS)
        average = {name: torch.zeros_like(p) for name, p in start.items()}
        target = member(start).target
        finite = torch.ones(target.batch, dtype=torch.bool, device=target.device)
        last = ceil(num_steps / 2)
        for step in range(num_steps):
            optimiser.param_groups[0]["lr"] = _rate(step / num_steps)
            finite &= self._set_gradients(member, parameters)
            optimiser.step()
            if step >= num_steps - last:
                for name, p in parameters.items():
                    average[name] += p.detach() / last
        return average, finite

    def _set_gradients(self, member: Callable[[Parameters], Member], parameters: Parameters) -> Tensor:
        """Of the loss with respect to each datum's parameters; returns for which data all was finite.

        The others' are set to zero, so that they stay where the model can be run, and NaN out of Adam's averages.
        """
        half = member(parameters).target.normal(self.num_particles // 2)
        with torch.enable_grad():
            u = member(parameters).place(torch.cat([half, -half]))
            held = {name: p.detach() for name, p in parameters.items()}
            elbo = _log_weights(member(held), u).mean(0)
            # A sum over the data: a datum's gradient is that of its own ELBO, however many there are.
            gradients = torch.autograd.grad(-elbo.sum(), list(parameters.values()))
        finite = torch.stack([_finite(value) for value in (elbo.detach(), *gradients)]).all(0)
        for parameter, gradient in zip(parameters.values(), gradients, strict=True):
            parameter.grad = torch.where(_like(finite, gradient), gradient, 0.0)
        return finite

    def _gain(self, last: Member, before: Member) -> tuple[Tensor, Tensor]:
        """ELBO(last) − ELBO(before) and its standard error, from the same noise for both, `(batch,)`."""
        differences = []
        for _ in range(ceil(JUDGED_SAMPLES / self.num_particles)):
            noise = last.target.normal(self.num_particles)
            one, other = (_log_weights(q, q.place(noise)) for q in (last, before))
            differences.append(one - other)
        difference = torch.cat(differences)
        return difference.mean(0), difference.std(0) / sqrt(len(difference))


def _log_weights(q: Member, u: Tensor) -> Tensor:
    """log p(x, u) − log q(u), `(num_samples, batch)`."""
    log_prior, log_joint = q.target.log_parts(u)
    return log_joint - q.log_prob(u, log_prior)


def _rate(progress: float) -> float:
    """Half a period of a cosine from the first learning rate down to the last."""
    return LAST_RATE + 0.5 * (FIRST_RATE - LAST_RATE) * (1 + cos(pi * progress))


def _finite(value: Tensor) -> Tensor:
    """Whether all that belongs to a datum is finite, `(batch,)`."""
    return value.isfinite().reshape(len(value), -1).all(1)


def _like(flag: Tensor, value: Tensor) -> Tensor:
    """A flag for each datum, in the rank of a value."""
    return flag.reshape(-1, *(1,) * (value.dim() - 1))
