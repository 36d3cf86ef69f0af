"""How far a guide is from the posterior, and why: the family it belongs to, or the encoder that chose within it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from math import nan, sqrt
from typing import Any

import pyro
import torch
from torch import Tensor

from ppl_vae.evidence import WeightStream
from ppl_vae.evidence.blocks import Block, at_least_one, blocks, looked_at, root_seed, start_from
from ppl_vae.evidence.path import Path
from ppl_vae.precision import Rounded
from ppl_vae.proposals import Density, Guide
from ppl_vae.proposals.families import DiagonalNormal, Family
from ppl_vae.proposals.local import Local
from ppl_vae.scoring import Pair, Program, Target

# Rows (draws × data) that the model runs on at once.
ROWS = 1024
# How log p(x) is found where it is not given: chains from the best member have not far to go.
CHAINS, TEMPERATURES, LEAPFROG = 16, 50, 5
# A gap that is negative by as many standard errors is no accident among ten thousand data.
IMPOSSIBLE = 4.5

NAMES = ("log_px", "elbo", "best_elbo", "kl", "approximation", "amortisation")


@dataclass(frozen=True, eq=False, repr=False)
class Gaps(Rounded):
    """log p(x) − ELBO, per datum, split in two. All in nats, float64, `(N,)`; nothing is clipped at 0.

    Attributes:
        log_px: log p(x).
        elbo: of the guide, over the continuous latents: discrete ones are summed out, which makes it at least the
            guide's own.
        best_elbo: of the best member of the family for each datum, on draws that had no part in finding it.
        standard_error: of each of `NAMES`, `(N,)`, over other draws. The two ELBOs have draws of their own.
        converged: whether the best member was found: its ELBO had stopped rising, and is not below the guide's by more
            than two standard errors; or it is at log p(x). Where it is False, `best_elbo` is too low by an unknown
            amount.
        is_bound: whether log_px comes from samples, whose mean is a lower bound: so then are kl and approximation.
        num_samples: draws for each ELBO and datum.
        family: of the best member, in words.
    """

    log_px: Tensor
    elbo: Tensor
    best_elbo: Tensor
    standard_error: dict[str, Tensor]
    converged: Tensor
    is_bound: bool
    num_samples: int
    family: str

    @property
    def kl(self) -> Tensor:
        """KL(q, posterior) = log_px − elbo: the sum of the two below."""
        return self.log_px - self.elbo

    @property
    def approximation(self) -> Tensor:
        """log_px − best_elbo: what no member of the family can avoid."""
        return self.log_px - self.best_elbo

    @property
    def amortisation(self) -> Tensor:
        """best_elbo − elbo: what the guide loses against the best member. Negative where the guide is no member."""
        return self.best_elbo - self.elbo

    @property
    def mean(self) -> dict[str, float]:
        """Mean over the data of each of `NAMES`."""
        return {name: getattr(self, name).mean().item() for name in NAMES}

    @property
    def mean_standard_error(self) -> dict[str, float]:
        """Of `mean`, for other data and other samples: sd / √N. NaN for one datum."""
        n = len(self.elbo)
        return {name: (getattr(self, name).std() / sqrt(n)).item() if n > 1 else nan for name in NAMES}

    @property
    def mc_standard_error(self) -> dict[str, float]:
        """Of `mean`, for the same data and other samples: √(Σ standard_error²) / N."""
        return {name: (self.standard_error[name].square().sum().sqrt() / len(self.elbo)).item() for name in NAMES}

    def summary(self) -> None:
        """Prints the means with their errors, and says in words when not to believe them."""
        print(self)

    def __repr__(self) -> str:
        parts = ", ".join(f"{name} {self.mean[name]:.3f}" for name in ("kl", "approximation", "amortisation"))
        return f"Gaps({len(self.elbo)} data: {parts})"

    def __str__(self) -> str:
        words = {
            "log_px": ("log p(x)", "estimated: a lower bound in expectation" if self.is_bound else "as given"),
            "kl": ("KL(q, posterior)", "log p(x) − ELBO, of the guide"),
            "approximation": ("  approximation", "log p(x) − best ELBO: the family's part"),
            "amortisation": ("  amortisation", "best ELBO − ELBO: the encoder's part"),
            "elbo": ("ELBO", "of the guide"),
            "best_elbo": ("best ELBO", f"of {self.family}, fitted to each datum"),
        }
        title = f"Inference gaps: {len(self.elbo)} data, {self.num_samples} samples each, in nats per datum"
        lines = [title, f"{'':<18}{'mean':>12}{'± samples':>12}{'± data':>12}"]
        for name, (label, meaning) in words.items():
            numbers = self.mean[name], self.mc_standard_error[name], self.mean_standard_error[name]
            cells = "".join(f"{'–' if number != number else f'{number:.4f}':>12}" for number in numbers)
            lines.append(f"{label:<18}{cells}  {meaning}")
        return "\n".join([*lines, *(f"! {warning}" for warning in self.warnings())])

    def warnings(self) -> list[str]:
        """In sentences, why these numbers should not be believed; empty when nothing speaks against them."""
        found, num_data = self._rounding(), len(self.elbo)
        if (lost := int((~self.converged).sum())) > 0.05 * num_data:
            found.append(
                f"The best q of {lost} of {num_data} data was not found: its ELBO was still rising, or is below the "
                "guide's. Their approximation gap is too large, and their amortisation gap too small, by an unknown "
                "amount. Take more num_steps; if that does not help, a family that the guide's q belongs to."
            )
        reasons = {
            "kl": "log p(x) is too low, or belongs to other data",
            "approximation": "log p(x) is too low, or belongs to other data",
            "amortisation": "the guide is better than the best q that was found in the family",
        }
        for name, reason in reasons.items():
            below = getattr(self, name) < -IMPOSSIBLE * self.standard_error[name] - 1e-6
            if (count := int(below.sum())) > 0:
                found.append(
                    f"{name} is negative by more than {IMPOSSIBLE} standard errors for {count} of {num_data} data, "
                    f"datum {int(below.nonzero()[0])} the first: {reason}."
                )
        if (bias := 0.5 * self.standard_error["log_px"].square().mean().item()) > 0.01 and self.is_bound:
            found.append(
                f"log p(x), and with it the approximation gap, is too low by about {bias:.2f} nats. Pass a better one "
                "as log_px, such as annealed_importance_sampling's with more temperatures."
            )
        values = torch.stack([self.log_px, self.elbo, self.best_elbo])
        if (bad := int((~values.isfinite()).any(0).sum())) > 0:
            found.append(
                f"{bad} of {num_data} data have a log p(x) or an ELBO that is not finite, and so has the mean."
            )
        return found


def inference_gaps(
    model: Program,
    guide: Program,
    *args: Any,
    family: Family = DiagonalNormal(),  # noqa: B008 - it is frozen
    num_steps: int = 1000,
    num_samples: int = 1000,
    log_px: Any = None,
    seed: int | None = 0,
) -> Gaps:
    """Splits log p(x) − ELBO of each datum into what the family costs and what the encoder costs.

    log p(x) − ELBO(q) = KL(q, posterior) = [log p(x) − ELBO(q*)] + [ELBO(q*) − ELBO(q)], where q* is the member of
    `family` with the greatest ELBO for the datum: the approximation gap and the amortisation gap. q* is found by
    gradient ascent on each datum by itself (see `proposals.local.Local`); its ELBO is then taken from fresh draws. A
    family may be any, but to speak of amortisation it has to contain the guide's q. Works in unconstrained coordinates
    of the continuous latents, where a constrained latent's normal is the normal of its transform; discrete latents with
    few values are summed out.

    Costs about 3 `num_steps` × 16 + 3 `num_samples` evaluations of the model for each datum, in memory that does not
    depend on the number of data. Nothing of the pair is changed, and a datum's numbers depend on the seed and on its
    place among the data, not on the others.

    Args:
        model: p(x, z), a Pyro program whose sites all lie in one plate over the data.
        guide: q(z given x), with the same arguments.
        *args: the data, `(N, ...)`, and what else both programs take.
        family: of q*: `DiagonalNormal()`, `FullCovarianceNormal()`, `CouplingFlow()`.
        num_steps: of the ascent.
        num_samples: for each of the two ELBOs; 2 or more.
        log_px: of the same data: exact values `(N,)`, or an `Evidence`, or what else has `log_px` and either
            `standard_error` or `error`; None estimates it by annealing 16 chains from q* through 50 temperatures.
        seed: of the draws; None takes it from the global random state.

    Returns:
        `Gaps`: per datum kl, approximation and amortisation with their errors, and their means over the data.

    Raises:
        TypeError: for a log_px that is none of these.
        ValueError: as `importance_sampling`; for a log_px of other length; for counts that are too small; for a family
            that needs more dimensions than the latents have.

    References:
        Cremer, Li & Duvenaud, Inference Suboptimality in Variational Autoencoders, 2018.
        https://arxiv.org/abs/1801.03558

    Example:
        >>> from ppl_vae.linear_gaussian import LinearGaussian
        >>> lg = LinearGaussian(torch.tensor([[1.0, 0.5], [2.0, 1.0], [0.5, 2.0]]).double(), mean=0.0, noise=0.7)
        >>> x, guide = lg.model(num_data=5), lg.perturbed_guide(shift=0.5, spread=1.0)
        >>> gaps = inference_gaps(lg.model, guide, x, num_steps=200, log_px=lg.log_px(x))
        >>> best = 0.5 * (lg.precision.diagonal().log().sum() - lg.precision.logdet())    # of a diagonal normal
        >>> abs(gaps.mean["approximation"] - best.item()) < 4.5 * gaps.mc_standard_error["approximation"] + 0.01
        True
    """
    if at_least_one("num_samples", num_samples) < 2:
        raise ValueError("num_samples must be at least 2, for a standard error to exist; got 1.")
    local, root = Local(family, num_steps=num_steps), root_seed(seed)
    with looked_at(model, guide, *args) as pair:
        known = None if log_px is None else _given(log_px, len(args[0]))
        size = ROWS // local.num_particles
        parts = [
            _block(pair, block, local, num_samples, root, is_known=known is not None)
            for block in blocks(pair, args, size)
        ]
    elbo, elbo_error, best, best_error, converged, *estimate = (torch.cat(p) for p in zip(*parts, strict=True))
    value, value_error = (part.to(elbo) for part in known or estimate)
    errors = {"log_px": value_error, "elbo": elbo_error, "best_elbo": best_error}
    errors |= {"kl": value_error.hypot(elbo_error), "approximation": value_error.hypot(best_error)}
    errors |= {"amortisation": best_error.hypot(elbo_error)}
    return Gaps(
        log_px=value,
        elbo=elbo,
        best_elbo=best,
        standard_error=errors,
        # Where nothing is left below log p(x), there is nothing left to find.
        converged=(converged & (best - elbo >= -2 * errors["amortisation"]))
        | ((value - best).abs() < 0.01 + 3 * errors["approximation"]),
        is_bound=known is None or hasattr(log_px, "standard_error"),
        num_samples=num_samples,
        family=str(family),
        rounded_to=pair.rounded_to,
    )


def _given(log_px: Any, num_data: int) -> tuple[Tensor, Tensor]:
    """log p(x) and its error, from whatever holds them."""
    value = log_px if isinstance(log_px, Tensor) else getattr(log_px, "log_px", None)
    error = getattr(log_px, "standard_error", getattr(log_px, "error", None))
    if isinstance(log_px, Tensor):
        error = torch.zeros_like(log_px)
    if not isinstance(value, Tensor) or not isinstance(error, Tensor):
        raise TypeError(
            "log_px is a tensor of exact values, or holds `log_px` and its `standard_error` or `error`, as what "
            f"importance_sampling returns does; got {type(log_px).__name__}."
        )
    for tensor in (value, error):
        if tensor.shape != (num_data,):
            raise ValueError(
                f"log_px must have one value for each of the {num_data} data; got the shape {tuple(tensor.shape)}. "
                "Compute it on the same data."
            )
    return value.double(), error.double()


def _block(
    pair: Pair, block: Block, local: Local, num_samples: int, root: int, *, is_known: bool
) -> tuple[Tensor, ...]:
    """Of one block both ELBOs with their errors, convergence, and log p(x) with its error unless that is known."""
    with pyro.validation_enabled(True):
        target = Target(pair, *block.args, width=block.width)
        guide = Guide().fitted(target, num_samples)
        target.log_joint(guide.draw(0, 1))  # every distribution checks its parameters and its data
    with pyro.validation_enabled(False):
        start_from(root, block.start, 0)
        elbo = _elbo(guide, num_samples)
        start_from(root, block.start, 1)
        best = local.fitted(target, num_samples)
        start_from(root, block.start, 2)  # draws that the ascent has not seen
        best_elbo = _elbo(best, num_samples)
        estimate = () if is_known else _log_px(best, root, block.start)
    return *elbo, *best_elbo, best.converged, *estimate


def _elbo(density: Density, num_samples: int) -> tuple[Tensor, Tensor]:
    """Mean log weight and its standard error, `(batch,)` each."""
    some = _log_weights(density, num_samples)
    first = next(some)
    shift = first[0].nan_to_num(0.0, 0.0, 0.0)  # sums of squares of numbers near −500 would lose five digits
    total = squares = torch.zeros_like(shift)
    for log_w in chain([first], some):
        total = total + (log_w - shift).sum(0)
        squares = squares + (log_w - shift).square().sum(0)
    variance = (squares - total.square() / num_samples).clamp(min=0.0) / (num_samples - 1)
    return shift + total / num_samples, (variance / num_samples).sqrt()


def _log_px(best: Density, root: int, start: int) -> tuple[Tensor, Tensor]:
    """log p(x) and its standard error by annealing from the best member, `(batch,)` each."""
    path = Path(best.target, best, LEAPFROG)
    start_from(root, start, 3)
    schedule = path.pilot(TEMPERATURES)
    start_from(root, start, 4)  # the pilot's length, and so its draws, are a matter of the whole block
    log_w, _, _ = path.forward(schedule, CHAINS)
    stream = WeightStream(CHAINS, best.target.batch, device=best.target.device)
    stream.add(log_w)
    log_px, standard_error, *_ = stream.evidence()
    return log_px, standard_error


def _log_weights(density: Density, num_samples: int) -> Iterator[Tensor]:
    """log p(x, u) − log q(u) of `num_samples` draws, some at a time."""
    target = density.target
    at_once = max(1, ROWS // target.width)
    for first in range(0, num_samples, at_once):
        u = density.draw(first, min(num_samples, first + at_once))
        log_prior, log_joint = target.log_parts(u)
        yield log_joint - density.log_prob(u, log_prior)
