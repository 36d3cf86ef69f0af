"""The bound of data of which some have a label."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppl_vae.objectives.objective import Objective, Terms, drawn, scheduled
from ppl_vae.scoring import Pair, run, scored_sites


class SemiSupervisedELBO(Objective):
    """The ELBO of data with and without labels, and a classifier that learns from the labels (Kingma et al., 2014).

    For a pair `model(x, label)`, `guide(x, label)` such as `M2`, with a latent class "y" and labels that are -1 where
    missing. The bound is that of log p(x, y) where there is a label; where there is none it is that of log p(x),

        Σ_y q(y given x) E_q(z given x, y) [log p(x, y, z) − log q(z given x, y)] + H[q(y given x)],

    summed over every y, with one draw of z for each. Where there is a label, q(y given x) has no part in the bound and
    would learn nothing from it: the loss has −alpha log q(label given x) besides. That term is no part of any density,
    and neither of the bound of `terms`.

    Args:
        alpha: the weight of a label, at least 0. The paper takes 0.1 times the number of all data over that of labels:
            50 for 100 labels among 50,000. A label that is repeated in the data counts each time.

    Raises:
        ValueError: for a negative alpha; for a pair without a discrete "y"; and as for `ImportanceWeightedELBO`.

    Reference:
        Kingma, Rezende, Mohamed & Welling, Semi-supervised Learning with Deep Generative Models, 2014, equations 6 to
        9. https://arxiv.org/abs/1406.5298

    Example:
        >>> from ppl_vae.semi_supervised import M2
        >>> m2 = M2((3,), num_classes=5, latent_dim=2)
        >>> loss, bound = SemiSupervisedELBO(50.0).terms(m2.model, m2.guide, torch.eye(3), torch.tensor([4, -1, -1]))
        >>> bound.shape, bool(loss > -bound.sum())
        (torch.Size([3]), True)
    """

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = scheduled(self, "alpha", alpha)

    def __repr__(self) -> str:
        return f"SemiSupervisedELBO({self.alpha})"

    def _terms(self, pair: Pair, args: tuple[Any, ...]) -> Terms:
        x, label = args
        known = label >= 0
        q = _of_class(pair, x)
        bound = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        if known.any():
            bound[known] = _elbo(pair, x[known], label[known])
        if not known.all():
            every = q.enumerate_support(expand=False)
            bound[~known] = _summed_elbo(pair, x[~known], every, q.log_prob(every)[:, ~known])
        log_q = q.log_prob(label.clamp(min=0))[known]
        loss = -pair.layout.plate_scale(len(x)) * (bound.sum() + self.alpha * log_q.sum())
        return Terms(loss, bound.detach())


def _of_class(pair: Pair, x: Tensor) -> Any:
    """q(y given x), as the guide has it where there is no label."""
    sites = scored_sites(run(pair.guide, (x, _missing(x)), {}))
    if "y" not in sites or not sites["y"]["fn"].has_enumerate_support:
        raise ValueError(
            f"SemiSupervisedELBO sums over a discrete latent 'y', the class, but the guide draws {list(sites)}. Give "
            "both programs a site 'y', as M2 has it."
        )
    if others := [name for name in pair.without_rsample if name != "y"]:
        raise ValueError(
            f"No gradient flows through the draws of '{others[0]}' (its distribution has no rsample), so "
            "SemiSupervisedELBO would leave its part of the guide untrained."
        )
    return sites["y"]["fn"]


def _missing(x: Tensor) -> Tensor:
    return torch.full((len(x),), -1, device=x.device)


def _elbo(pair: Pair, x: Tensor, label: Tensor) -> Tensor:
    """The bound of log p(x, label), `(batch,)`, from a guide that draws nothing but the label."""
    _, z, log_q = drawn(pair, (x, label), 1)
    return (pair.log_joint(z, x, label, num_samples=1) - log_q).squeeze(0)


def _summed_elbo(pair: Pair, x: Tensor, every: Tensor, log_q: Tensor) -> Tensor:
    """The bound of log p(x), `(batch,)`: every class in the place of a sample, weighed by q(y given x)."""
    args, num_classes = (x, _missing(x)), len(every)
    given = {"y": pair.layout.canonical("y", every.expand(-1, len(x)))}
    guide = pair.strategy(pair.layout, pair.guide, args, given, num_classes)
    log_w = pair.log_joint(guide.values, *args, num_samples=num_classes) - guide.total
    return (log_q.exp() * log_w).sum(0)
