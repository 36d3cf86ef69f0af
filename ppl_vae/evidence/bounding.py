"""log p(x) from below and from above, and what each number may be taken for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, log, nan, sqrt
from typing import Any

import torch
from torch import Tensor

from ppl_vae.evidence.annealing import Work, annealed_importance_sampling
from ppl_vae.evidence.blocks import (
    Block,
    at_least_one,
    gathered,
    looked_at,
    root_seed,
    seed_of,
    start_from,
    untouched,
)
from ppl_vae.evidence.importance import importance_sampling
from ppl_vae.evidence.modes import ModeCheck, mode_check
from ppl_vae.evidence.record import Evidence
from ppl_vae.evidence.simulation import simulate
from ppl_vae.precision import Rounded
from ppl_vae.proposals import Guide, Proposal
from ppl_vae.scoring import Program

Estimator = Callable[..., Evidence]


@dataclass(frozen=True)
class Kind:
    """What a number near log p(x) is.

    Attributes:
        name: the estimator, in the words of the field.
        side: "lower" or "upper".
        in_expectation: whether the expectation of one estimate lies on that side of log p(x).
        in_probability: whether one estimate is on the wrong side by more than t nats with probability e^−t at most.
        data: "any", or "simulated" where it holds only for data drawn from the model together with their latents.
    """

    name: str
    side: str
    in_expectation: bool
    in_probability: bool
    data: str

    def __str__(self) -> str:
        strength = ["in expectation"] * self.in_expectation + ["in probability"] * self.in_probability
        return f"{self.side} bound {' and '.join(strength)}: {self.name}, {self.data} data"


# Estimates of a CUBO, or of an EUBO by self-normalised weights, are not here: their expectations lie on neither side.
MEAN_WEIGHT = Kind("log mean weight", "lower", in_expectation=True, in_probability=True, data="any")
TANGENT = Kind("tangent of the logarithm", "upper", in_expectation=True, in_probability=False, data="any")
REVERSE = Kind("reverse annealing", "upper", in_expectation=True, in_probability=True, data="simulated")
MULTI_SAMPLE = Kind(
    "log mean weight of one reverse and K − 1 forward chains",
    "upper",
    in_expectation=True,
    in_probability=True,
    data="simulated",
)


@dataclass(frozen=True, eq=False, repr=False)
class Bounds(Rounded):
    """Estimates of log p(x) from both sides, per datum, in nats, float64 `(N,)`.

    They are bounds in expectation: the means over the data bracket the mean log p(x) up to `mc_standard_error`, while
    those of a single datum may cross it.

    Attributes:
        lower: see `kind["lower"]`.
        upper: see `kind["upper"]`.
        reverse: on simulated data, the upper bound of the reverse chain alone, `kind["reverse"]`; None on others.
        kind: for each of these names what its number is: a bound on which side, how strongly, and for which data.
        standard_error: for each name, over other draws, `(N,)`; NaN where a datum has one draw only, as reverse.
        modes: on real data, whether chains from the prior find more than those from the guide; None where not asked.
        unchecked: why the modes were not checked, where it was asked and could not be done; otherwise empty.
        args: the data that were scored, simulated or real, and what else both programs took.
        method: how they were made, in words.
    """

    lower: Tensor
    upper: Tensor
    reverse: Tensor | None
    kind: dict[str, Kind]
    standard_error: dict[str, Tensor]
    modes: ModeCheck | None
    unchecked: str
    args: tuple[Any, ...]
    method: str

    @property
    def width(self) -> Tensor:
        """upper − lower, `(N,)`."""
        return self.upper - self.lower

    @property
    def mean(self) -> dict[str, float]:
        """Over the data, of each of the names in `kind`."""
        return {name: getattr(self, name).mean().item() for name in self.kind}

    @property
    def mean_standard_error(self) -> dict[str, float]:
        """Of `mean`, for other data and other draws: sd / √N. NaN for one datum."""
        return {name: _error(getattr(self, name)) for name in self.kind}

    @property
    def mc_standard_error(self) -> dict[str, float]:
        """Of `mean`, for the same data and other draws: √(Σ standard_error²) / N."""
        return {name: (e.square().sum().sqrt() / len(e)).item() for name, e in self.standard_error.items()}

    def summary(self) -> None:
        """Prints the means with their errors, what each of them is, and what speaks against them."""
        print(self)

    def __repr__(self) -> str:
        return f"Bounds({self.method}: {self.mean['lower']:.3f} to {self.mean['upper']:.3f})"

    def __str__(self) -> str:
        lines = [f"{self.method}: {len(self.lower)} data, in nats per datum"]
        lines.append(f"{'':<10}{'mean':>12}{'± draws':>10}{'± data':>10}")
        for name in [name for name in ("upper", "reverse", "lower") if name in self.kind]:
            lines.append(
                f"{name:<10}{self.mean[name]:>12.3f}{_cell(self.mc_standard_error[name])}"
                f"{_cell(self.mean_standard_error[name])}  {self.kind[name]}"
            )
        meaning = "how far two runs disagree, to second order" if self.kind["upper"] is TANGENT else "upper − lower"
        lines.append(f"{'width':<10}{self.width.mean().item():>12.4f}{'':>10}{_cell(_error(self.width))}  {meaning}")
        if self.modes is not None and not self.modes.warnings():
            lines.append(self.modes.conclusion)
        return "\n".join([*lines, *(f"! {warning}" for warning in self.warnings())])

    def warnings(self) -> list[str]:
        """In sentences, why these numbers should not be believed; empty when nothing speaks against them."""
        found = self._rounding()
        possible = self.lower.isfinite() & self.upper.isfinite()
        if (impossible := int((~possible).sum())) > 0:
            found.append(f"{impossible} data got probability 0 in a run, so that the means are not finite.")
        width = self.width[possible]
        if self.kind["upper"] is TANGENT:
            if len(width) and (far := (width.abs() > 1).double().mean().item()) > 0.05:
                found.append(
                    f"Two independent runs disagree by more than about a nat for {100 * far:.0f} % of the data: the "
                    "estimates have not settled. Take more samples or temperatures, or annealed_importance_sampling."
                )
            if self.modes is None:
                found.append(
                    "The upper bound holds on average over runs; where every run misses the same mode of the "
                    "posterior, both numbers are too low and agree. Chains from the prior are a check: mode_check."
                    + (f" It could not be made here: {self.unchecked}" if self.unchecked else "")
                )
        elif len(width) and (far := width.mean().item()) > 1:
            found.append(f"The bounds are {far:.1f} nats apart on average. Take more temperatures.")
        return found + (self.modes.warnings() if self.modes is not None else [])


def _error(values: Tensor) -> float:
    """Of the mean over the data, where there are two or more."""
    return values.std().item() / sqrt(len(values)) if len(values) > 1 else nan


def _cell(error: float) -> str:
    return f"{'–' if error != error else f'{error:.4f}':>10}"


def sandwich(
    model: Program,
    guide: Program,
    *args: Any,
    num_data: int = 100,
    num_chains: int = 16,
    num_temperatures: int = 100,
    num_leapfrog: int = 5,
    proposal: Proposal = Guide(),  # noqa: B008 - it holds nothing
    seed: int | None = 0,
    compile: bool = False,
) -> Bounds:
    """Bounds log p(x) from both sides on data *simulated from the model* (Grosse et al., 2015).

    The z that a datum x was simulated with is an exact draw from p(z given x). From it one chain is annealed backwards,
    from the posterior to the proposal: its log weight is an upper bound in expectation. K − 1 forward chains beside it
    make the bound tighter, log mean (w_reverse, w_2, …, w_K) (Brekelmans et al., 2022); K forward chains give the lower
    bound. All use temperatures and step sizes frozen after a pilot run.

    What it says: on data that the model makes, so many chains and temperatures are off by at most so much. It says
    nothing of real data on which the model is worse than on its own; no reverse chain can start there.

    Args:
        model: p(x, z). Without further arguments it must draw data when called as `model(None, num_data=...)`, as
            the models of this package do.
        guide: q(z given x).
        *args: for any other model, data whose shapes and whose inputs beside x are used; the values of x are not.
        num_data: how many data to simulate; at most as many as there are in args.
        num_chains: K.
        num_temperatures: T.
        num_leapfrog: L, gradients in a move.
        proposal: where forward chains start and the reverse chain ends.
        seed: of the data and the chains.
        compile: as in `annealed_importance_sampling`.

    Returns:
        `Bounds`: lower, upper and reverse for each simulated datum.

    Raises:
        ValueError: as `annealed_importance_sampling`; and when the simulated x cannot be given to the guide, for no
            argument is what the model observes.

    References:
        Grosse, Ghahramani & Adams, Sandwiching the Marginal Likelihood Using Bidirectional Monte Carlo, 2015.
        https://arxiv.org/abs/1511.02543
        Brekelmans et al., Improving Mutual Information Estimation with Annealed and Energy-Based Bounds, 2022.
        https://arxiv.org/abs/2303.06992

    Example:
        >>> from ppl_vae.linear_gaussian import LinearGaussian
        >>> lg = LinearGaussian(torch.tensor([[1.0], [2.0], [0.5]]), mean=0.0, noise=0.7)
        >>> found = sandwich(lg.model, lg.perturbed_guide(), num_data=50)
        >>> bool((found.upper - found.lower).mean().abs() < 0.1)
        True
    """
    work = Work(num_chains, num_temperatures, num_leapfrog, proposal, compile=compile)
    if work.proposal.in_proportions:
        raise ValueError(
            "The chains of a defensive mixture start in fixed proportions from its parts, so that a reverse chain "
            "cannot take the place of any one of them. Use another proposal, such as StudentT()."
        )
    num_data = at_least_one("num_data", num_data)
    root = root_seed(seed)
    with untouched(model, guide):
        start_from(root, 2**32 - 1, 0)  # where no block begins
        args, latents = simulate(model, args, num_data)
    with looked_at(model, guide, *args) as pair:

        def compute(block: Block) -> Tensor:
            path, schedule = work.prepared(pair, block, root)
            start_from(root, block.start, 2)
            forward, first, _ = path.forward(schedule, work.num_chains)
            columns = work.columns(forward, first, block)
            start_from(root, block.start, 3)
            reverse = path.backward(schedule, path.target.from_trace(latents, block.start))
            together = torch.cat([reverse, forward[1:]])
            return torch.stack([columns[0], columns[1], reverse[0], together.logsumexp(0) - log(len(together))])

        lower, lower_error, reverse, upper = gathered(4, args, work.blocks(pair, args), compute)
    unknown = torch.full_like(upper, nan)
    return Bounds(
        lower=lower,
        upper=upper,
        reverse=reverse,
        kind={"lower": MEAN_WEIGHT, "upper": MULTI_SAMPLE, "reverse": REVERSE},
        standard_error={"lower": lower_error, "upper": unknown, "reverse": unknown},
        modes=None,
        unchecked="",
        args=args,
        method=f"Annealing from {proposal} and back, {work.temperatures}, simulated data",
        rounded_to=pair.rounded_to,
    )


def bounds(
    model: Program,
    guide: Program,
    *args: Any,
    estimators: Sequence[Estimator] = (annealed_importance_sampling, importance_sampling),
    num_mode_checks: int = 8,
    seed: int | None = 0,
) -> Bounds:
    """Bounds log p(x) of real data from below, and in expectation from above.

    Each estimator is run once, and the one with the highest mean again, with draws of its own: the first of its runs
    gives c, the second p̂, which had no part in the choice. L = log p̂ is a lower bound in expectation. As
    log p ≤ log c + (p − c) / c for any c > 0, the tangent of the logarithm at c,

        U = log c + p̂ / c − 1,

    is an upper bound in expectation (Struski et al., 2022), since p̂ is unbiased and c independent of it. U − L ≥ 0
    measures how far two runs agree. It cannot tell what both have missed: U holds on average over runs, by rare huge
    values where all of a mode is missed, and has no guarantee in probability. Hence the chains from the prior.

    Costs each estimator once and the best of them twice, and for the mode check 1000 temperatures from the prior and
    250 from the guide, some seconds however few the data. The choice of the estimator is one for all data, and so the
    only thing in which a datum's numbers depend on the others.

    Args:
        model: p(x, z), with continuous latents or few discrete ones.
        guide: q(z given x).
        *args: the data, `(N, ...)`, and what else both programs take.
        estimators: functions `(model, guide, *args, seed=...)` to an `Evidence` whose weights are unbiased for p(x),
            such as `functools.partial(pv.importance_sampling, num_samples=5000)`.
        num_mode_checks: how many of the data, evenly spread, to anneal from the prior as well; 0 for none. See
            `mode_check`, which also lets you choose how.
        seed: of the draws.

    Returns:
        `Bounds` with `kind` saying what each number is, and `modes`.

    Raises:
        ValueError: as the estimators.

    Reference:
        Struski, Mazur, Batorski, Spurek & Tabor, Bounding Evidence and Estimating Log-Likelihood in VAE, 2022.
        https://arxiv.org/abs/2206.09453

    Example:
        >>> from functools import partial
        >>> from ppl_vae.linear_gaussian import LinearGaussian
        >>> lg = LinearGaussian(torch.tensor([[1.0], [2.0], [0.5]]), mean=0.0, noise=0.7)
        >>> x = lg.model(num_data=50)
        >>> found = bounds(lg.model, lg.perturbed_guide(), x, estimators=[importance_sampling], num_mode_checks=0)
        >>> str(found.kind["upper"])
        'upper bound in expectation: tangent of the logarithm, any data'
    """
    if not isinstance(estimators, Sequence) or not estimators or not all(map(callable, estimators)):
        raise ValueError(
            "estimators is a list of one or more functions, such as pv.importance_sampling or a functools.partial of "
            f"it; got {estimators!r}."
        )
    if num_mode_checks != 0:
        num_mode_checks = at_least_one("num_mode_checks", num_mode_checks)
    root = root_seed(seed)
    modes, unchecked = None, ""
    if num_mode_checks:
        try:
            modes = mode_check(model, guide, *args, num_data=num_mode_checks, seed=seed_of(root, 0))
        except (
            ValueError
        ) as error:  # as of a pair that runs on all its data or not at all; its bounds are none the worse
            unchecked = str(error)
    pilots = [estimator(model, guide, *args, seed=seed_of(root, i)) for i, estimator in enumerate(estimators, 1)]
    # One choice for all data: a choice for each would follow the noise of the noisier estimator.
    pilot, estimator = max(zip(pilots, estimators, strict=True), key=lambda pair: pair[0].mean)
    found = estimator(model, guide, *args, seed=seed_of(root, len(pilots) + 1))
    ratio = (found.log_px - pilot.log_px).exp()
    impossible = pilot.log_px.isneginf()  # the logarithm has no tangent at 0
    return Bounds(
        lower=found.log_px,
        upper=torch.where(impossible, inf, pilot.log_px + ratio - 1),
        reverse=None,
        kind={"lower": MEAN_WEIGHT, "upper": TANGENT},
        standard_error={
            "lower": found.standard_error,
            "upper": torch.where(impossible, nan, ratio * found.standard_error),
        },
        modes=modes,
        unchecked=unchecked,
        args=args,
        method=f"{found.method}, twice",
        rounded_to=found.rounded_to,
    )
