"""The coin: closed form, curve, SVI and the Beta-Bernoulli evidence agree."""

from __future__ import annotations

from math import comb, log

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO

from ppl_vae import coin


@pytest.fixture
def tosses() -> torch.Tensor:
    return torch.cat([torch.ones(400), torch.zeros(600)])


def test_400_heads_in_1000_tosses(tosses: torch.Tensor) -> None:
    assert coin.maximum_likelihood(tosses) == pytest.approx(0.4)
    result = coin.fit(tosses)
    assert result.probability == pytest.approx(0.4, abs=1e-3)
    assert result.losses[-1] == pytest.approx(-coin.log_likelihood(0.4, tosses).item(), abs=1e-3)
    assert coin.fit(tosses.tolist()).probability == pytest.approx(0.4, abs=1e-3)


@pytest.mark.parametrize("heads", [0, 1, 9, 10])
def test_other_coins(heads: int) -> None:
    tosses = torch.cat([torch.ones(heads), torch.zeros(10 - heads)])
    assert coin.fit(tosses, num_steps=3000, learning_rate=0.5).probability == pytest.approx(heads / 10, abs=2e-3)


def test_fit_keeps_to_its_own_parameter_store(tosses: torch.Tensor) -> None:
    mine = pyro.param("probability", torch.tensor(0.123))
    coin.fit(tosses, num_steps=5)
    coin.fit(tosses, num_steps=5)
    assert pyro.param("probability").item() == pytest.approx(0.123)
    assert set(pyro.get_param_store().keys()) == {"probability"}
    assert mine.item() == pytest.approx(0.123)


def test_the_curve_is_the_likelihood(tosses: torch.Tensor) -> None:
    p = torch.linspace(0.001, 0.999, 999)
    curve = coin.log_likelihood(p, tosses)
    assert curve.shape == p.shape
    assert p[curve.argmax()].item() == pytest.approx(0.4, abs=1e-3)
    assert coin.log_likelihood(0.4, tosses).item() == pytest.approx(400 * log(0.4) + 600 * log(0.6))
    assert coin.log_likelihood(0.0, tosses).item() == -float("inf")
    assert coin.log_likelihood(0.0, torch.zeros(3)).item() == 0.0
    # the negative ELBO of an empty guide is the negative log-likelihood
    loss = Trace_ELBO().loss(coin.model, coin.guide, tosses)
    assert loss == pytest.approx(-coin.log_likelihood(0.5, tosses).item(), rel=1e-6)


def test_beta_bernoulli_sums_to_one_over_all_tosses() -> None:
    pair = coin.BetaBernoulli(2.0, 3.0)
    every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 7)
    assert pair.log_px(every).exp().sum().item() == pytest.approx(1, abs=1e-10)
    # in any order: the binomial coefficient is not in it
    by_heads = [comb(7, s) * pair.log_px(torch.cat([torch.ones(s), torch.zeros(7 - s)])[None]).exp() for s in range(8)]
    assert torch.cat(by_heads).sum().item() == pytest.approx(1, abs=1e-10)


def test_beta_bernoulli_against_quadrature() -> None:
    pair = coin.BetaBernoulli(2.0, 3.0)
    tosses = torch.bernoulli(torch.full((5, 11), 0.4))
    p = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    prior = torch.distributions.Beta(torch.tensor(2.0).double(), torch.tensor(3.0).double()).log_prob(p).exp()
    for row, log_px in zip(tosses, pair.log_px(tosses), strict=True):
        likelihood = coin.log_likelihood(p, row).exp()
        assert torch.trapezoid(prior * likelihood, p).log().item() == pytest.approx(log_px.item(), abs=1e-6)


def test_beta_bernoulli_posterior_counts() -> None:
    posterior = coin.BetaBernoulli(2.0, 3.0).posterior(torch.tensor([[1.0, 1.0, 0.0]]))
    assert posterior.concentration1.tolist() == [4.0]
    assert posterior.concentration0.tolist() == [4.0]


def test_bad_tosses_are_refused() -> None:
    with pytest.raises(ValueError, match="There are no tosses"):
        coin.fit([])
    for bad in ([0.5, 1.0], [2.0], [float("nan")]):
        with pytest.raises(ValueError, match="A toss is 0 or 1; got values from"):
            coin.fit(bad)
        with pytest.raises(ValueError, match="A toss is 0 or 1"):
            coin.BetaBernoulli().log_px(torch.tensor([bad]))
    with pytest.raises(TypeError, match="must be a tensor"):
        coin.log_likelihood(0.5, [1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be positive; got 0"):
        coin.BetaBernoulli(0, 1)
