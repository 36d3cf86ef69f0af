"""Bounds from both sides: on the right side in expectation, and labelled as what they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import log, sqrt
from typing import Any

import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import ppl_vae as pv
from ppl_vae.evidence import (
    Evidence,
    annealed_importance_sampling,
    bounding,
    bounds,
    importance_sampling,
    mode_check,
    sandwich,
)
from ppl_vae.evidence.annealing import Path, Schedule

FEW = {"num_chains": 5, "num_temperatures": 4, "num_leapfrog": 2}


# ---------------------------------------------------------------------------------------------------------------
# Statements that hold for the right bounds and for none of the wrong ones below.


def exact_posterior_gives_the_exact_value() -> None:
    lg = pairs.linear_gaussian()
    for temperatures in (1, 7):
        found = sandwich(lg.model, lg.guide, num_data=13, num_chains=5, num_temperatures=temperatures, num_leapfrog=2)
        exact = lg.log_px(found.args[0])
        for value in (found.lower, found.upper, found.reverse):
            assert (value - exact).abs().max() < 1e-9


def simulated_data_are_bracketed() -> None:
    """Averaged over 1,000 data lower ≤ exact ≤ upper ≤ reverse, and E[exp(−reverse)] = 1 / p(x)."""
    lg = pairs.linear_gaussian()
    found = sandwich(lg.model, lg.perturbed_guide(shift=0.8), num_data=1009, **FEW)
    exact = lg.log_px(found.args[0])
    assert found.reverse is not None
    below, above, far = exact - found.lower, found.upper - exact, found.reverse - exact
    for gap in (below, above, far, found.reverse - found.upper):
        assert gap.mean() > -3 * gap.std() / sqrt(len(gap))
    assert above.mean() > 4.5 * above.std() / sqrt(len(above))  # few temperatures: the gaps are there to be seen
    assert below.mean() > 4.5 * below.std() / sqrt(len(below))
    for ratio in ((-far).exp(), (-above).exp(), (-below).exp()):
        assert abs(ratio.mean() - 1) < 4.5 * ratio.std() / sqrt(len(ratio))


def more_temperatures_close_the_sandwich() -> None:
    lg = pairs.linear_gaussian()
    guide = lg.perturbed_guide(shift=1.0, spread=0.8)
    gaps = []
    for temperatures in (1, 5, 80):
        found = sandwich(lg.model, guide, num_data=307, num_chains=5, num_temperatures=temperatures)
        exact = lg.log_px(found.args[0])
        assert found.reverse is not None
        gaps.append(((exact - found.lower).mean(), (found.upper - exact).mean(), (found.reverse - exact).mean()))
    for side in zip(*gaps, strict=True):
        assert side[0] > side[1] > side[2] > -0.02
        assert side[2] < 0.05


def the_tangent_is_above_on_average() -> None:
    """By as much as log p̂ is below: E[U] − log p = ½ Var(log c) to leading order."""
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg, num_data=1511)
    estimate = partial(importance_sampling, num_samples=11)
    found = bounds(lg.model, lg.perturbed_guide(spread=1.5), x, estimators=[estimate], num_mode_checks=0)
    exact = lg.log_px(x)
    above, below = found.upper - exact, exact - found.lower
    for gap in (above, below):
        assert gap.mean() > 4.5 * gap.std() / sqrt(len(x))
    assert (found.width > 0).all()
    assert abs((above - below).mean()) < 4.5 * (above - below).std() / sqrt(len(x))


STATEMENTS: dict[str, Callable[[], None]] = {
    f.__name__: f
    for f in (
        exact_posterior_gives_the_exact_value,
        simulated_data_are_bracketed,
        more_temperatures_close_the_sandwich,
        the_tangent_is_above_on_average,
    )
}


@pytest.mark.parametrize("statement", STATEMENTS)
def test_statement(statement: str) -> None:
    STATEMENTS[statement]()


def reverse_of_wrong_sign(backward: Any) -> Any:
    return lambda self, schedule, u: -backward(self, schedule, u)


def weight_after_the_move_backwards(backward: Any) -> Any:
    def wrong(self: Path, schedule: Schedule, u: Tensor) -> Tensor:
        state = self.at(u)
        log_w = torch.zeros_like(state.log_end)
        for number in range(len(schedule.temperatures) - 1, 0, -1):
            rise = schedule.temperatures[number] - schedule.temperatures[number - 1]
            state, _ = self.move(state, schedule.temperatures[number - 1], schedule.step_sizes[number - 1])
            log_w = log_w + rise * state.log_ratio
        return log_w

    return wrong


def starts_from_the_guide(backward: Any) -> Any:
    """Backwards from what is no exact draw."""
    return lambda self, schedule, u: backward(self, schedule, self.target.draw_guide(1))


def pilot_data_again(estimator: Any) -> Any:
    """Both runs with the same draws."""

    def wrong(*args: Any, seed: int, **kwargs: Any) -> Evidence:
        return estimator(*args, seed=0, **kwargs)

    return wrong


@pytest.mark.parametrize(
    ("mutation", "statement"),
    [
        (reverse_of_wrong_sign, "exact_posterior_gives_the_exact_value"),
        (reverse_of_wrong_sign, "simulated_data_are_bracketed"),
        (weight_after_the_move_backwards, "simulated_data_are_bracketed"),
        (starts_from_the_guide, "simulated_data_are_bracketed"),
        (starts_from_the_guide, "more_temperatures_close_the_sandwich"),
    ],
)
def test_a_wrong_reverse_chain_is_caught(mutation: Any, statement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "backward", mutation(Path.backward))
    with pytest.raises(AssertionError):
        STATEMENTS[statement]()


def test_a_pilot_used_twice_is_caught() -> None:
    """The tangent at a value of the same draws is that value: no bound."""
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg)
    estimate = pilot_data_again(importance_sampling)
    found = bounds(lg.model, lg.perturbed_guide(), x, estimators=[estimate], num_mode_checks=0)
    assert torch.equal(found.upper, found.lower)


def test_real_data_cannot_pass_for_simulated() -> None:
    """Values given to `sandwich` are shapes to it: only what it draws itself is scored."""
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg)
    one, two = (sandwich(lg.model, lg.perturbed_guide(), data, num_data=7, **FEW) for data in (x, 100 + 3 * x))
    assert torch.equal(one.lower, two.lower)
    assert torch.equal(one.args[0], two.args[0])
    assert not torch.equal(one.args[0], x[:7])
    assert len(one.lower) == 7
    assert all(kind.data == "simulated" for name, kind in one.kind.items() if kind.side == "upper")


def test_an_estimated_cubo_is_no_upper_bound() -> None:
    """Why no CUBO is offered: its plug-in lies far below what it estimates, and often below log p(x)."""
    lg = pairs.linear_gaussian(latent_dim=1, data_dim=2)
    x = pairs.simulated(lg, num_data=1).expand(2003, -1)
    precision = lg.precision
    guide = lg.perturbed_guide(shift=1.0, spread=0.75)
    q, posterior = guide.q(x[:1]), lg.posterior(x[:1])
    scale = q.base_dist.scale
    a = 2 * precision - torch.diag_embed(scale**-2)
    d = posterior.mean - q.mean
    quadratic = 4 * (d @ precision @ torch.linalg.inv(a) @ precision * d).sum() - 2 * (d @ precision * d).sum()
    log_ratio = torch.logdet(precision) + scale.log().sum() - 0.5 * torch.logdet(a) + 0.5 * quadratic
    exact_cubo = lg.log_px(x[:1]) + 0.5 * log_ratio  # METHODS: log E[w²] / 2, in closed form
    with torch.no_grad():
        z = guide.q(x).sample((20,))
        lw = lg.posterior(x).log_prob(z) + lg.log_px(x) - guide.q(x).log_prob(z)
    plug_in = 0.5 * ((2 * lw).logsumexp(0) - log(20))
    assert plug_in.mean() < exact_cubo - 4.5 * plug_in.std() / sqrt(len(x))
    assert (plug_in < lg.log_px(x)).double().mean() > 0.25
    found = bounds(lg.model, guide, x[:5], estimators=[importance_sampling], num_mode_checks=0)
    assert found.kind["upper"] is bounding.TANGENT
    assert not found.kind["upper"].in_probability


# ---------------------------------------------------------------------------------------------------------------
# Any pair, any data.


@pytest.mark.parametrize(
    "form", ["as_modules", "as_bound_methods", "as_functions", "with_pixel_plate", "with_fixed_plate"]
)
def test_sandwich_of_every_form(form: str) -> None:
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg)
    model, guide = pairs.FORMS[form](lg, lg.perturbed_guide().q)
    found = sandwich(model, guide, x, num_chains=16, num_temperatures=100)
    exact = lg.log_px(found.args[0])
    assert (found.lower - exact).abs().max() < 0.3
    assert (found.upper - exact).abs().max() < 0.3


def test_sandwich_keeps_the_inputs_beside_the_data() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(y, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.7 * x, 0.7))

    y = torch.linspace(-9, 9, 101).double()
    found = sandwich(model, guide, torch.zeros(101).double(), y, num_data=101)
    assert torch.equal(found.args[1], y)
    exact = dist.Normal(y, sqrt(1.25)).log_prob(found.args[0])
    assert (found.args[0] - y).abs().max() < 5
    assert (found.lower - exact).abs().max() < 0.5
    assert (found.upper - exact).abs().max() < 0.5


def test_sandwich_of_a_vae() -> None:
    vae = pv.VAE((3, 2), 2, decoder=pv.networks.MLP(2, (3, 2), hidden_dims=(5,)))
    found = sandwich(vae.model, vae.guide, num_data=11)
    assert found.args[0].shape == (11, 3, 2)
    exact = pv.importance_sampling(vae.model, vae.guide, found.args[0], num_samples=20_000)
    assert (found.lower - exact.log_px).abs().max() < 0.2
    assert (found.upper - exact.log_px).abs().max() < 0.2


def two_modes(x: Tensor) -> None:
    """x tells how far z is from 0, not on which side."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
        pyro.sample("x", dist.Normal(z.abs(), 0.1), obs=x)


