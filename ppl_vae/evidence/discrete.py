"""log p(x) of pairs whose latents are all discrete: the sum over every value they can have."""

from __future__ import annotations

from math import nan
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical

from ppl_vae import scoring
from ppl_vae.evidence.blocks import blocks, looked_at, root_seed, start_from
from ppl_vae.evidence.exact import Exact, as_draws, check_num_draws, joined, picked
from ppl_vae.scoring import Pair, Program, Values
from ppl_vae.scoring.configurations import check_alphabets, configurations, discrete_sites

MOST_CONFIGURATIONS = 2**16
# Configurations × data: how many are held at once, as two numbers each, and how many one run of a program scores.
BLOCK_ROWS, RUN_ROWS = 2**18, 2**12
# A guide whose probabilities sum to anything else has values that the model has not.
SUM_TOLERANCE = 1e-4


def enumeration(model: Program, guide: Program, *args: Any, num_draws: int = 0, seed: int | None = 0) -> Exact:
    """log p(x) of each datum, exactly, for a pair whose latents are all discrete.

    log p(x) = log Σ_z p(x, z) over all joint values z of a datum's latents, at most 65,536 of them, in memory that
    depends neither on their number nor on that of the data. Likewise the guide's exact ELBO Σ_z q log(p / q), and
    independent draws from the posterior. Nothing of the pair is changed.

    Args:
        model: p(x, z), a Pyro program whose sites all lie in one plate over the data.
        guide: q(z given x), with the same arguments; any that has a density serves log p(x).
        *args: the data, `(N, ...)`, and what else both programs take.
        num_draws: from the posterior of each datum.
        seed: of the draws; None takes them from the global random state.

    Returns:
        An `Exact`: per datum log_px, elbo, kl and draws; `error` is 0 and everything is accepted.

    Raises:
        TypeError: when the data are not a tensor.
        ValueError: for a continuous latent, one whose values cannot be listed, or too many joint values, with the
            site's name; for a pair with no log weight per datum, as in `importance_sampling`.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> weights, locs = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([-1.0, 0.5, 2.0])
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Categorical(weights))
        ...         pyro.sample("x", dist.Normal(locs[z], 0.8), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Categorical(torch.ones(3) / 3))
        >>> x = torch.tensor([0.0, 1.0])
        >>> exact = enumeration(model, guide, x)
        >>> mixture = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(locs, 0.8))
        >>> torch.allclose(exact.log_px.float(), mixture.log_prob(x))
        True
    """
    num_data = scoring.check_data(*args)
    num_draws, root = check_num_draws(num_draws), root_seed(seed)
    with looked_at(model, guide, *args) as pair:
        sites = _all_discrete(pair, scoring.rows(args, slice(1)) if pair.splits else args)
        count, _ = configurations(pair.layout, sites, 1, most=MOST_CONFIGURATIONS)
        parts, draws = [], []
        for block in blocks(pair, args, max(1, BLOCK_ROWS // count)):
            sites = _all_discrete(pair, block.args)
            count, tables = configurations(pair.layout, sites, len(block.args[0]), most=MOST_CONFIGURATIONS)
            check_alphabets(pair, block.args, sites, tables)
            log_joint, log_q = _scored(pair, block.args, tables, count)
            parts.append((log_joint.logsumexp(0), _elbo(log_joint, log_q)))
            if num_draws:
                start_from(root, block.start)
                index = Categorical(logits=log_joint.T).sample((num_draws,))
                draws.append(as_draws(pair, picked(pair, tables, index)))
    log_px, elbo = (torch.cat(column) for column in zip(*parts, strict=True))
    return Exact(
        log_px=log_px,
        error=torch.zeros_like(log_px),
        elbo=elbo,
        accepted=torch.ones(num_data, dtype=torch.bool, device=log_px.device),
        method=f"enumeration of {count} configurations",
        draws=joined(draws) if draws else {},
        rounded_to=pair.rounded_to,
    )


def _all_discrete(pair: Pair, args: tuple[Any, ...]) -> Any:
    """The model's latents on these data, after checking that each has values that can be listed."""
    sites = {name: site for name, site in pair.sites(args)[0].items() if name in pair.latents}
    discrete = discrete_sites(sites)
    for name in sites:
        if name not in discrete:
            raise ValueError(
                f"The latent '{name}' is continuous, so its values cannot be enumerated. Use grid_integration where "
                "the continuous latents of a datum have one or two dimensions, annealed_importance_sampling for more."
            )
    return sites


def _scored(pair: Pair, args: tuple[Any, ...], tables: Values, count: int) -> tuple[Tensor, Tensor]:
    """log p(x, z) and log q(z given x) of every configuration, float64 `(count, batch)`."""
    encoded = pair.encode(*args)
    at_once = max(1, RUN_ROWS // len(args[0]))
    log_joint, log_q = [], []
    for first in range(0, count, at_once):
        num = min(at_once, count - first)
        z = {name: table[first : first + num] for name, table in tables.items()}
        log_joint.append(pair.log_joint(z, *args, num_samples=num))
        log_q.append(pair.log_q(encoded, z, *args, num_samples=num))
    return torch.cat(log_joint), torch.cat(log_q)


def _elbo(log_joint: Tensor, log_q: Tensor) -> Tensor:
    """Σ_z q log(p / q), with 0 log 0 = 0; NaN where the q listed do not sum to 1."""
    terms = torch.where(log_q.isneginf(), 0.0, log_q.exp() * (log_joint - log_q))
    return torch.where(log_q.logsumexp(0).abs() < SUM_TOLERANCE, terms.sum(0), nan)
