"""The values of the objectives: on every form of a pair the bound that the formula gives, or a sentence."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Any

import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import ELBO, SVI, Trace_ELBO
from torch import Tensor

from ppl_vae import objectives as rooms
from ppl_vae.compiling import Compiled
from ppl_vae.objectives import (
    IWAE,
    VIMCO,
    AnalyticKL,
    BetaELBO,
    DReG,
    FreeBits,
    ImportanceWeightedELBO,
    Objective,
    StickingTheLanding,
    Terms,
)


@pytest.fixture
def lg() -> Any:
    return pairs.linear_gaussian()


@pytest.fixture
def x(lg: Any) -> Tensor:
    return pairs.simulated(lg)


WEIGHTED = {
    "iwae": ImportanceWeightedELBO,
    "dreg": DReG,
    "stl": StickingTheLanding,
}
ALL_OF_ONE_DRAW: dict[str, Callable[[], Objective]] = {
    "iwae": lambda: IWAE(num_particles=1),
    "dreg": lambda: DReG(num_particles=1),
    "stl": StickingTheLanding,
    "beta": lambda: BetaELBO(1.0),
}
RECORDED = ["as_functions", "with_pixel_plate", "with_subsampled_plate", "with_two_dimensional_decoder"]
FORMS_OF_PARTS = [form for form in pairs.FORMS if form not in ("with_fixed_plate", "one_sample_at_a_time")]


# ---------------------------------------------------------------------------------------------------------------
# What each is equal to.


def terms(objective: Objective, model: Any, guide: Any, x: Tensor, compile: bool) -> Terms:
    """The terms; recorded to a graph, which is run, if so desired."""
    if not compile:
        return objective.terms(model, guide, x)
    pair = objective.pair(model, guide, x)
    numbers = [torch.tensor(number, dtype=torch.float64) for number in objective.numbers()]
    found = Compiled(lambda x, *numbers: objective.at(pair, (x,), *numbers), what="the bound")(x, *numbers)
    assert found is not None
    return Terms(*found)


@pytest.mark.parametrize(
    ("form", "num_particles", "compile"),
    [*((form, k, False) for form in pairs.FORMS for k in (1, 5, 50)), *((form, 3, True) for form in RECORDED)],
)
def test_with_the_exact_posterior_every_weighted_bound_is_log_px(
    form: str, num_particles: int, compile: bool, lg: Any, x: Tensor, graphs_as_recorded: list[Any]
) -> None:
    model, guide = pairs.FORMS[form](lg, lg.posterior)
    kinds = [*WEIGHTED.values(), *([VIMCO] if num_particles > 1 else [])]
    for objective in (kind(num_particles=num_particles) for kind in kinds):
        loss, bound = terms(objective, model, guide, x, compile)
        torch.testing.assert_close(bound, lg.log_px(x), rtol=0, atol=1e-6)
        scale = 10 if form == "with_subsampled_plate" else 1
        torch.testing.assert_close(loss, -scale * lg.log_px(x).sum(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("form", "compile"), [*((form, False) for form in pairs.FORMS), ("as_functions", True)])
@pytest.mark.parametrize("name", ALL_OF_ONE_DRAW)
def test_one_draw_is_the_elbo_of_pyro_on_the_same_seed(
    form: str, compile: bool, name: str, lg: Any, x: Tensor, graphs_as_recorded: list[Any]
) -> None:
    model, guide = pairs.FORMS[form](lg, lg.perturbed_guide().q)
    objective = ALL_OF_ONE_DRAW[name]()
    for seed in (1, 2):  # with a look at the pair, and without
        torch.manual_seed(seed)
        expected = Trace_ELBO().loss(model, guide, x)
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        found = terms(objective, model, guide, x, compile).loss
        assert found.item() == pytest.approx(expected, abs=1e-9)
        # A plate that subsamples draws its indices anew in the model.
        assert torch.equal(torch.get_rng_state(), after) or form == "with_subsampled_plate"


def test_the_three_ways_to_call_it_agree(lg: Any, x: Tensor) -> None:
    model, guide = pairs.as_modules(lg, lg.perturbed_guide().q)
    objective = IWAE(num_particles=5)
    values = []
    for call in (
        lambda: objective.loss(model, guide, x),
        lambda: objective(model, guide)(x).item(),
        lambda: objective.loss_and_grads(model, guide, x),
        lambda: SVI(model, guide, pyro.optim.Adam({}), objective).step(x),
        lambda: objective.terms(model, guide, x).loss.item(),
    ):
        torch.manual_seed(4)
        values.append(call())
    assert len(set(values)) == 1
    assert isinstance(objective, ELBO)
    assert IWAE is ImportanceWeightedELBO


# ---------------------------------------------------------------------------------------------------------------
# The bound by its formula, and what it would be with the mistakes that are easily made.


def by_hand(lg: Any, x: Tensor, num_particles: int) -> Tensor:
    """log weights of `Repeatable` draws, `(num_particles, batch)`."""
    q = pairs.repeatable(lg)(x)
    z = q.rsample((num_particles,))
    return pairs.prior(lg).log_prob(z) + pairs.conditional(lg, z).to_event(1).log_prob(x) - q.log_prob(z)


WRONG: dict[str, Callable[[Tensor, int], Tensor]] = {
    "the mean of the logarithms": lambda w, k: w.mean(0),
    "no −log K": lambda w, k: w.logsumexp(0),
    "−log of another number": lambda w, k: w.logsumexp(0) - log(k + 1),
    "one weight for the batch": lambda w, k: (w.sum(1).logsumexp(0) - log(k)) / w.shape[1] + 0 * w[0],
    "over the batch instead of the particles": lambda w, k: (w.logsumexp(1) - log(k)).sum() / w.shape[1] + 0 * w[0],
    "N / B inside the logarithm": lambda w, k: ((10 * w).logsumexp(0) - log(k)) / 10,
    "1 / B inside the logarithm": lambda w, k: ((w / 11).logsumexp(0) - log(k)) * 11,
}


@pytest.mark.parametrize(("form", "compile"), [*((form, False) for form in FORMS_OF_PARTS), ("with_pixel_plate", True)])
def test_the_bound_is_the_formula_and_not_one_of_its_wrong_variants(
    form: str, compile: bool, lg: Any, x: Tensor, graphs_as_recorded: list[Any]
) -> None:
    model, guide = pairs.FORMS[form](lg, pairs.repeatable(lg))
    weights = by_hand(lg, x, 5)
    right = weights.logsumexp(0) - log(5)
    for kind in (*WEIGHTED.values(), VIMCO):
        loss, bound = terms(kind(num_particles=5), model, guide, x, compile)
        torch.testing.assert_close(bound, right, rtol=0, atol=1e-9)
        scale = 10 if form == "with_subsampled_plate" else 1
        torch.testing.assert_close(loss.detach(), -scale * right.sum(), rtol=0, atol=1e-8)
    for name, wrong in WRONG.items():
        assert (wrong(weights, 5) - right).abs().max() > 1e-2, f"{name} would pass"


def test_a_bound_belongs_to_its_datum(lg: Any, x: Tensor) -> None:
    model, guide = pairs.as_functions(lg, pairs.repeatable(lg))
    objective = IWAE(num_particles=5)
    alone = objective.terms(model, guide, x).bound
    more = torch.cat([x, 3 + torch.randn(99, pairs.DATA_DIM, dtype=torch.float64)])
    torch.testing.assert_close(objective.terms(model, guide, more).bound[: len(x)], alone, rtol=0, atol=1e-9)
    order = torch.randperm(len(x))
    torch.testing.assert_close(objective.terms(model, guide, x[order]).bound, alone[order], rtol=0, atol=1e-9)
    halves = sum(objective.loss(model, guide, part) for part in (x[:4], x[4:]))
    assert halves == pytest.approx(objective.loss(model, guide, x), abs=1e-8)
    joint = by_hand(lg, more, 5).sum(1).logsumexp(0) - by_hand(lg, x, 5).sum(1).logsumexp(0)
    apart = (by_hand(lg, more[11:], 5).logsumexp(0)).sum()
    assert (joint - apart).abs() > 1  # a weight for the whole batch is not the sum of its parts


def test_as_many_data_as_dimensions() -> None:
    """D = B, where a wrong broadcast is silent."""
    lg = pairs.linear_gaussian(latent_dim=5, data_dim=5)
    x = pairs.simulated(lg, num_data=5)
    model, guide = pairs.as_functions(lg, pairs.repeatable(lg))
    bound = DReG(num_particles=5).terms(model, guide, x).bound
    torch.testing.assert_close(bound, by_hand(lg, x, 5).logsumexp(0) - log(5), rtol=0, atol=1e-9)


def test_bounds_rise_with_the_number_of_particles(lg: Any) -> None:
    x = pairs.simulated(lg, num_data=1).expand(4001, -1)
    model, guide = pairs.as_functions(lg, lg.perturbed_guide(shift=0.7).q)
    exact, found = lg.log_px(x[:1]).item(), []
    for num_particles in (1, 5, 50):
        bound = IWAE(num_particles=num_particles).terms(model, guide, x).bound
        found.append((bound.mean().item(), bound.std().item() / len(x) ** 0.5))
    elbo = lg.perturbed_guide(shift=0.7).elbo(x[:1]).item()
    assert abs(found[0][0] - elbo) < 4.5 * found[0][1]
    for (low, error), (high, other) in zip(found, [*found[1:], (exact, 0.0)], strict=True):
        assert low < high - 4.5 * (error**2 + other**2) ** 0.5


def test_a_subsampled_plate_scales_the_bound_from_outside(lg: Any, x: Tensor) -> None:
    plain = pairs.as_functions(lg, pairs.repeatable(lg))
    sub = pairs.with_subsampled_plate(lg, pairs.repeatable(lg))
    one = [o.loss(*plain, x) for o in (IWAE(num_particles=7), BetaELBO(0.3), AnalyticKL(), FreeBits(0.2))]
    ten = [o.loss(*sub, x) for o in (IWAE(num_particles=7), BetaELBO(0.3), AnalyticKL(), FreeBits(0.2))]
    assert ten[0] == pytest.approx(10 * one[0], abs=1e-7)
    for torch_seed, objective in enumerate((BetaELBO(0.3), AnalyticKL(), FreeBits(0.2), DReG(num_particles=3))):
        torch.manual_seed(torch_seed)
        loss, bound = objective.terms(*plain, x)
        torch.manual_seed(torch_seed)
        loss_ten, bound_ten = objective.terms(*sub, x)
        torch.testing.assert_close(loss_ten, 10 * loss)
        torch.testing.assert_close(bound_ten, bound)
    assert one != ten


def test_what_is_masked_takes_no_part(lg: Any, x: Tensor) -> None:
    """Data masked in both programs have the bound 0; pixels masked in the model have no part in it."""
    keep = torch.arange(pairs.NUM_DATA) % 3 > 0
    pixels = torch.arange(pairs.DATA_DIM) % 2 > 0
    q = pairs.repeatable(lg)

    def model(x: Tensor, keep: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2), poutine.mask(mask=keep[:, None]):
            z = pyro.sample("z", pairs.prior(lg).expand([1]))
            with pyro.plate("pixels", x.shape[1], dim=-1), poutine.mask(mask=pixels):
                pyro.sample("x", pairs.conditional(lg, z.squeeze(-2)), obs=x)

    def guide(x: Tensor, keep: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2), poutine.mask(mask=keep[:, None]):
            pyro.sample("z", q(x.unsqueeze(-2)))

    z = q(x).rsample((5,))
    terms = dist.Normal(pairs.conditional(lg, z).mean, lg.noise).log_prob(x)
    weights = pairs.prior(lg).log_prob(z) + (terms * pixels).sum(-1) - q(x).log_prob(z)
    expected = torch.where(keep, weights.logsumexp(0) - log(5), 0.0)
    for kind in WEIGHTED.values():
        bound = kind(num_particles=5).terms(model, guide, x, keep).bound
        torch.testing.assert_close(bound, expected, rtol=0, atol=1e-9)
    torch.manual_seed(0)
    torch.testing.assert_close(AnalyticKL().terms(model, guide, x, keep).bound[::3], torch.zeros(4).double())


# ---------------------------------------------------------------------------------------------------------------
# What is refused.


@pytest.mark.parametrize("objective", [IWAE(num_particles=3), DReG(num_particles=3), BetaELBO(2.0), AnalyticKL()])
def test_refusals_name_the_site_and_the_way_out(objective: Objective, lg: Any, x: Tensor) -> None:
    model, guide = pairs.as_functions(lg, lg.posterior)

    def with_global(x: Tensor) -> None:
        pyro.sample("shared", dist.Normal(0.0, 1.0))
        model(x)

    def guide_of_global(x: Tensor) -> None:
        pyro.sample("shared", dist.Normal(0.0, 1.0))
        guide(x)

    with pytest.raises(ValueError, match="'shared' of the model is outside the plate"):
        objective.loss(with_global, guide_of_global, x)
    with pytest.raises(ValueError, match=r"'z' of the model is scaled by 0.09.*belongs to the objective"):
        objective.loss(poutine.scale(model, 1 / 11), poutine.scale(guide, 1 / 11), x)

    def discrete(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Categorical(torch.ones(3)))
            pyro.sample("x", dist.Normal(k.unsqueeze(-1), 1.0).expand([*k.shape, 7]).to_event(1), obs=x)

    def discrete_guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.Categorical(torch.ones(3)))

    with pytest.raises(ValueError, match=r"draws of 'k'.*no rsample.*Use VIMCO"):
        objective.loss(discrete, discrete_guide, x.float())
    assert VIMCO(num_particles=3).loss(discrete, discrete_guide, x.float()) > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IWAE(num_particles=0), "num_particles must be an integer of at least 1; got 0"),
        (lambda: DReG(num_particles=2.5), "num_particles must be an integer"),
        (lambda: IWAE(num_particles=3, max_particles_at_once=0), "max_particles_at_once must be"),
        (lambda: VIMCO(num_particles=1), "VIMCO compares a particle with the others"),
        (lambda: BetaELBO(-1.0), "beta must be a number of at least 0; got -1.0"),
        (lambda: BetaELBO(float("nan")), "beta must be"),
        (lambda: FreeBits(-0.1), "nats must be"),
    ],
)
def test_arguments_out_of_range(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_data_without_any_weight_have_no_gradient_and_one_warning() -> None:
    rate = torch.tensor(1.0, requires_grad=True)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1e-2 * rate))

    x = torch.tensor([0.5, 70.0])
    objective = IWAE(num_particles=3)
    with pytest.warns(UserWarning, match="All 3 importance weights of 1 of 2 data are 0") as caught:
        loss, bound = objective.terms(model, guide, x)
    assert len(caught) == 1
    assert bound.isfinite().tolist() == [True, False]
    loss.backward()
    assert rate.grad is not None
    assert rate.grad.isfinite()
    assert rate.grad != 0
    objective.loss(model, guide, x)  # says it once


def test_an_autoguide_trains_without_further_ado(lg: Any, x: Tensor) -> None:
    model = pairs.as_functions(lg, lg.posterior)[0]
    for objective in (IWAE(num_particles=5), DReG(num_particles=5), StickingTheLanding()):
        pyro.clear_param_store()
        guide = pyro.infer.autoguide.AutoNormal(model)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), objective)
        losses = [svi.step(x) for _ in range(40)]
        assert losses[-1] < losses[0] - 10
        assert losses[-1] > -lg.log_px(x).sum() - 5


def test_every_name_of_the_room_is_public() -> None:
    import ppl_vae as pv

    for name in rooms.__all__:
        if name not in ("Objective", "Terms"):
            assert getattr(pv, name) is getattr(rooms, name)