def one_sided(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x, 0.1))


def two_sided(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        both = dist.MixtureSameFamily(
            dist.Categorical(torch.ones(len(x), 2).double()), dist.Normal(torch.stack([x, -x], -1), 0.15)
        )
        pyro.sample("z", both)


def test_a_mode_that_the_guide_misses_is_found_from_the_prior() -> None:
    """Half of the mass is missing, and guide-based numbers agree on the wrong value: only the prior's chains tell."""
    x = torch.linspace(1.0, 1.6, 11).double()
    exact = log(2) + dist.Normal(0.0, sqrt(1.01)).log_prob(x)
    found = bounds(
        two_modes, one_sided, x, estimators=[partial(importance_sampling, num_samples=100)], num_mode_checks=5
    )
    assert (found.upper < exact - 0.5).all()  # what the docstring warns of
    assert found.modes is not None
    assert found.modes.missed.all()
    assert (found.modes.from_prior.log_px - exact[found.modes.index]).abs().max() < 0.6
    assert "find more mass than chains from the guide for 5 of 5 data" in str(found)
    right = mode_check(two_modes, two_sided, x, num_data=5, num_temperatures=300)
    assert not right.missed.any()
    assert not right.warnings()
    assert list(right.index) == [0, 2, 5, 8, 10]


def test_a_check_that_cannot_tell_says_so() -> None:
    lg = pairs.linear_gaussian(noise=0.05)
    found = mode_check(lg.model, lg.guide, pairs.simulated(lg), num_data=3, num_temperatures=10)
    assert not found.missed.any()
    assert "cannot tell whether the guide misses a mode" in str(found)


def test_the_better_estimator_is_chosen_once_for_all_data() -> None:
    lg = pairs.linear_gaussian()
    x, wrong = pairs.simulated(lg, num_data=53), lg.perturbed_guide(shift=2.0, spread=0.5)
    found = bounds(lg.model, wrong, x, num_mode_checks=0)
    assert "Annealed" in found.method
    assert "twice" in found.method
    few = partial(annealed_importance_sampling, num_chains=1, num_temperatures=1)
    found = bounds(lg.model, wrong, x, estimators=[few, importance_sampling], num_mode_checks=0)
    assert "Importance sampling" in found.method
    with pytest.raises(ValueError, match="estimators is a list of one or more functions"):
        bounds(lg.model, wrong, x, estimators=[])


# ---------------------------------------------------------------------------------------------------------------
# Words.


def test_kinds_say_what_each_number_is() -> None:
    """The table: which side, how strongly, on which data."""
    rows = {
        bounding.MEAN_WEIGHT: ("lower", True, True, "any"),
        bounding.TANGENT: ("upper", True, False, "any"),
        bounding.REVERSE: ("upper", True, True, "simulated"),
        bounding.MULTI_SAMPLE: ("upper", True, True, "simulated"),
    }
    for kind, row in rows.items():
        assert (kind.side, kind.in_expectation, kind.in_probability, kind.data) == row
    assert str(bounding.TANGENT) == "upper bound in expectation: tangent of the logarithm, any data"


def test_summaries(capsys: pytest.CaptureFixture[str]) -> None:
    lg = pairs.linear_gaussian()
    x, wrong = pairs.simulated(lg, num_data=31), lg.perturbed_guide(shift=3.0, spread=0.3)
    found = sandwich(lg.model, wrong, num_data=31, **FEW)
    found.summary()
    printed = capsys.readouterr().out
    assert f"{found.lower.mean():.3f}" in printed
    assert f"{found.upper.mean():.3f}" in printed
    assert "nats apart on average" in printed
    real = str(bounds(lg.model, wrong, x, estimators=[importance_sampling], num_mode_checks=0))
    assert "upper bound in expectation: tangent" in real
    assert "runs disagree by more than about a nat" in real
    assert "mode_check" in real


def transformed(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=2 * x)


def transformed_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x, 1.0))


