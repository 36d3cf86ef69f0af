"""Whether a guide misses a mode of the posterior: chains from the prior beside chains from the guide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppl_vae import scoring
from ppl_vae.evidence.annealing import AnnealedEvidence, annealed_importance_sampling
from ppl_vae.evidence.blocks import at_least_one, root_seed, seed_of
from ppl_vae.precision import Rounded
from ppl_vae.proposals import Guide, Prior
from ppl_vae.scoring import Program


@dataclass(frozen=True, eq=False, repr=False)
class ModeCheck(Rounded):
    """Chains from the guide and chains from the prior on the same data: do they find the same mass?

    Attributes:
        index: which data, `(M,)`.
        from_guide: their evidence by annealing from the guide.
        from_prior: by annealing from the prior, which visits modes that the guide does not know of.
    """

    index: Tensor
    from_guide: AnnealedEvidence
    from_prior: AnnealedEvidence

    @property
    def missed(self) -> Tensor:
        """Where the prior's chains found more than the guide's, by over 4.5 standard errors and 0.1 nats, `(M,)`."""
        more = self.from_prior.log_px - self.from_guide.log_px
        error = self.from_prior.standard_error.hypot(self.from_guide.standard_error)
        return (more > 4.5 * error) & (more > 0.1)

    @property
    def conclusion(self) -> str:
        """What to think of a check without warnings."""
        return f"Chains from the prior find no more mass for the {len(self.index)} data that were tried."

    def summary(self) -> None:
        """Prints both means and what follows from them."""
        print(self)

    def __repr__(self) -> str:
        return f"ModeCheck({int(self.missed.sum())} of {len(self.index)} data missed a mode)"

    def __str__(self) -> str:
        lines = [
            f"{evidence.method}: {evidence.mean:.3f} ± {evidence.mc_standard_error:.3f} over {len(self.index)} data"
            for evidence in (self.from_guide, self.from_prior)
        ]
        warnings = self.warnings()
        return "\n".join([*lines, *([] if warnings else [self.conclusion]), *(f"! {warning}" for warning in warnings)])

    def warnings(self) -> list[str]:
        """In sentences, what the guide's chains have missed, or why the check could not tell."""
        found = self._rounding()
        if count := int(self.missed.sum()):
            most = (self.from_prior.log_px - self.from_guide.log_px)[self.missed].max().item()
            found.append(
                f"Chains from the prior find more mass than chains from the guide for {count} of {len(self.index)} "
                f"data, up to {most:.2f} nats: the guide misses a part of their posteriors, and numbers from it are "
                "too low."
            )
        behind = int((self.from_prior.log_px < self.from_guide.log_px - 1).sum())
        if behind > len(self.index) / 2:
            found.append(
                f"Chains from the prior stay more than a nat below those from the guide for {behind} of "
                f"{len(self.index)} data: with so few temperatures they cannot tell whether the guide misses a mode."
            )
        return found


def mode_check(
    model: Program,
    guide: Program,
    *args: Any,
    num_data: int = 8,
    num_chains: int = 16,
    num_temperatures: int = 1000,
    num_leapfrog: int = 5,
    seed: int | None = 0,
    compile: bool = False,
) -> ModeCheck:
    """Anneals some of the data from the guide and from the prior, to see whether the guide misses a mode.

    All that starts from a guide inherits what the guide does not know of, and no diagnostic of its weights can show it.
    Chains from the prior start everywhere, and need many more temperatures.

    Args:
        model: p(x, z).
        guide: q(z given x).
        *args: the data, `(N, ...)`, and what else both programs take.
        num_data: how many of them, evenly spread.
        num_chains: K, for each datum and start.
        num_temperatures: T, from the prior; from the guide a quarter.
        num_leapfrog: L.
        seed: of the draws.
        compile: as in `annealed_importance_sampling`.

    Returns:
        A `ModeCheck`; its `missed` is true where the prior's chains found more.

    Raises:
        ValueError: as `annealed_importance_sampling`; for a pair that runs on all its data or not at all when these are
            fewer.

    Reference:
        Grosse, Ancha & Roy, Measuring the Reliability of MCMC Inference with Bidirectional Monte Carlo, 2016.
        https://arxiv.org/abs/1606.02275

    Example:
        >>> from ppl_vae.linear_gaussian import LinearGaussian
        >>> lg = LinearGaussian(torch.tensor([[1.0], [2.0], [0.5]]), mean=0.0, noise=0.7)
        >>> mode_check(lg.model, lg.guide, lg.model(num_data=7), num_data=3, num_temperatures=100).missed
        tensor([False, False, False])
    """
    available, wanted = scoring.check_data(*args), at_least_one("num_data", num_data)
    index = torch.linspace(0, available - 1, min(wanted, available)).round().long()
    some = scoring.rows(args, index.to(args[0].device))
    root = root_seed(seed)
    guided, prior = (
        annealed_importance_sampling(
            model,
            guide,
            *some,
            num_chains=num_chains,
            num_temperatures=temperatures,
            num_leapfrog=num_leapfrog,
            proposal=proposal,
            seed=seed_of(root, temperatures),
            compile=compile,
        )
        for proposal, temperatures in ((Guide(), max(1, num_temperatures // 4)), (Prior(), num_temperatures))
    )
    return ModeCheck(index, guided, prior, rounded_to=guided.rounded_to)
