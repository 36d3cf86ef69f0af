"""Bounds for data of which some have a label."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch import Tensor

from ppl_vae.scoring import Program


class SemiSupervisedELBO(Trace_ELBO):
    """The ELBO of data with and without labels, and a classifier trained on the labels (Kingma et al., 2014).

    For a pair `model(x, label)`, `guide(x, label)` such as `M2`, with a latent class "y" and labels that are -1 where
    missing. The bound is that of log p(x, y) where there is a label, and where there is none that of log p(x),

        Σ_y q(y given x) E_q(z given x, y) [log p(x, y, z) − log q(z given x, y)] + H[q(y given x)],

    summed over every y (by Pyro's parallel enumeration). Where there is a label, q(y given x) has no part in the bound
    and would not learn from it; the gradient of alpha log q(label given x) is added to make it. That term is no part
    of any density, and none of the value: losses are the negative bound, in nats.

    Args:
        alpha: the weight of a label in the training of the classifier. The paper takes 0.1 times the number of all
            data for each datum with a label, over the number of those: 50 for 100 labels among 50,000. A label that
            is repeated in the data counts each time.

    Raises:
        ValueError: for a negative alpha.

    Reference:
        Kingma, Rezende, Mohamed & Welling, Semi-supervised Learning with Deep Generative Models, 2014, equations 7 to
        9. https://arxiv.org/abs/1406.5298

    Example:
        >>> from ppl_vae.training import fit    # doctest: +SKIP
        >>> fit(m2.model, m2.guide, x, label, objective=SemiSupervisedELBO(alpha=50.0))    # doctest: +SKIP
    """

    def __init__(self, *, alpha: float) -> None:
        super().__init__()
        if not alpha >= 0:
            raise ValueError(f"alpha is the weight of a label and cannot be negative; got {alpha!r}.")
        self.alpha = alpha
        self.unlabelled = TraceEnum_ELBO(max_plate_nesting=1)

    def differentiable_loss(self, model: Program, guide: Program, x: Tensor, label: Tensor) -> Tensor:
        """Minus the bound, summed over the batch, with the gradient of the classifier's loss in it."""
        known = label >= 0
        loss: Any = 0.0
        if not known.all():
            each_class = config_enumerate(guide, "parallel")
            loss = loss + self.unlabelled.differentiable_loss(model, each_class, x[~known], label[~known])
        if known.any():
            x, label = x[known], label[known]
            loss = loss + super().differentiable_loss(model, guide, x, label)
            log_q = self.alpha * _class_probabilities(guide, x).log_prob(label).sum()
            loss = loss - (log_q - log_q.detach())
        return loss

    def loss_and_grads(self, model: Program, guide: Program, x: Tensor, label: Tensor) -> float:
        """Adds the gradient of `differentiable_loss` to the parameters; its value."""
        loss = self.differentiable_loss(model, guide, x, label)
        loss.backward()
        return loss.item()

    def loss(self, model: Program, guide: Program, x: Tensor, label: Tensor) -> float:
        """The value of `differentiable_loss`, without gradients."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, x, label).item()


def _class_probabilities(guide: Program, x: Tensor) -> Any:
    """q(y given x), as the guide has it where there is no label."""
    unknown = torch.full((len(x),), -1, device=x.device)
    return poutine.trace(guide).get_trace(x, unknown).nodes["y"]["fn"]
