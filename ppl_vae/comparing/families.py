"""Which likelihoods there are for some data, and what the data must be for each of them."""

from __future__ import annotations

from ppl_vae import likelihoods as lh
from ppl_vae.data import Data
from ppl_vae.likelihoods import Likelihood

# How far from 0 and 1 the logit of dequantised levels is taken: with less, the lowest level of dark images is spread so
# far out that it rules the scale of everything.
MARGIN = 0.05
# With more, a table of all levels for each data dimension is too large for a default.
MOST_CATEGORIES = 32


def prepared(data: Data, likelihood: Likelihood, *, seed: int = 0) -> Data:
    """Data on the scale that a likelihood scores; what has been prepared already stays as it is.

    Bits for a family of two levels (`Data.dynamic_binarization`), levels for families of levels and of counts
    (`Data.as_levels`), dequantised levels for densities (`Data.dynamic_dequantization`). What is drawn is drawn anew in
    each epoch of training, and once for the test data. Data of which no levels are known are left as they are.

    Args:
        data: as loaded, or prepared for a likelihood of this measure.
        likelihood: one of `likelihoods`.
        seed: of what is drawn for the test data.

    Raises:
        ValueError: for data that cannot be made what the likelihood scores, as `Data` says.

    Example:
        >>> from ppl_vae.data import load
        >>> prepared(load("digits"), lh.Gaussian()).scale
        Dequantized(levels=17)
    """
    if data.levels is None or data.dequantization != "none":
        return data
    if likelihood.measure.levels == 2:
        return data if data.levels == 2 else data.dynamic_binarization(seed=seed)
    if likelihood.measure.levels is not None or likelihood.measure == lh.Poisson.measure:
        return data.as_levels()
    return data.dynamic_dequantization(seed=seed)


def families(data: Data, *, seed: int = 0) -> dict[str, tuple[Likelihood, Data]]:
    """The likelihoods that have a place in a comparison on these data, by name, each with the data it scores.

    Scales come from the decoder for each data dimension, but for "gaussian", which learns one for all.

    Args:
        data: as loaded.
        seed: of what is drawn for the test data.

    Example:
        >>> from ppl_vae.data import load
        >>> len(families(load("digits"))), list(families(load("digits").thresholded()))
        (18, ['bernoulli'])
    """
    levels, found = data.levels, dict[str, Likelihood]()
    if levels is not None:
        found["bernoulli"] = lh.Bernoulli()
    if levels is not None and levels > 2:
        found |= {
            "discretised-logistic": lh.DiscretisedLogistic(levels, per_pixel=True),
            "discretised-gaussian": lh.DiscretisedGaussian(levels, per_pixel=True),
            "binned-laplace": lh.Binned(lh.Laplace(per_pixel=True), levels),
            "binned-continuous-bernoulli": lh.Binned(lh.ContinuousBernoulli(), levels),
            "logistic-mixture": lh.LogisticMixture(3, levels),
            "binomial": lh.Binomial(levels),
        }
        if levels <= MOST_CATEGORIES:
            found["categorical"] = lh.Categorical(levels)
        found |= {"continuous-bernoulli": lh.ContinuousBernoulli(), "beta": lh.Beta()}
    if levels != 2:
        found |= {
            "gaussian": lh.Gaussian(),
            "gaussian-per-pixel": lh.Gaussian(per_pixel=True),
            "laplace": lh.Laplace(per_pixel=True),
            "student-t": lh.StudentT(per_pixel=True),
        }
    if levels is not None and levels > 2:
        found |= {
            "poisson": lh.Poisson(),
            "negative-binomial": lh.NegativeBinomial(per_pixel=True),
            "zero-inflated-negative-binomial": lh.ZeroInflatedNegativeBinomial(per_pixel=True),
        }
    pairs = {name: (likelihood, prepared(data, likelihood, seed=seed)) for name, likelihood in found.items()}
    if "gaussian" in pairs and levels is not None:
        logits = pairs["gaussian"][1].logit_transform(margin=MARGIN)
        pairs["gaussian-on-logits"] = lh.Gaussian(per_pixel=True), logits
    return pairs
