"""Whether data look like draws of p(x given z): the probability integral transform."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from torch import Tensor

from ppl_vae import scoring
from ppl_vae.diagnostics.diagnosis import BLOCK_DATA
from ppl_vae.evidence.blocks import Block, at_least_one, blocks, looked_at, root_seed, start_from
from ppl_vae.scoring import Pair, Program
from ppl_vae.scoring.inspection import mask_of
from ppl_vae.scoring.running import run, scored_sites


def probability_integral_transform(
    model: Program, guide: Program, *args: Any, num_draws: int = 99, seed: int | None = 0
) -> Tensor:
    """Where each number of the data lies among draws of p(x given z), z ~ q(z given x): uniform if the model is right.

    u = (how many of K draws x' ~ p(x given z) are below x + v (1 + how many are equal)) / (K + 1), v uniform on (0, 1):
    the transform F(x given z) by ranks, randomised where values tie, as levels and counts do. If the data come from the
    model and q is the posterior, (x, z) is a draw of their joint and all u are uniform and independent, exactly so for
    any K. A histogram of u that is high at both ends says that p(x given z) is too narrow, or its location wrong; high
    in the middle, too wide. What q misses of the posterior shows as well.

    Args:
        model: p(x, z), a Pyro program whose sites all lie in one plate over the data.
        guide: q(z given x), with the same arguments.
        *args: the data, `(N, ...)`, and what else both programs take.
        num_draws: K, for each datum and its one z.
        seed: of all draws; None takes it from the global random state.

    Returns:
        float64 `(N, D)` in (0, 1), D being how many observed numbers a datum has.

    Raises:
        TypeError: when the data are not a tensor.
        ValueError: as `importance_sampling`; for observed values that are masked.

    References:
        Czado, Gneiting & Held, Predictive Model Assessment for Count Data, 2009 (randomisation).
        https://doi.org/10.1111/j.1541-0420.2009.01191.x

    Example:
        >>> from ppl_vae.linear_gaussian import LinearGaussian
        >>> lg = LinearGaussian(torch.tensor([[1.0], [2.0], [0.5]]), mean=0.0, noise=0.7)
        >>> u = probability_integral_transform(lg.model, lg.guide, lg.model(num_data=500))
        >>> u.shape, bool((u.mean() - 0.5).abs() < 4.5 / (12 * u.numel()) ** 0.5)
        (torch.Size([500, 3]), True)
    """
    num_draws, root = at_least_one("num_draws", num_draws), root_seed(seed)
    scoring.check_data(*args)
    with looked_at(model, guide, *args) as pair:
        return torch.cat([_ranks(pair, block, num_draws, root) for block in blocks(pair, args, BLOCK_DATA)])


def _ranks(pair: Pair, block: Block, num_draws: int, root: int) -> Tensor:
    start_from(root, block.start)
    with pyro.validation_enabled(True):
        z, _ = pair.draw(pair.encode(*block.args), *block.args, num_samples=1)
        given = {name: pair.layout.natural(name, z[name])[0] for name in pair.latents}
        sites = scored_sites(run(pair.model, block.args, given))
    columns = []
    for name, site in sites.items():
        if name in given:
            continue
        if not mask_of(site).all():
            raise ValueError(
                f"Some of what the model observes at '{name}' is masked, and has no place among draws. Give data that "
                "are observed as a whole."
            )
        fn, value = site["fn"], site["value"]
        below, equal = torch.zeros_like(value, dtype=torch.float64), torch.ones_like(value, dtype=torch.float64)
        for _ in range(num_draws):
            draw = fn.sample()
            below, equal = below + (draw < value), equal + (draw == value)
        u = (below + torch.rand_like(below) * equal) / (num_draws + 1)
        rows = u.movedim(len(fn.batch_shape) + pair.layout.dim, 0)
        columns.append(rows.reshape(len(rows), -1))
    return torch.cat(columns, 1)
