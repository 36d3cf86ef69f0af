"""What is labelled bits per dimension is that: a code of that length exists for the data's own levels."""

from __future__ import annotations

from math import log

import hypothesis.strategies as st
import pytest
import torch
from families import FAMILIES
from hypothesis import given, settings

from ppl_vae.likelihoods import (
    Bernoulli,
    Binned,
    Categorical,
    ContinuousBernoulli,
    DiscretisedGaussian,
    DiscretisedLogistic,
    Gaussian,
    Likelihood,
    Measure,
    Poisson,
    bits_per_dim,
)


def test_measures() -> None:
    assert Bernoulli().measure.levels == 2
    assert Gaussian().measure.levels is None
    assert Bernoulli().measure != Gaussian().measure
    assert Bernoulli().measure == Categorical(2).measure
    assert DiscretisedGaussian().measure == DiscretisedLogistic().measure == Categorical().measure
    assert Categorical(17).measure == Measure("probability on {0, ..., 16}", 17)
    assert ContinuousBernoulli().measure != Gaussian().measure


def test_uniform_bytes_have_eight_bits() -> None:
    x = torch.randint(256, (5, 7)).float()
    for likelihood in (Categorical(256), Binned(ContinuousBernoulli(), 256)):
        p = likelihood(torch.zeros(likelihood.num_parameters * 7))
        torch.testing.assert_close(bits_per_dim(p.log_prob(x), likelihood, 7), torch.full((5,), 8.0))
    bits = bits_per_dim(torch.tensor([-64 * log(2), -32 * log(2)]), Bernoulli(), num_dims=64)
    torch.testing.assert_close(bits, torch.tensor([1.0, 0.5]))


def test_what_has_no_bits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Gaussian gives a density on the line; bits per dimension are defined for"):
        bits_per_dim(torch.tensor(-1.0), Gaussian(), num_dims=64)
    with pytest.raises(ValueError, match=r"Poisson gives a probability on counts .* Report nats"):
        bits_per_dim(torch.tensor(-1.0), Poisson(), num_dims=64)
    with pytest.raises(ValueError, match=r"at most 0; got log_px = 1400\. It is the log-density of another likelihood"):
        bits_per_dim(torch.tensor([-3.0, 1400.0]), DiscretisedLogistic(), num_dims=64)
    for bad in (0, -1, 2.5):
        with pytest.raises(ValueError, match="how many dimensions one datum has, at least 1; got"):
            bits_per_dim(torch.tensor(-1.0), Bernoulli(), num_dims=bad)  # type: ignore[arg-type]


def kraft_sum(likelihood: Likelihood, features: torch.Tensor, levels: int) -> float:
    """The sum of 2^−bits over all levels: of a code for them, at most 1."""
    x = torch.arange(float(levels)).unsqueeze(-1)
    return (2.0 ** -bits_per_dim(likelihood(features).log_prob(x).double(), likelihood, 1)).sum().item()


@settings(deadline=None, max_examples=300)
@given(
    name=st.sampled_from(sorted(FAMILIES)),
    case=st.integers(0, 10**6),
    x=st.one_of(st.integers(-1, 300).map(float), st.floats(-1, 300, width=32)),
)
def test_nothing_is_labelled_bits_that_is_not(name: str, case: int, x: float) -> None:
    """Either a family refuses, or x is one of its levels and the bits are those of a code of all levels."""
    likelihood = FAMILIES[name].make()
    features = FAMILIES[name].features[case % len(FAMILIES[name].features)]
    try:
        bits = bits_per_dim(likelihood(features).log_prob(torch.tensor([x])), likelihood, num_dims=1)
    except ValueError as error:
        assert len(str(error)) > 80  # noqa: PT017 - in words
        return
    levels = likelihood.measure.levels
    assert levels is not None
    assert x in range(levels)
    assert bits >= -1e-6
    assert kraft_sum(likelihood, features, levels) == pytest.approx(1, abs=1e-4 if levels > 256 else 2e-6)
