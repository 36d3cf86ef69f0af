"""Bounds from both sides: on the right side in expectation, and labelled as what they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import inf, log, sqrt
from typing import Any

import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import ppl_vae as pv
from ppl_vae.evidence import (
    AnnealedEvidence,
    Evidence,
    ModeCheck,
    annealed_importance_sampling,
    both_sides,
    bounding,
    bounds,
    importance_sampling,
    mode_check,
    sandwich,
)
from ppl_vae.evidence.path import Path, Schedule
from ppl_vae.evidence.simulation import simulate

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
        found = sandwich(lg.model, guide, num_data=199, num_chains=5, num_temperatures=temperatures)
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


def seeds_of(run: Callable[[], object]) -> list[int]:
    """What torch's random numbers were started from in a run, but for the fixed seeds that isolate it."""
    with pytest.MonkeyPatch.context() as patch:
        seeds: list[int] = []
        right = torch.manual_seed
        patch.setattr(torch, "manual_seed", lambda seed: (seeds.append(seed), right(seed))[1])
        run()
    return [seed for seed in seeds if seed > 2**32]


def test_forward_and_reverse_chains_have_random_numbers_of_their_own() -> None:
    lg = pairs.linear_gaussian()
    data, *seeds = seeds_of(lambda: sandwich(lg.model, lg.perturbed_guide(), num_data=211, **FEW))
    assert len(seeds) == 2 * 4  # of each of two blocks the proposal, the pilot, the chains and those back
    assert len(set(seeds)) == len(seeds)
    assert data not in seeds[2:]


def test_simulated_data_and_chains_have_random_numbers_of_their_own() -> None:
    """Temperatures that depend on the draw they are used from would spoil the bound."""
    lg = pairs.linear_gaussian()
    data, *seeds = seeds_of(lambda: sandwich(lg.model, lg.perturbed_guide(), num_data=13, **FEW))
    assert data not in seeds


