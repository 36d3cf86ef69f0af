"""Bounds for data of which some have a label."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch import Tensor

from ppl_vae.scoring import Program, scored_sites


class SemiSupervisedELBO(Trace_ELBO):
    """The ELBO of data with and without labels, and a classifier trained on the labels (Kingma et al., 2014).

    For a pair such as `M2`: `model(x, label)`, `guide(x, label)` where there are labels, `model(x)`, `guide(x)` where
    there are none, with a latent class "y" in both. Of a batch with labels, -1 where missing, the bound is that of
    log p(x, y) where there is a label, and where there is none that of log p(x),

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
        >>> import torch
        >>> from ppl_vae.semi_supervised import M2
        >>> m2 = M2((3,), num_classes=3, latent_dim=2)
        >>> x, label = torch.eye(3), torch.tensor([0, -1, -1])
        >>> SemiSupervisedELBO(alpha=10.0)(m2.model, m2.guide)(x, label).requires_grad
        True
    """

    def __init__(self, *, alpha: float) -> None:
        super().__init__()
        if not alpha >= 0:
            raise ValueError(f"alpha is the weight of a label and cannot be negative; got {alpha!r}.")
        self.alpha = alpha
        self.labelled, self.unlabelled = Trace_ELBO(), TraceEnum_ELBO(max_plate_nesting=1)

    def loss(self, model: Program, guide: Program, x: Tensor, label: Tensor) -> float:
        """Minus the bound, summed over the batch."""
        return sum(bound.loss(model, q, *data) for bound, q, data in self._parts(guide, x, label))

    def differentiable_loss(self, model: Program, guide: Program, x: Tensor, label: Tensor) -> Tensor:
        """Minus the bound, summed over the batch, with the gradient of the classifier's loss besides its own."""
        loss = sum(bound.differentiable_loss(model, q, *data) for bound, q, data in self._parts(guide, x, label))
        if (known := label >= 0).any():
            sites = scored_sites(poutine.trace(guide).get_trace(x[known]))
            log_q = self.alpha * sites["y"]["fn"].log_prob(label[known]).sum()
            loss = loss - (log_q - log_q.detach())
        return loss

    def loss_and_grads(self, model: Program, guide: Program, x: Tensor, label: Tensor) -> float:
        """Adds the gradient of `differentiable_loss` to the parameters; its value."""
        loss = self.differentiable_loss(model, guide, x, label)
        loss.backward()
        return loss.item()

    def _parts(self, guide: Program, x: Tensor, label: Tensor) -> Iterator[tuple[Any, Program, tuple[Tensor, ...]]]:
        """The bound, the guide and the data of what has no label and of what has one, where there are such."""
        known = label >= 0
        if not known.all():
            yield self.unlabelled, config_enumerate(guide, "parallel"), (x[~known],)
        if known.any():
            yield self.labelled, guide, (x[known], label[known])
