"""log p(x) from below and from above: of simulated data by chains both ways, of real data by two runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf, log, nan
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
from ppl_vae.evidence.both_sides import MEAN_WEIGHT, MULTI_SAMPLE, REVERSE, TANGENT, Bounds
from ppl_vae.evidence.importance import importance_sampling
from ppl_vae.evidence.modes import mode_check
from ppl_vae.evidence.record import Evidence
from ppl_vae.evidence.simulation import simulate
from ppl_vae.proposals import Guide, Proposal
from ppl_vae.scoring import Program

Estimator = Callable[..., Evidence]


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
