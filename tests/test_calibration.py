"""The probability integral transform: uniform for a model that is right, discrete or not, and for no other."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any

import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from ppl_vae.diagnostics import calibration
from ppl_vae.diagnostics import probability_integral_transform as transform


def is_uniform(u: Tensor) -> bool:
    """Whether the counts of 10 bins, and the first two moments, are within 4.5 standard errors of uniform ones."""
    n = u.numel()
    counts = torch.histc(u, 10, 0, 1)
    return bool(
        ((counts - n / 10).abs() < 4.5 * sqrt(n * 0.09)).all()
        and (u.mean() - 1 / 2).abs() < 4.5 * sqrt(1 / 12 / n)
        and (u.square().mean() - 1 / 3).abs() < 4.5 * sqrt(4 / 45 / n)
    )


def levels_that_are_drawn(num_data: int) -> tuple[Any, Any, Tensor]:
    """A discrete model and its exact posterior: x_d given z is Binomial, and z is nearly known from a first number."""

    def model(x: Tensor | None = None, num_data: int = 1) -> Any:
        with pyro.plate("data", num_data if x is None else len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3).double()))
            return pyro.sample(
                "x", dist.Binomial(3, (0.2 + 0.5 * z).unsqueeze(-1).expand(*z.shape, 5)).to_event(1), obs=x
            )

    def guide(x: Tensor) -> None:
        likelihood = torch.stack([dist.Binomial(3, p).log_prob(x).sum(-1) for p in (0.2, 0.7)])
        odds = likelihood[1] - likelihood[0] + torch.tensor(0.3 / 0.7).double().log()
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=odds))

    with torch.random.fork_rng():
        torch.manual_seed(5)
        return model, guide, model(num_data=num_data).double()


def densities_are_uniform() -> None:
    lg = pairs.linear_gaussian()
    assert is_uniform(transform(lg.model, lg.guide, pairs.simulated(lg, 701)))
    assert is_uniform(transform(lg.model, lg.guide, pairs.simulated(lg, 701), num_draws=2))


def levels_are_uniform() -> None:
    model, guide, x = levels_that_are_drawn(997)
    u = transform(model, guide, x)
    assert is_uniform(u)
    # Independent too: of different numbers of a datum they do not go together.
    assert (torch.corrcoef(u.T) - torch.eye(5)).abs().max() < 4.5 / sqrt(997)


STATEMENTS: dict[str, Callable[[], None]] = {f.__name__: f for f in (densities_are_uniform, levels_are_uniform)}


@pytest.mark.parametrize("statement", STATEMENTS)
def test_statement(statement: str) -> None:
    STATEMENTS[statement]()


def does_not_randomise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand_like", lambda value: torch.full_like(value, 0.5))


def always_ranks_highest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "rand_like", torch.ones_like)


def takes_z_from_the_prior(monkeypatch: pytest.MonkeyPatch) -> None:
    right = calibration.Pair.draw_prior

    def draw(self: Any, encoded: Any, *args: Any, num_samples: int) -> Any:
        return right(self, *args, num_samples=num_samples), None

    monkeypatch.setattr(calibration.Pair, "draw", draw)


@pytest.mark.parametrize(
    ("mutant", "statement"),
    [
        (does_not_randomise, "levels_are_uniform"),
        (always_ranks_highest, "levels_are_uniform"),
        (takes_z_from_the_prior, "levels_are_uniform"),
        (takes_z_from_the_prior, "densities_are_uniform"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_wrong_transform_is_caught(mutant: Any, statement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        STATEMENTS[statement]()


@pytest.mark.parametrize("form", pairs.FORMS)
def test_every_form_of_a_pair(form: str) -> None:
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg)
    model, guide = pairs.FORMS[form](lg, lg.posterior)
    u = transform(model, guide, x)
    assert u.shape == x.shape
    assert ((u > 0) & (u < 1)).all()
    # The rows are those of the data: what is far above all predictions ranks highest there.
    x[3, 2] += 100.0
    rank = transform(model, guide, x)[3]
    assert rank[2] > 0.98


@pytest.mark.parametrize(("factor", "shape"), [(0.5, "ends"), (2.0, "middle")])
def test_a_scale_that_is_wrong_has_its_shape(factor: float, shape: str) -> None:
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg, 499)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pairs.prior(lg))
            pyro.sample("x", dist.Normal(z @ lg.w.T + lg.mean, factor * lg.noise).to_event(1), obs=x)

    u = transform(model, lg.guide, x)
    assert not is_uniform(u)
    at_the_ends = ((u < 0.1) | (u > 0.9)).double().mean()
    assert at_the_ends > 0.3 if shape == "ends" else at_the_ends < 0.1


def test_draws_depend_on_the_seed_and_leave_no_trace(rng_unchanged: None) -> None:
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg)
    one, two, other = (transform(lg.model, lg.guide, x, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_what_is_refused() -> None:
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg)
    with pytest.raises(ValueError, match="num_draws must be an integer"):
        transform(lg.model, lg.guide, x, num_draws=0)

    def masked(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pairs.prior(lg))
            with poutine.mask(mask=x[:, 0] > 0):
                pyro.sample("x", pairs.conditional(lg, z).to_event(1), obs=x)

    with pytest.raises(ValueError, match="'x' is masked"):
        transform(masked, lg.guide, x)
