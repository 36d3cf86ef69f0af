"""The objectives that see the KL: its weight, its closed form, its free bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO
from torch import Tensor
from torch.distributions import kl_divergence

from ppl_vae.objectives import AnalyticKL, BetaELBO, FreeBits, Objective

EVERY_FORM = [form for form in pairs.FORMS if form != "one_sample_at_a_time"]


@pytest.fixture
def lg() -> Any:
    return pairs.linear_gaussian()


@pytest.fixture
def x(lg: Any) -> Tensor:
    return pairs.simulated(lg)


def on_seed(objective: Any, model: Any, guide: Any, *args: Any) -> float:
    torch.manual_seed(1)
    return objective.loss(model, guide, *args)


def kl_by_dimension(lg: Any, x: Tensor) -> Tensor:
    q = lg.perturbed_guide().q(x).base_dist
    return kl_divergence(dist.Normal(q.loc, q.scale), dist.Normal(torch.zeros(3).double(), 1.0))


# ---------------------------------------------------------------------------------------------------------------
# The weight.


def test_the_loss_is_linear_in_beta_and_the_bound_does_not_know_of_it(lg: Any, x: Tensor) -> None:
    model, guide = pairs.as_functions(lg, lg.perturbed_guide().q)
    losses, bounds = [], []
    for beta in (0, 0.5, 1.0, 4.0):
        torch.manual_seed(1)
        loss, bound = BetaELBO(beta).terms(model, guide, x)
        losses.append(loss)
        bounds.append(bound)
        torch.testing.assert_close(bound, bounds[0], rtol=0, atol=0)
    torch.testing.assert_close(losses[2], -bounds[0].sum())
    assert losses[2].item() == pytest.approx(on_seed(Trace_ELBO(), model, guide, x), abs=1e-9)
    kl = losses[2] - losses[0]
    torch.testing.assert_close(losses[1], losses[0] + 0.5 * kl)
    torch.testing.assert_close(losses[3], losses[0] + 4 * kl)
    torch.manual_seed(1)
    z = lg.perturbed_guide().q(x).rsample()
    torch.testing.assert_close(losses[0], -pairs.conditional(lg, z).to_event(1).log_prob(x).sum())
    assert kl > 1


def test_without_the_kl_a_draw_outside_of_the_prior_costs_nothing() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Uniform(0.0, 1.0)), 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.1))

    x = torch.tensor([0.5, 3.0])
    loss, bound = BetaELBO(0.0).terms(model, guide, x)
    assert loss.isfinite()
    assert bound.isfinite().tolist() == [True, False]


def test_a_schedule_is_a_function_of_the_share_of_training_done(lg: Any, x: Tensor) -> None:
    pair = pairs.as_functions(lg, lg.perturbed_guide().q)
    objective = BetaELBO(lambda share: min(1.0, 2 * share))
    with pytest.raises(ValueError, match=r"beta of BetaELBO is a function of the share.*set objective\.progress"):
        objective.loss(*pair, x)
    for progress, beta in ((0.0, 0.0), (0.25, 0.5), (1.0, 1.0)):
        objective.progress = progress
        assert on_seed(objective, *pair, x) == on_seed(BetaELBO(beta), *pair, x)
    falling = BetaELBO(lambda share: -share)
    falling.progress = 1.0
    with pytest.raises(ValueError, match=r"beta must be a number of at least 0; got -1\.0"):
        falling.loss(*pair, x)


# ---------------------------------------------------------------------------------------------------------------
# The closed form.


def test_full_covariance_against_a_diagonal_prior_is_the_formula_of_two_full_ones() -> None:
    tril = torch.randn(5, 3, 3, dtype=torch.float64).tril()
    tril.diagonal(dim1=-2, dim2=-1).abs_().add_(0.1)
    q = dist.MultivariateNormal(torch.randn(5, 3).double(), scale_tril=tril)
    loc, scale = torch.randn(3).double(), torch.rand(3).double() + 0.5
    p = dist.Normal(loc, scale).to_event(1)
    expected = kl_divergence(q, dist.MultivariateNormal(loc, scale_tril=scale.diag()))
    torch.testing.assert_close(kl_divergence(q, p), expected)
    assert (expected > 0.1).all()
    torch.testing.assert_close(kl_divergence(q, p.expand([5])), expected)
    with pytest.raises(NotImplementedError):
        kl_divergence(q, dist.StudentT(3.0, loc, scale).to_event(1))


@pytest.mark.parametrize("form", EVERY_FORM)
def test_closed_form_and_no_free_bits_are_pyros_mean_field(form: str, lg: Any, x: Tensor) -> None:
    pair = pairs.FORMS[form](lg, lg.perturbed_guide().q)
    expected = on_seed(TraceMeanField_ELBO(), *pair, x)
    assert on_seed(AnalyticKL(), *pair, x) == pytest.approx(expected, abs=1e-9)
    assert on_seed(FreeBits(0.0), *pair, x) == pytest.approx(expected, abs=1e-9)
    assert abs(on_seed(BetaELBO(1.0), *pair, x) - expected) > 1e-3


def test_at_the_exact_posterior_its_mean_is_log_px(lg: Any) -> None:
    x = pairs.simulated(lg, num_data=1).expand(4001, -1)
    bound = AnalyticKL().terms(*pairs.as_functions(lg, lg.posterior), x).bound
    assert abs(bound.mean() - lg.log_px(x[0])) < 4.5 * bound.std() / len(x) ** 0.5


def heavy_tailed(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.StudentT(3.0, torch.zeros(3).double(), 1.0).to_event(1))
        b = pyro.sample("b", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))
        pyro.sample("x", dist.Normal((a + b).sum(-1, keepdim=True), 1.0).expand([*a.shape[:-1], 7]).to_event(1), obs=x)


def heavy_tailed_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("a", dist.Normal(x[:, :3], 0.5).to_event(1))
        pyro.sample("b", dist.Normal(x[:, 3:6], 0.5).to_event(1))


def test_a_kl_without_a_formula_is_sampled_and_said_once(x: Tensor) -> None:
    objective = AnalyticKL()
    with pytest.warns(UserWarning, match="No formula for KL.*of 'a' is registered.*so it is sampled"):
        found = on_seed(objective, heavy_tailed, heavy_tailed_guide, x)
    assert on_seed(objective, heavy_tailed, heavy_tailed_guide, x) == found
    assert found == pytest.approx(on_seed(TraceMeanField_ELBO(), heavy_tailed, heavy_tailed_guide, x), abs=1e-9)
    with pytest.raises(ValueError, match=r"No formula for KL.*of 'a'.*which of its bits are free"):
        FreeBits(0.1).loss(heavy_tailed, heavy_tailed_guide, x)


def test_an_autoguide_s_kl_is_sampled(lg: Any, x: Tensor) -> None:
    model, guide = pairs.auto_normal(lg, lg.perturbed_guide(), x)
    with pytest.warns(UserWarning, match="of 'z' is registered"):
        found = on_seed(AnalyticKL(), model, guide, x)
    assert found == pytest.approx(on_seed(Trace_ELBO(), model, guide, x), abs=1e-9)


def chain(x: Tensor, order: str, given: bool) -> dict[str, Tensor]:
    """Two latents drawn in an order, the second given the first or not."""
    z: dict[str, Tensor] = {}
    for name in order:
        before = sum(z.values()) if given else 0.0
        z[name] = pyro.sample(name, dist.Normal(0.3 * x + before, 0.9))
    return z


def two_latents(model_order: str, guide_order: str, given: bool) -> tuple[Any, Any]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = chain(x, model_order, True)
            pyro.sample("x", dist.Normal(z["a"] - 2 * z["b"], 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            chain(x, guide_order, given)

    return model, guide


@pytest.mark.parametrize(
    ("model_order", "guide_order", "given"), [("ab", "ab", True), ("ab", "ba", False), ("ba", "ab", False)]
)
def test_a_sum_of_kls_has_the_mean_of_the_elbo(model_order: str, guide_order: str, given: bool) -> None:
    x = torch.full((20_011,), 0.7, dtype=torch.float64)
    pair = two_latents(model_order, guide_order, given)
    one, other = (objective.terms(*pair, x).bound for objective in (AnalyticKL(), BetaELBO(1.0)))
    error = ((one.var() + other.var()) / len(x)) ** 0.5
    assert abs(one.mean() - other.mean()) < 4.5 * error
    torch.manual_seed(1)
    assert not torch.equal(one, other)


def test_where_a_sum_of_kls_is_no_bound_it_is_refused() -> None:
    x = torch.linspace(-1, 1, 11, dtype=torch.float64)
    pair = two_latents("ab", "ba", True)
    for objective in (AnalyticKL(), FreeBits(0.1)):
        with pytest.raises(ValueError, match=r"in the order \['b', 'a'\], the model in the order \['a', 'b'\]"):
            objective.loss(*pair, x)
    # As Pyro computes it, with a warning, it would be another number:
    x = torch.full((20_011,), 0.7, dtype=torch.float64)
    sampled = BetaELBO(1.0).terms(*pair, x).bound
    with pytest.warns(UserWarning, match="Failed to verify mean field restriction"):
        mean_field = -TraceMeanField_ELBO().loss(*pair, x) / len(x)
    assert abs(mean_field - sampled.mean()) > 4.5 * 2 * sampled.std() / len(x) ** 0.5


# ---------------------------------------------------------------------------------------------------------------
# Free bits.

WRONG_BITS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "each datum has its own": lambda kl, nats: kl.clamp(min=nats).sum(),
    "shared by all dimensions": lambda kl, nats: len(kl) * kl.sum(1).mean().clamp(min=nats),
    "not times the number of data": lambda kl, nats: kl.mean(0).clamp(min=nats).sum(),
    "subtracted": lambda kl, nats: len(kl) * (kl.mean(0) - nats).clamp(min=0).sum(),
}


@pytest.mark.parametrize("form", ["as_modules", "with_pixel_plate", "with_subsampled_plate"])
def test_free_bits_are_the_formula_and_not_one_of_its_wrong_variants(form: str, lg: Any, x: Tensor) -> None:
    pair = pairs.FORMS[form](lg, lg.perturbed_guide().q)
    kl = kl_by_dimension(lg, x)
    nats = kl.mean(0).median().item() + 0.1  # between the dimensions
    scale = 10 if form == "with_subsampled_plate" else 1
    without = on_seed(BetaELBO(0.0), *pair, x)
    found = on_seed(FreeBits(nats), *pair, x) - without
    assert found == pytest.approx(scale * len(x) * kl.mean(0).clamp(min=nats).sum().item(), abs=1e-8)
    for name, wrong in WRONG_BITS.items():
        assert abs(found / scale - wrong(kl, nats).item()) > 1e-2, f"{name} would pass"
    bounds = []
    for objective in (AnalyticKL(), FreeBits(0.0), FreeBits(nats), FreeBits(100.0)):
        torch.manual_seed(1)
        bounds.append(objective.terms(*pair, x).bound)
        torch.testing.assert_close(bounds[-1], bounds[0], rtol=0, atol=1e-11)


def test_a_latent_without_dimensions_of_its_own_is_one_group(lg: Any, x: Tensor) -> None:
    pair = pairs.as_functions(lg, lg.posterior)
    kl = kl_divergence(lg.posterior(x), pairs.prior(lg)).mean().item()
    for nats in (kl / 3 - 0.1, kl / 3 + 0.1):
        found = on_seed(FreeBits(nats), *pair, x) - on_seed(BetaELBO(0.0), *pair, x)
        assert found == pytest.approx(len(x) * max(kl, 3 * nats), abs=1e-8)


def test_where_all_bits_are_free_the_guide_has_no_gradient_from_the_kl(x: Tensor) -> None:
    loc, scale = torch.zeros(3).double().requires_grad_(), torch.ones(3).double().requires_grad_()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).expand([*z.shape[:-1], 7]).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc + 1.0, 0.5 * scale).to_event(1))

    def gradient(objective: Objective) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        return torch.autograd.grad(objective.differentiable_loss(model, guide, x), (loc, scale))

    free, without, full = (gradient(o) for o in (FreeBits(100.0), BetaELBO(0.0), FreeBits(0.0)))
    for one, other, third in zip(free, without, full, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
        assert (one - third).abs().min() > 1