def test_no_two_runs_share_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither within one call nor in calls with neighbouring seeds."""
    monkeypatch.setattr(bounding, "mode_check", partial(mode_check, num_chains=3, num_temperatures=4, num_leapfrog=1))
    lg = pairs.linear_gaussian()
    x, guide = pairs.simulated(lg), lg.perturbed_guide()
    both = [partial(importance_sampling, num_samples=7), partial(annealed_importance_sampling, **FEW)]
    seen = [
        seeds_of(lambda seed=seed: bounds(lg.model, guide, x, estimators=both, num_mode_checks=3, seed=seed))
        for seed in range(5)
    ]
    for one in seen:
        assert len(one) > 9
        assert len(set(one)) == len(one)
    assert len(set().union(*seen)) == sum(map(len, seen))


def test_the_error_of_the_tangent_is_honest() -> None:
    """U = log c + p̂ / c − 1 spreads with p̂ / c, here twice the relative error of p̂: c is half of p(x)."""
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg, num_data=1).expand(503, -1)
    runs: list[Evidence] = []

    def estimate(*args: Any, seed: int) -> Evidence:
        found = importance_sampling(*args, num_samples=211, seed=seed)
        runs.append(found if runs else replace(found, log_px=lg.log_px(x) - log(2)))
        return runs[-1]

    found = bounds(lg.model, lg.perturbed_guide(spread=1.4), x, estimators=[estimate], num_mode_checks=0)
    assert len(runs) == 2
    torch.testing.assert_close(found.upper, runs[0].log_px + (runs[1].log_px - runs[0].log_px).exp() - 1)
    assert 0.9 < found.upper.std() / found.standard_error["upper"].mean() < 1.15
    assert 0.9 < found.lower.std() / found.standard_error["lower"].mean() < 1.15


def test_the_lower_bound_on_simulated_data_is_annealing_on_them() -> None:
    """Number by number, with its error; the bounds from above have one reverse chain, and no error."""
    lg = pairs.linear_gaussian()
    guide = lg.perturbed_guide()
    found = sandwich(lg.model, guide, num_data=13, seed=3, **FEW)
    annealed = annealed_importance_sampling(lg.model, guide, *found.args, seed=3, **FEW)
    assert torch.equal(found.lower, annealed.log_px)
    assert torch.equal(found.standard_error["lower"], annealed.standard_error)
    assert 0 < found.mc_standard_error["lower"] < 1
    assert found.standard_error["upper"].isnan().all()
    assert found.standard_error["reverse"].isnan().all()


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
    assert found.kind["upper"] is both_sides.TANGENT
    assert not found.kind["upper"].in_probability


def test_an_eubo_of_self_normalised_weights_is_no_upper_bound() -> None:
    """Why none is offered: Σ w̃ log w lies below log p(x) + KL(posterior, q), and of two draws below log p(x)."""
    lg = pairs.linear_gaussian(latent_dim=1, data_dim=2)
    x = pairs.simulated(lg, num_data=1).expand(2003, -1)
    guide = lg.perturbed_guide(shift=1.5, spread=0.8)
    q, posterior = guide.q(x[:1]).base_dist, lg.posterior(x[:1])
    right = dist.Normal(posterior.mean, posterior.variance.sqrt())
    exact_eubo = lg.log_px(x[:1]) + torch.distributions.kl_divergence(right, dist.Normal(q.loc, q.scale)).sum(-1)
    with torch.no_grad():
        z = guide.q(x).sample((20,))
        lw = lg.posterior(x).log_prob(z) + lg.log_px(x) - guide.q(x).log_prob(z)
        exact = right.sample((20, len(x))).squeeze(-2)
        log_w = right.log_prob(exact).sum(-1) + lg.log_px(x) - guide.q(x).log_prob(exact)
    assert abs(log_w.mean() - exact_eubo) < 4.5 * log_w.std() / sqrt(log_w.numel())  # the closed form
    for num_samples, limit in ((20, exact_eubo), (2, lg.log_px(x[:1]))):
        some = lw[:num_samples]
        plug_in = (some.softmax(0) * some).sum(0)
        assert plug_in.mean() < limit - 4.5 * plug_in.std() / sqrt(len(x))


def test_each_name_is_tied_to_its_row_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """METHODS §2.5: on real data an upper bound is the tangent or none."""
    monkeypatch.setattr(bounding, "mode_check", partial(mode_check, num_chains=3, num_temperatures=4, num_leapfrog=1))
    lg = pairs.linear_gaussian()
    x, guide = pairs.simulated(lg, num_data=5), lg.perturbed_guide()
    real = {"lower": both_sides.MEAN_WEIGHT, "upper": both_sides.TANGENT}
    for estimator in (importance_sampling, partial(annealed_importance_sampling, **FEW)):
        for num_mode_checks in (0, 2):
            found = bounds(lg.model, guide, x, estimators=[estimator], num_mode_checks=num_mode_checks)
            assert found.kind == real
            assert found.reverse is None
            assert found.standard_error.keys() == found.mean.keys() == found.mean_standard_error.keys() == real.keys()
    found = sandwich(lg.model, guide, num_data=5, **FEW)
    assert found.kind == {
        "lower": both_sides.MEAN_WEIGHT,
        "upper": both_sides.MULTI_SAMPLE,
        "reverse": both_sides.REVERSE,
    }
    assert found.standard_error.keys() == found.kind.keys()
    assert [line.split()[0] for line in str(found).splitlines()[2:6]] == ["upper", "reverse", "lower", "width"]


# ---------------------------------------------------------------------------------------------------------------
# Any pair, any data.


@pytest.mark.parametrize(
    "form", ["as_modules", "as_bound_methods", "as_functions", "with_pixel_plate", "with_fixed_plate"]
)
def test_sandwich_of_every_form(form: str) -> None:
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg)
    model, guide = pairs.FORMS[form](lg, lg.perturbed_guide().q)
    found = sandwich(model, guide, x, num_chains=16, num_temperatures=50)
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
    found = sandwich(model, guide, torch.zeros(101).double(), y, num_data=101, num_temperatures=50)
    assert torch.equal(found.args[1], y)
    exact = dist.Normal(y, sqrt(1.25)).log_prob(found.args[0])
    assert (found.args[0] - y).abs().max() < 5
    assert (found.lower - exact).abs().max() < 0.5
    assert (found.upper - exact).abs().max() < 0.5


def given_first(y: Tensor, x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(y, 1.0))
        pyro.sample("x", dist.Normal(z, 0.5), obs=x)


def given_first_guide(y: Tensor, x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(0.8 * x + 0.2 * y, 0.7))


def given_first_as_a_copy(y: Tensor, x: Tensor) -> None:
    given_first(y, x.clone())


def test_what_the_model_observes_is_simulated_wherever_it_stands() -> None:
    y, zeros = torch.linspace(-9, 9, 31).double(), torch.zeros(31).double()
    for given, placeholder in ((y, zeros), (zeros, zeros.clone())):  # equal, but the model holds one of the two
        found = sandwich(given_first, given_first_guide, given, placeholder, num_data=31, **FEW)
        assert torch.equal(found.args[0], given)
        assert 0 < (found.args[1] - given).abs().max() < 5
        assert abs((found.lower - dist.Normal(given, sqrt(1.25)).log_prob(found.args[1])).mean()) < 0.1
    (kept, drawn), _ = simulate(given_first_as_a_copy, (y, zeros), 31)  # told by its values
    assert torch.equal(kept, y)
    assert drawn.unique().numel() == 31
    with pytest.raises(ValueError, match=r"observes at 'x' equals 2 of its arguments.* Give the others other values"):
        simulate(given_first_as_a_copy, (zeros, zeros.clone()), 31)


def test_an_autoguide_has_bounds_without_a_mode_check() -> None:
    """Which wants some of the data, and such a guide has all or none."""
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg)
    model, guide = pairs.auto_normal(lg, lg.perturbed_guide(), x)
    found = bounds(model, guide, x, estimators=[importance_sampling])
    assert len(x) > 8
    assert found.modes is None
    assert "An autoguide can be scored only on the data it was trained on" in found.unchecked
    assert f"It could not be made here: {found.unchecked}" in str(found)
    assert (found.lower - lg.log_px(x)).abs().max() < 0.3
    assert (found.upper - lg.log_px(x)).abs().max() < 0.3
    not_asked = bounds(model, guide, x, estimators=[importance_sampling], num_mode_checks=0)
    assert not_asked.unchecked == ""
    assert "could not be made" not in str(not_asked)
    torch.testing.assert_close(not_asked.upper, found.upper, rtol=0, atol=1e-9)


def test_a_datum_of_probability_0() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("x", dist.Uniform(z - 99, z + 99, validate_args=False), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))

    x = torch.tensor([0.0, 1e9, 1.0]).double()
    found = bounds(model, guide, x, estimators=[importance_sampling], num_mode_checks=0)
    assert found.lower.tolist() == pytest.approx([-log(198), -inf, -log(198)])
    assert found.upper.tolist() == pytest.approx([-log(198), inf, -log(198)])
    assert found.standard_error["upper"].isnan().tolist() == [False, True, False]
    assert "1 data got probability 0 in a run, so that the means are not finite" in str(found)
    assert "runs disagree by more" not in str(found)


def test_sandwich_of_a_vae() -> None:
    vae = pv.VAE((3, 2), 2, decoder=pv.networks.MLP(2, (3, 2), hidden_dims=(5,)))
    found = sandwich(vae.model, vae.guide, num_data=11, num_temperatures=30)
    assert found.args[0].shape == (11, 3, 2)
    exact = pv.importance_sampling(vae.model, vae.guide, found.args[0], num_samples=20_000)
    assert (found.lower - exact.log_px).abs().max() < 0.2
    assert (found.upper - exact.log_px).abs().max() < 0.2


def test_chains_of_graphs_give_what_eager_chains_give(graphs_as_recorded: list[Any]) -> None:
    """The reverse chain's graph is one for a single chain, beside the pilot's and that of the others."""
    lg = pairs.linear_gaussian()
    guide = lg.perturbed_guide()

    def found(*, compile: bool) -> tuple[Tensor, ...]:
        both = sandwich(lg.model, guide, num_data=13, num_chains=5, num_temperatures=4, compile=compile)
        check = mode_check(lg.model, guide, both.args[0], num_data=3, num_chains=5, num_temperatures=8, compile=compile)
        assert both.reverse is not None
        return both.lower, both.upper, both.reverse, check.from_guide.log_px, check.from_prior.log_px

    eager = found(compile=False)
    assert not graphs_as_recorded
    for one, other in zip(found(compile=True), eager, strict=True):
        assert (one - other).abs().max() < 1e-9
    assert len(graphs_as_recorded) == 3 + 2 + 2


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


def test_a_mode_that_the_guide_misses_is_found_from_the_prior(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the mass is missing, and guide-based numbers agree on the wrong value: only the prior's chains tell."""
    monkeypatch.setattr(bounding, "mode_check", partial(mode_check, num_temperatures=300))
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
    right = mode_check(two_modes, two_sided, x, num_data=5, num_temperatures=200)
    assert not right.missed.any()
    assert not right.warnings()
    assert list(right.index) == [0, 2, 5, 8, 10]


