"""The log-probability of many bits at once, minus their cross-entropy, by a fraction of the logarithms."""

from __future__ import annotations

from torch import Tensor

FACTORS = 16  # of at most 2, so that their product is no larger than 2¹⁶


def log_prob_of_bits(logits: Tensor, x: Tensor) -> Tensor:
    """Σ x η − log(1 + e^η) over the last dimension, of logits η and bits x of one shape.

    x η − log(1 + e^η) = (x − ½) η − ½ |η| − log(1 + e^(−|η|)), and of the factors 1 + e^(−|η|), which lie between 1
    and 2, a few can be multiplied before the logarithm is taken: that is one exponential per number, and one logarithm
    per `FACTORS`.

    Example:
        >>> import torch
        >>> log_prob_of_bits(torch.zeros(5, 4), torch.ones(5, 4))[0]  # 4 log ½
        tensor(-2.7726)
    """
    size = logits.abs()
    linear = ((x - 0.5) * logits).sub_(size, alpha=0.5).sum(-1)
    groups = logits.shape[-1] // FACTORS  # of a tensor's size, which torch.jit.trace knows no divmod of
    decay = size.neg_().exp_()
    together, alone = decay[..., : groups * FACTORS], decay[..., groups * FACTORS :]
    product = (1 + together).unflatten(-1, (FACTORS, groups)).prod(-2)
    return linear - product.log().sum(-1) - alone.log1p().sum(-1)
