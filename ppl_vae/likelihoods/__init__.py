"""p(x given z): `nn.Module`s, decoder features to a `Distribution` over x.

The contract, whatever the family:

* `likelihood.num_parameters` numbers per data dimension come from the decoder, stacked along the first data
  dimension: for a vector of 784 features are `(..., num_parameters * 784)`, for a colour image
  `(..., num_parameters * 3, 32, 32)`.
* `likelihood(features, event_dim=1)` is a distribution of event shape `data_shape`; `event_dim` is
  `len(data_shape)`.
* `likelihood.measure` says what a log-probability of it is.
* `likelihood.inputs(x)` is x on the scale of networks, which is what the encoder of a `VAE` is given.

Which data a family scores, and what its log-probability is:

    {0, 1}            probability    Bernoulli
    levels 0..L-1     probability    DiscretisedLogistic  DiscretisedGaussian  Binned  LogisticMixture  Categorical
                                     Binomial
    counts 0, 1, ...  probability    Poisson  NegativeBinomial  ZeroInflatedNegativeBinomial
    [0, 1]            density        ContinuousBernoulli  Beta (without the ends)
    real numbers      density        Gaussian  Laplace  Logistic  StudentT

The one currency of these is `bits_per_dim`, of probabilities of levels, and of densities on dequantised levels;
`without_bits` says why others have none. `bce_score` is no log-probability at all, and is called what it is.
"""

from ppl_vae.likelihoods.binary import Bernoulli, bce_score
from ppl_vae.likelihoods.binned import Binned, DiscretisedGaussian, DiscretisedLogistic
from ppl_vae.likelihoods.bits import bits_per_dim, without_bits
from ppl_vae.likelihoods.contract import Likelihood, Measure
from ppl_vae.likelihoods.counts import NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from ppl_vae.likelihoods.interval import Beta, ContinuousBernoulli
from ppl_vae.likelihoods.levels import Binomial, Categorical
from ppl_vae.likelihoods.line import ROUNDING_SCALE, Gaussian, Laplace, LocationScale, Logistic, StudentT
from ppl_vae.likelihoods.mixture import LogisticMixture

__all__ = [
    "ROUNDING_SCALE",
    "Bernoulli",
    "Beta",
    "Binned",
    "Binomial",
    "Categorical",
    "ContinuousBernoulli",
    "DiscretisedGaussian",
    "DiscretisedLogistic",
    "Gaussian",
    "Laplace",
    "Likelihood",
    "LocationScale",
    "Logistic",
    "LogisticMixture",
    "Measure",
    "NegativeBinomial",
    "Poisson",
    "StudentT",
    "ZeroInflatedNegativeBinomial",
    "bce_score",
    "bits_per_dim",
    "without_bits",
]