def annealed(log_px: list[float], standard_error: float) -> AnnealedEvidence:
    value = torch.tensor(log_px).double()
    column = torch.ones_like(value)
    return AnnealedEvidence(
        log_px=value,
        standard_error=standard_error * column,
        ess=16 * column,
        pareto_k=inf * column,
        elbo=value,
        jackknife=value,
        pareto_smoothed=value,
        num_samples=16,
        method="Annealed importance sampling",
        strategy="particles",
        acceptance=column,
        resolved=column.bool(),
        num_temperatures=7,
    )


def test_what_is_missed_is_a_matter_of_errors_and_of_a_tenth_of_a_nat() -> None:
    """Errors of exact guides are so small that a difference of no interest would be many of them."""
    guide = annealed([0.0] * 4, 1e-4)
    index = torch.arange(4)
    sure = ModeCheck(index, guide, annealed([0.09, 0.11, -0.5, 2.0], 1e-4))
    assert sure.missed.tolist() == [False, True, False, True]
    assert "for 2 of 4 data, up to 2.00 nats" in str(sure)
    unsure = ModeCheck(index, guide, annealed([0.44, 0.46, -0.5, 2.0], 0.1))
    assert unsure.missed.tolist() == [False, True, False, True]
    both = ModeCheck(index, annealed([0.0] * 4, 0.1), annealed([0.63, 0.64, 0.0, 0.0], 0.1))
    assert both.missed.tolist() == [False, True, False, False]


