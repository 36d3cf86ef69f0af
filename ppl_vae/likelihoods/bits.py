"""The one currency: bits per dimension of the data's own levels, and why some numbers have none."""

from __future__ import annotations

from math import log

from torch import Tensor

from ppl_vae.data import AsIs, Dequantized, Levels, Logit, Scale
from ppl_vae.likelihoods.contract import DENSITY_ON_THE_INTERVAL, PROBABILITY_OF_COUNTS, Likelihood

# A probability is at most 1 to rounding and Monte Carlo noise, in nats per dimension.
ROUNDING = 1e-3
# A density of level + u has a mean of at most 1 over u, so that by Markov's inequality it exceeds e²⁰ once in 5e8 data.
MOST_LUCK = 20.0


def without_bits(likelihood: Likelihood, scale: Scale) -> str | None:
    """Why log-probabilities of this likelihood have no bits per dimension on data of this scale; None if they have.

    Example:
        >>> from ppl_vae.likelihoods import Binomial, Gaussian
        >>> without_bits(Binomial(levels=17), Levels(17)) is None
        True
        >>> without_bits(Gaussian(), Dequantized(17)) is None
        True
        >>> without_bits(Gaussian(), Levels(17))[:61]
        'Gaussian gives a density on the line, and the data are whole '
    """
    name, measure = type(likelihood).__name__, likelihood.measure
    start = f"{name} gives a {measure.name}, and the data are {scale.rule}"
    if measure == PROBABILITY_OF_COUNTS:
        return (
            f"{name} gives a {measure.name}, without end: there is no number of levels for bits per dimension to be "
            "compared with. Report nats."
        )
    if isinstance(scale, AsIs):
        return (
            f"{start}: bits per dimension are of data with a known number of levels. Report nats, or load levels (of "
            "type uint8)."
        )
    if measure.levels is not None:
        if measure.levels != scale.levels:
            return f"{start}, with {scale.levels} levels. Give the likelihood the levels of the data, or report nats."
        if not isinstance(scale, Levels):
            return f"{start}. Score `data.as_levels()`."
    elif not isinstance(scale, Dequantized):
        return (
            f'{start}: between levels the density can hide, and the narrower it is, the fewer the "bits", without '
            "limit. Score `data.dynamic_dequantization()`, or bin the density, as in "
            f"`likelihoods.DiscretisedGaussian({scale.levels})` or `likelihoods.Binned`, and score `data.as_levels()`."
        )
    elif measure == DENSITY_ON_THE_INTERVAL and isinstance(scale, Logit):
        return f"{start}, on the line. Score the dequantised data without their logit_transform()."
    return None


def bits_per_dim(log_px: Tensor, likelihood: Likelihood, x: Tensor, *, scale: Scale) -> Tensor:
    """The bits per dimension of the data's own levels, −(log p(x) + log |∂x/∂level|) / (D log 2) of each datum.

    Of a likelihood of levels, on data that are levels, ∂x/∂level = 1 and these are the bits of P(x). A density on
    dequantised levels, or on their logits, gives an *upper bound*: p(level + u) is the density of a level with noise u
    uniform on (0, 1), and −E_u log p(level + u) ≥ −log E_u p(level + u) = −log P(level). The bound is on the mean over
    u, for which many dimensions and many data stand in; that of one datum scatters with its noise. Numbers are
    comparable if D and the number of levels are the same.

    Args:
        log_px: log p(x) in nats, `(..., N)`.
        likelihood: the one that scored x; its `measure` says what log p(x) is.
        x: the data that were scored, `(N, ...)`.
        scale: of these data, `data.scale` of the `Data` that they are from.

    Returns:
        Bits per dimension, in the shape of `log_px`: 1 for a fair coin, 8 for uniform bytes.

    Raises:
        ValueError: for a density of levels to which no noise was added (see `without_bits`), for counts, for data of
            which no levels are known, for a likelihood of another number of levels than the data's; for data that do
            not lie on `scale`; for another number of data than of log-probabilities; and for a log p(x) that cannot
            be: NaN, or above what a probability can be.

    References:
        Theis, van den Oord & Bethge, A note on the evaluation of generative models, 2016.
        https://arxiv.org/abs/1511.01844

    Example:
        >>> import torch
        >>> import ppl_vae as pv
        >>> data = pv.data.load("digits").static_binarization()
        >>> x, likelihood = data.test[:3], pv.likelihoods.Bernoulli()
        >>> bits_per_dim(likelihood(torch.zeros(8, 8), event_dim=2).log_prob(x), likelihood, x, scale=data.scale)
        tensor([1., 1., 1.])
        >>> data = pv.data.load("digits").dynamic_dequantization()
        >>> x, likelihood = data.test[:3], pv.likelihoods.ContinuousBernoulli()
        >>> bits_per_dim(likelihood(torch.zeros(8, 8), event_dim=2).log_prob(x), likelihood, x, scale=data.scale)
        tensor([4.0875, 4.0875, 4.0875])
    """
    if reason := without_bits(likelihood, scale):
        raise ValueError(reason)
    if x.dim() == 0 or len(x) == 0 or log_px.dim() == 0 or log_px.shape[-1] != len(x):
        raise ValueError(
            f"Expected log p(x) of each datum, (..., N), and these data, (N, ...); got shapes {tuple(log_px.shape)} "
            f"and {tuple(x.shape)}. Give neither a mean nor a sum, and the data that were scored."
        )
    scale.check(x)
    num_dims = x[0].numel()
    log_p = log_px.double() + scale.log_jacobian(x).to(log_px.device)
    most = ROUNDING * num_dims + (0.0 if likelihood.measure.levels is not None else MOST_LUCK)
    impossible = ~(log_p <= most)
    if impossible.any():
        raise ValueError(
            f"{type(likelihood).__name__} on this scale gives levels a log-probability, at most 0; got log_px = "
            f"{log_px[impossible][0].item():.4g} for {num_dims} dimensions, where it is "
            f"{log_p[impossible][0].item():.4g}. It is of another likelihood or scale, or of noise that training has "
            "seen."
        )
    return (-log_p / (num_dims * log(2.0))).to(log_px.dtype)
