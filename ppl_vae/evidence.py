"""log p(x) of any pair, per datum and with its own error: importance sampling from the guide."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, log, nan, sqrt
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from ppl_vae import isolation, pareto, scoring
from ppl_vae.scoring import Pair, Program

# Random numbers are drawn for a block of data and samples at a time. The blocks' sizes depend on nothing but
# `num_samples`, so that a seed gives the same draws however the scoring of them is cut up.
BLOCK_ROWS = 2**14
# How many rows (samples × data) the model may score in one run: the fastest is found out during the first runs. Beyond
# a thousand nothing is won on a processor, whose caches the decoder's output no longer fits.
CANDIDATE_ROWS = (128, 512, 1024)


@dataclass(frozen=True, eq=False)
class Evidence:
    """Estimates of log p(x), per datum, with what is needed to judge them. All in nats, float64, `(N,)`.

    Attributes:
        log_px: log of the mean weight. Its expectation is at most log p(x), and P(log_px > log p(x) + t) ≤ e^−t.
        standard_error: of log_px over other draws of the samples, √((K/ess − 1)/(K − 1)), by the delta method. It is
            computed from the same weights and errs low where their tail is heavy: read it with `pareto_k`.
        ess: effective sample size (Σw)²/Σw², between 1 and the number of samples.
        pareto_k: heaviness of the weights' tail; above 0.7 log_px is too low by an unknown amount; −∞ for weights
            that are all equal, as from an exact posterior; ∞ for fewer than 21 samples.
        elbo: mean log weight, the evidence lower bound, from the same draws.
        num_samples: K, how many draws were made for each datum.
        strategy: how they were scored: "particles", "tiles" or "loop" (see `scoring`).
    """

    log_px: Tensor
    standard_error: Tensor
    ess: Tensor
    pareto_k: Tensor
    elbo: Tensor
    num_samples: int
    strategy: str

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

    def __str__(self) -> str:
        rows = [
            ("log p(x)", f"{self.mean:.3f}", "nats per datum, mean over the data"),
            ("  ± other data", f"{self.mean_standard_error:.3f}", "standard error over data and samples"),
            ("  ± other samples", f"{self.mc_standard_error:.4f}", "standard error over samples, same data"),
            ("  bias", f"{self.mc_bias:.4f}", "for lack of samples, to first order"),
            ("ELBO", f"{self.elbo.mean().item():.3f}", "nats per datum"),
            ("ESS, median", f"{self.ess.median().item():.1f}", f"of {self.num_samples} samples"),
            (
                "Pareto k good",
                f"{100 * self.share_believable:.1f} %",
                f"of the data, k < {pareto.threshold(self.num_samples):.2f}",
            ),
        ]
        title = f"Importance sampling: {len(self.log_px)} data, {self.num_samples} samples each"
        # One datum has no spread over data, one sample none over samples.
        lines = [f"{name:<18}{'–' if value in ('nan', '-nan') else value:>12}  {unit}" for name, value, unit in rows]
        return "\n".join([title, *lines, *(f"! {warning}" for warning in self.warnings())])

    def warnings(self) -> list[str]:
        """In sentences, why these numbers should not be believed; empty when nothing speaks against them."""
        found = []
        limit = pareto.threshold(self.num_samples)
        if self.num_samples < 100:
            found.append(
                f"{self.num_samples} samples are too few to judge the weights by: take 100 or more for a Pareto k, "
                "1000 or more for a number to report."
            )
        elif (bad := 1 - self.share_believable) > 0.05:
            found.append(
                f"Pareto k is above {limit:.2f} for {100 * bad:.0f} % of the data: their log p(x) is too low by an "
                "amount these samples cannot tell, and their standard errors are too small. The guide is too narrow "
                "or misses a part of the posterior."
            )
        if (few := (self.ess < 50).double().mean().item()) > 0.05 and self.num_samples >= 100:
            found.append(
                f"The effective sample size is below 50 for {100 * few:.0f} % of the data: a handful of samples "
                "carries the estimate. More samples help where Pareto k is small."
            )
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


def importance_sampling(
    model: Program,
    guide: Program,
    *args: Any,
    num_samples: int = 1000,
    seed: int | None = 0,
    max_rows: int | None = None,
) -> Evidence:
    """Estimates log p(x) of each datum by importance sampling from the guide.

    log p(x) ≈ log (1/K) Σ_k w_k with w_k = p(x, z_k) / q(z_k given x) and z_k ~ q: a lower bound in expectation that
    rises to log p(x) with K (Burda et al., 2016). Weights are added up in float64 and streamed, so that memory
    depends neither on the number of samples nor on the number of data; the guide runs once per
    datum, unless it draws one latent given another.

    Nothing of the pair is changed: modules are put in evaluation mode and back, gradients are off, the global random
    state and Pyro's parameter store are restored. The same seed gives the same draws for any `max_rows`; the sums then
    agree to rounding.

    Args:
        model: p(x, z), a Pyro program whose sites all lie in one plate over the data: a module, a bound method or a
            function.
        guide: q(z given x), with the same arguments.
        *args: the data, `(N, ...)`, and what else both programs take.
        num_samples: K, draws of z for each datum.
        seed: of the draws; None takes them from the global random state.
        max_rows: how many (sample, datum) rows the model scores in one run; the fastest of a few is found by timing
            when None.

    Returns:
        An `Evidence`: per datum log_px, standard_error, ess, pareto_k and elbo, and their means over the data.

    Raises:
        TypeError: when the data are not a tensor.
        ValueError: for no data, NaN in them, or tensors of different lengths; for a pair with no log weight per datum
            (a latent outside the plate, a guide without density, a scaled site, names that differ, a datum whose
            density depends on its batch, ...); for weights that are NaN or +∞; with the site's name.

    References:
        Burda, Grosse & Salakhutdinov, Importance Weighted Autoencoders, 2016. https://arxiv.org/abs/1509.00519
        Vehtari et al., Pareto Smoothed Importance Sampling, 2024. https://jmlr.org/papers/v25/19-556.html

    Example:
        >>> from ppl_vae.linear_gaussian import LinearGaussian
        >>> lg = LinearGaussian(torch.tensor([[1.0], [2.0], [0.5]]), mean=0.0, noise=0.7)
        >>> x = lg.model(num_data=200)
        >>> evidence = importance_sampling(lg.model, lg.perturbed_guide(), x, num_samples=2000)
        >>> bool(((evidence.log_px - lg.log_px(x)).abs() < 4.5 * evidence.standard_error).all())
        True
    """
    if not isinstance(num_samples, (int, np.integer)) or num_samples < 1:
        raise ValueError(f"num_samples must be an integer of at least 1; got {num_samples!r}.")
    num_data = scoring.check_data(*args)
    # One seed for each block, so that no block's draws depend on what was computed before it.
    root = (int(torch.randint(2**62, ())) if seed is None else seed) % 2**64
    store = pyro.get_param_store()
    with isolation.evaluation(model, guide, seed=0), store.scope(store.get_state()), _in_words():
        pair = Pair(model, guide, *args)
        block = max(16, min(1024, BLOCK_ROWS // num_samples)) if pair.splits else num_data
        pace = _Pace(max_rows)
        parts = [
            _block(pair, scoring.rows(args, slice(start, start + block)), start, num_samples, root, pace)
            for start in range(0, num_data, block)
        ]
    log_px, standard_error, ess, pareto_k, elbo = (torch.cat(column) for column in zip(*parts, strict=True))
    return Evidence(log_px, standard_error, ess, pareto_k, elbo, num_samples, pair.strategy.__name__)


@contextmanager
def _in_words() -> Iterator[None]:
    """Says of parameters that a distribution refuses what it means for the model."""
    try:
        yield
    except ValueError as error:
        if "Expected parameter" not in str(error):
            raise
        what = str(error).split(", but found")[0]
        raise ValueError(
            f"A distribution of the pair got parameters that it cannot have ({what}). Its networks hold NaN, or a "
            "scale is not positive: the model cannot be scored as it is."
        ) from error


def _block(
    pair: Pair, args: tuple[Any, ...], start: int, num_samples: int, root: int, pace: _Pace
) -> tuple[Tensor, ...]:
    """The evidence of one block of data: log_px, standard_error, ess, pareto_k, elbo."""
    batch = len(args[0])
    torch.manual_seed(_seed(root, start, 0))
    with pyro.validation_enabled(True):
        encoded = pair.encode(*args)
    weights = WeightStream(num_samples, batch, device=args[0].device)
    at_once = max(1, BLOCK_ROWS // batch)
    for first in range(0, num_samples, at_once):
        torch.manual_seed(_seed(root, start, first + 1))
        z, log_q = pair.draw(encoded, *args, num_samples=min(at_once, num_samples - first))
        for part in pace.parts(len(log_q), batch):
            # The first run on each datum lets every distribution check its parameters and its data.
            with pyro.validation_enabled(first == 0 and part.start == 0):
                some = {name: value[part] for name, value in z.items()}
                log_p = pair.log_joint(some, *args, num_samples=part.stop - part.start)
            weights.add(log_w := log_p - log_q[part])
            if not (log_w < inf).all():
                sample, datum = (~(log_w < inf)).nonzero()[0].tolist()
                site = pair.blame({name: value[sample : sample + 1] for name, value in some.items()}, *args)
                raise ValueError(
                    f"A weight of datum {start + datum} is NaN or +∞: {site} has no finite density there. Its "
                    "parameters have overflowed, or the model has not been trained far enough to be scored."
                )
    return weights.evidence()


def _seed(root: int, start: int, first: int) -> int:
    return int(np.random.SeedSequence((root, start, first)).generate_state(1, np.uint64)[0] >> 1)


class WeightStream:
    """Adds up log weights as they come, in float64 and in memory that does not depend on how many there are.

    Args:
        num_samples: how many will come for each datum; only the length of the tail that is kept depends on it.
        batch: number of data.

    Example:
        >>> stream = WeightStream(num_samples=5, batch=2)
        >>> stream.add(torch.zeros(3, 2))
        >>> stream.add(torch.zeros(2, 2))
        >>> log_px, standard_error, ess, pareto_k, elbo = stream.evidence()
        >>> ess
        tensor([5., 5.], dtype=torch.float64)
    """

    def __init__(self, num_samples: int, batch: int, *, device: torch.device | None = None) -> None:
        self.count = 0
        self.tail = min(pareto.tail_length(num_samples) + 1, num_samples)
        self.sum = torch.full((batch,), -inf, dtype=torch.float64, device=device)
        self.sum_of_squares = self.sum.clone()
        self.total = torch.zeros_like(self.sum)
        self.largest = torch.empty(batch, 0, dtype=torch.float64, device=device)

    def add(self, log_weights: Tensor) -> None:
        """Takes more log weights, `(any number, batch)`."""
        log_weights = log_weights.double()
        if self.count == 0:
            # Everything is kept relative to a typical weight: sums of numbers near −500 would lose three digits.
            self.shift = log_weights.max(0).values.nan_to_num(neginf=0.0)
        relative = log_weights - self.shift
        self.count += len(relative)
        self.sum = torch.logaddexp(self.sum, relative.logsumexp(0))
        self.sum_of_squares = torch.logaddexp(self.sum_of_squares, (2 * relative).logsumexp(0))
        self.total = self.total + relative.sum(0)
        seen = torch.cat([self.largest, relative.T], dim=1)
        self.largest = seen.topk(min(self.tail, seen.shape[1]), dim=1).values

    def evidence(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """log_px, standard_error, ess, pareto_k and elbo of what has come, each `(batch,)`.

        Divides by the weights that came, not by those that were announced.
        """
        n = self.count
        ess = (2 * self.sum - self.sum_of_squares).exp().nan_to_num(0.0).clamp(max=n)
        standard_error = ((n / ess - 1) / (n - 1)).sqrt() if n > 1 else torch.full_like(ess, nan)
        pareto_k = pareto.tail_shape(self.largest, n)
        pareto_k[ess > n * (1 - 1e-6)] = -inf
        return self.shift + self.sum - log(n), standard_error, ess, pareto_k, self.shift + self.total / n


class _Pace:
    """Cuts samples into runs of the number of rows that scores most rows a second, found by timing the first runs."""

    def __init__(self, max_rows: int | None) -> None:
        if max_rows is not None and not (isinstance(max_rows, (int, np.integer)) and max_rows >= 1):
            raise ValueError(f"max_rows must be an integer of at least 1; got {max_rows!r}.")
        self.rows = max_rows
        # Each size twice: the first run of any size pays for memory not yet allocated.
        self.trials = [] if max_rows else [*CANDIDATE_ROWS, *CANDIDATE_ROWS]
        self.seconds_per_row: dict[int, float] = {}

    def parts(self, num_samples: int, batch: int) -> Iterator[slice]:
        """Slices that cover `num_samples`; the caller scores each before it asks for the next."""
        start = 0
        while start < num_samples:
            rows = self.trials[0] if self.trials else self._fastest()
            part = slice(start, min(num_samples, start + max(1, rows // batch)))
            if not self.trials:
                yield part
            else:
                began = _now()
                yield part
                seconds = (_now() - began) / ((part.stop - part.start) * batch)
                self.seconds_per_row[rows] = min(seconds, self.seconds_per_row.get(rows, inf))
                del self.trials[0]
            start = part.stop

    def _fastest(self) -> int:
        return self.rows or min(self.seconds_per_row, key=self.seconds_per_row.__getitem__)


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