def test_a_check_without_findings_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounding, "mode_check", partial(mode_check, num_temperatures=203, num_leapfrog=2))
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg)
    found = bounds(lg.model, lg.perturbed_guide(), x, estimators=[importance_sampling], num_mode_checks=3)
    sentence = "Chains from the prior find no more mass for the 3 data that were tried."
    assert sentence in str(found)
    assert "!" not in str(found)
    assert found.modes is not None
    assert sentence in str(found.modes)
    assert found.modes.from_guide.num_temperatures == 50
    assert found.modes.from_prior.num_temperatures == 203
    assert "from the guide" in found.modes.from_guide.method
    assert "from the prior" in found.modes.from_prior.method
    for wrong in (annealed([9.0] * 3, 0.1), annealed([-99.0] * 3, 0.1)):
        doubted = replace(found, modes=ModeCheck(torch.arange(3), annealed([0.0] * 3, 0.1), wrong))
        assert sentence not in str(doubted)
        assert "! Chains from the prior" in str(doubted)


def test_a_check_that_cannot_tell_says_so() -> None:
    lg = pairs.linear_gaussian(noise=0.01)
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
        both_sides.MEAN_WEIGHT: ("lower", True, True, "any"),
        both_sides.TANGENT: ("upper", True, False, "any"),
        both_sides.REVERSE: ("upper", True, True, "simulated"),
        both_sides.MULTI_SAMPLE: ("upper", True, True, "simulated"),
    }
    for kind, row in rows.items():
        assert (kind.side, kind.in_expectation, kind.in_probability, kind.data) == row
    assert str(both_sides.TANGENT) == "upper bound in expectation: tangent of the logarithm, any data"


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
