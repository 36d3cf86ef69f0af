"""What an estimate of log p(x) is: per datum, with its own error and reasons not to believe it."""

from __future__ import annotations

from dataclasses import dataclass
from math import nan, sqrt

from torch import Tensor

from ppl_vae import pareto
from ppl_vae.precision import Rounded


@dataclass(frozen=True, eq=False, repr=False)
class Evidence(Rounded):
    """Estimates of log p(x), per datum, with what is needed to judge them. All in nats, float64, `(N,)`.

    Attributes:
        log_px: log of the mean weight. Its expectation is at most log p(x), and P(log_px > log p(x) + t) ≤ e^−t.
        standard_error: of log_px over other draws of the samples, √((K/ess − 1)/(K − 1)), by the delta method. It is
            computed from the same weights and errs low where their tail is heavy: read it with `pareto_k`.
        ess: effective sample size (Σw)²/Σw², between 1 and the number of samples.
        pareto_k: heaviness of the weights' tail; above 0.7 log_px is too low by an unknown amount; −∞ for weights
            that are all equal, as from an exact posterior; ∞ for fewer than 21 samples.
        elbo: mean log weight, the evidence lower bound of what was drawn from, by the same draws.
        jackknife: log_px with its bias taken away to first order; its own is O(K⁻²). No bound, and NaN where one
            weight is half of the sum.
        pareto_smoothed: log_px with the largest weights replaced by quantiles of the Pareto distribution fitted to
            them: steadier, a little biased, no bound.
        num_samples: K, how many draws were made for each datum.
        method: how it was made, in words.
        strategy: how the draws were scored: "particles", "tiles" or "loop" (see `scoring`).
    """

    log_px: Tensor
    standard_error: Tensor
    ess: Tensor
    pareto_k: Tensor
    elbo: Tensor
    jackknife: Tensor
    pareto_smoothed: Tensor
    num_samples: int
    method: str
    strategy: str

    _draws = "samples"  # in words

    @property
    def mean(self) -> float:
        """Mean log_px over the data."""
        return self.log_px.mean().item()

    @property
    def mean_standard_error(self) -> float:
        """Of `mean`, for other data and other samples: sd(log_px) / √N. NaN for one datum."""
        return (self.log_px.std() / sqrt(len(self.log_px))).item() if len(self.log_px) > 1 else nan

    @property
    def mc_standard_error(self) -> float:
        """Of `mean`, for the same data and other samples: √(Σ standard_error²) / N."""
        return (self.standard_error.square().sum().sqrt() / len(self.log_px)).item()

    @property
    def mc_bias(self) -> float:
        """How much `mean` is too low for lack of samples, to first order: −½ mean(standard_error²).

        More data do not make it smaller.
        """
        return -0.5 * self.standard_error.square().mean().item()

    @property
    def share_believable(self) -> float:
        """The share of data whose Pareto k is below the threshold for this number of samples."""
        return (self.pareto_k < pareto.threshold(self.num_samples)).double().mean().item()

    def summary(self) -> None:
        """Prints the mean with its errors, and says in words when not to believe it."""
        print(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.method}: {self.mean:.3f} ± {self.mc_standard_error:.3f})"

    def __str__(self) -> str:
        rows = [
            ("log p(x)", f"{self.mean:.3f}", "nats per datum, mean over the data"),
            ("  ± other data", f"{self.mean_standard_error:.3f}", "standard error over data and samples"),
            ("  ± other samples", f"{self.mc_standard_error:.4f}", "standard error over samples, same data"),
            ("  bias", f"{self.mc_bias:.4f}", "for lack of samples, to first order"),
            ("  jackknife", f"{self.jackknife.mean().item():.3f}", "the bias taken away to first order; no bound"),
            *self._smoothed(),
            ("ELBO", f"{self.elbo.mean().item():.3f}", "of what was drawn from"),
            ("ESS, median", f"{self.ess.median().item():.1f}", f"of {self.num_samples} {self._draws}"),
            self._quality(),
        ]
        title = f"{self.method}: {len(self.log_px)} data, {self.num_samples} {self._draws} each"
        # One datum has no spread over data, one sample none over samples.
        lines = [f"{name:<18}{'–' if value in ('nan', '-nan') else value:>12}  {unit}" for name, value, unit in rows]
        return "\n".join([title, *lines, *(f"! {warning}" for warning in self.warnings())])

    def warnings(self) -> list[str]:
        """In sentences, why these numbers should not be believed; empty when nothing speaks against them."""
        found = [*self._rounding(), *self._doubts()]
        if (wide := (self.standard_error > 0.5).double().mean().item()) > 0.05:
            found.append(
                f"The standard error exceeds 0.5 nats for {100 * wide:.0f} % of the data, beyond where it and the "
                "bias hold to first order."
            )
        if (impossible := int(self.log_px.isneginf().sum())) > 0:
            found.append(f"{impossible} data got probability 0 under every sample, so that the mean is −∞.")
        if -self.mc_bias > self.mc_standard_error and -self.mc_bias > 0.01:
            found.append(
                "The bias is larger than the error over samples: the mean is too low, and averaging over more data "
                "will not mend it. Take more samples."
            )
        return found

    def _smoothed(self) -> list[tuple[str, str, str]]:
        """A row on the Pareto-smoothed value."""
        return [("  Pareto-smoothed", f"{self.pareto_smoothed.mean().item():.3f}", "steadier where k < 0.7; no bound")]

    def _quality(self) -> tuple[str, str, str]:
        """A row on how far the weights can be believed."""
        limit = pareto.threshold(self.num_samples)
        return "Pareto k good", f"{100 * self.share_believable:.1f} %", f"of the data, k < {limit:.2f}"

    def _doubts(self) -> list[str]:
        """What the weights themselves say against their mean."""
        found = []
        limit = pareto.threshold(self.num_samples)
        if self.num_samples < 100:
            found.append(
                f"{self.num_samples} samples are too few to judge the weights by: take 100 or more for a Pareto k, "
                "1000 or more for a number to report."
            )
        # Weights that are nearly equal may have any tail.
        elif (bad := ((self.pareto_k >= limit) & (self.ess < 0.9 * self.num_samples)).double().mean().item()) > 0.05:
            found.append(
                f"Pareto k is above {limit:.2f} for {100 * bad:.0f} % of the data: their log p(x) is too low by an "
                "amount these samples cannot tell, and their standard errors are too small. What they were drawn from "
                "is too narrow or misses a part of the posterior."
            )
        if (few := (self.ess < 50).double().mean().item()) > 0.05 and self.num_samples >= 100:
            found.append(
                f"The effective sample size is below 50 for {100 * few:.0f} % of the data: a handful of samples "
                "carries the estimate. More samples help where Pareto k is small."
            )
        return found
