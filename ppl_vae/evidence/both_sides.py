"""Estimates of log p(x) from below and from above, and what each number may be taken for."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan, sqrt
from typing import Any

from torch import Tensor

from ppl_vae.evidence.modes import ModeCheck
from ppl_vae.precision import Rounded


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