def silent(x: Tensor | None = None, *, num_data: int = 1) -> None:
    with pyro.plate("data", num_data if x is None else len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def test_what_cannot_be_simulated_is_explained() -> None:
    x = torch.randn(7)
    with pytest.raises(ValueError, match=r"observes at 'x', of shape \(7,\), is none of its arguments"):
        sandwich(transformed, transformed_guide, x)
    with pytest.raises(ValueError, match=r"calls the model as model\(None, num_data=...\), and this one does not"):
        sandwich(transformed, transformed_guide)
    with pytest.raises(ValueError, match="must return the data that it draws"):
        sandwich(silent, transformed_guide, num_data=5)
    for name in ("num_data", "num_chains", "num_temperatures", "num_leapfrog"):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1; got -2"):
            sandwich(silent, transformed_guide, x, **{name: -2})


def test_nothing_is_changed_by_bounding() -> None:
    vae = pv.VAE((4,), 2, decoder=pv.networks.MLP(2, (4,), hidden_dims=(5,)))
    state = torch.get_rng_state()
    one, two = (sandwich(vae.model, vae.guide, num_data=3, **FEW) for _ in range(2))
    assert torch.equal(one.upper, two.upper)
    assert not torch.equal(one.upper, sandwich(vae.model, vae.guide, num_data=3, seed=1, **FEW).upper)
    assert torch.equal(torch.get_rng_state(), state)
    assert not list(pyro.get_param_store())
    assert all(module.training for module in vae.modules())
