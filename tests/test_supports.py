"""Pairs that once gave a silent wrong number: by supports, masks, latents that depend on others, data that are no draw.

Each is either right, against quadrature, or refused in a sentence that names the site.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log, pi, sqrt
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.distributions import AffineTransform, ExpTransform

import ppl_vae as pv
from ppl_vae.proposals import Defensive, Guide, Local, Prior, StudentT, Widened
from ppl_vae.scoring.supports import inside, is_unbounded, log_prob_anywhere, support_of

Pair = tuple[Callable[..., None], Callable[..., None]]
ZERO, ONE = torch.tensor(0.0).double(), torch.tensor(1.0).double()


def one_latent(prior: Any, q: Callable[[Tensor], Any], scale: float = 1.0) -> Pair:
    """z ~ prior, x given z ~ N(z, scale), q(z given x)."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", q(x))

    return model, guide


def by_quadrature(prior: Any, x: Tensor, low: float, high: float, scale: float = 1.0) -> Tensor:
    z = torch.linspace(low, high, 400_003).double()[1:-1]
    step = log((high - low) / 400_002)
    return (prior.log_prob(z)[:, None] + dist.Normal(z[:, None], scale).log_prob(x)).logsumexp(0) + step


def right_by_importance_sampling(pair: Pair, x: Tensor, exact: Tensor) -> None:
    found = pv.importance_sampling(*pair, x, num_samples=20_000)
    assert ((found.log_px - exact).abs() < 4.5 * found.standard_error + 1e-5).all()
    assert found.standard_error.max() < 0.05


# ---------------------------------------------------------------------------------------------------------------
# Guides that reach beyond the prior.


@pytest.mark.parametrize(
    ("prior", "low", "high"),
    [(dist.Uniform(ZERO, ONE), 0.0, 1.0), (dist.Gamma(2 * ONE, ONE), 0.0, 40.0), (dist.Exponential(ONE), 0.0, 60.0)],
    ids=["uniform", "gamma", "exponential"],
)
def test_a_guide_beyond_the_prior(prior: Any, low: float, high: float) -> None:
    """Right where draws have their weight of 0, refused where they have no coordinates."""
    x = torch.linspace(0.1, 1.5, 7).double()
    pair = one_latent(prior, lambda x: dist.Normal(x, 1.2))
    right_by_importance_sampling(pair, x, by_quadrature(prior, x, low, high))
    for proposal in (Widened(), StudentT(), Defensive(), Local(num_steps=20)):
        with pytest.raises(ValueError, match="A draw of the latent 'z' lies outside the support of its prior"):
            pv.importance_sampling(*pair, x, proposal=proposal)
    for tool in (pv.annealed_importance_sampling, pv.grid_integration, pv.inference_gaps):
        with pytest.raises(ValueError, match="A draw of the latent 'z' lies outside the support of its prior"):
            tool(*pair, x)
    found = pv.annealed_importance_sampling(*pair, x, proposal=Prior())
    assert ((found.log_px - by_quadrature(prior, x, low, high)).abs() < 0.2).all()


def test_circular_latents() -> None:
    """Their support is declared as the whole line."""
    prior = dist.VonMises(torch.tensor(0.5).double(), ONE)
    x = torch.linspace(-2.5, 3, 7).double()
    exact = by_quadrature(prior, x, -pi, pi)
    pair = one_latent(prior, lambda x: dist.VonMises(0.5 * x.clamp(-2, 2) + 0.25, ONE))
    right_by_importance_sampling(pair, x, exact)
    right_by_importance_sampling(one_latent(prior, lambda x: dist.Normal(0.5 * x, 1.5)), x, exact)
    found = pv.grid_integration(*pair, x)
    assert found.accepted.all()
    assert (found.log_px - exact).abs().max() < 1e-3
    for proposal in (Guide(), Widened(), Prior()):
        annealed = pv.annealed_importance_sampling(*pair, x, num_chains=64, num_temperatures=50, proposal=proposal)
        assert ((annealed.log_px - exact).abs() < 4.5 * annealed.standard_error + 1e-3).all()


def test_transformed_priors_keep_their_base() -> None:
    """2 + Exponential: the transform's range is the line, the base's is not."""
    prior = dist.TransformedDistribution(dist.Exponential(ONE), [AffineTransform(2.0, 1.0)])
    x = torch.tensor([2.0, 3.0, 2.5, 1.0]).double()
    z = torch.linspace(2, 40, 400_001).double()
    exact = ((2 - z)[:, None] + dist.Normal(z[:, None], 0.5).log_prob(x)).logsumexp(0) + log(38 / 400_000)
    pair = one_latent(prior, lambda x: dist.Normal(x, 0.7), scale=0.5)
    right_by_importance_sampling(pair, x, exact)
    with pytest.raises(ValueError, match="The latent 'z' lives where no map from the real numbers is known to lead"):
        pv.annealed_importance_sampling(*pair, x)


def test_supports() -> None:
    value = torch.tensor([-1.0, 0.5, 4.0])
    for fn, where in (
        (dist.Normal(0.0, 1.0), [True, True, True]),
        (dist.LogNormal(0.0, 1.0), [False, True, True]),
        (dist.VonMises(torch.tensor(0.0), torch.tensor(1.0)), [True, True, False]),
        (dist.Exponential(torch.tensor(1.0)).mask(torch.tensor(True)), [False, True, True]),
        (dist.Uniform(torch.tensor(0.0), torch.tensor(1.0)).expand([3]), [False, True, False]),
        (dist.TransformedDistribution(dist.Exponential(torch.tensor(1.0)), [AffineTransform(1.0, -1.0)]), [1, 1, 0]),
        (dist.TransformedDistribution(dist.Normal(0.0, 1.0), [ExpTransform()]), [False, True, True]),
        (dist.Bernoulli(torch.tensor(0.5)), [False, False, False]),
        (dist.Categorical(torch.ones(4)), [False, False, False]),
    ):
        assert inside(fn, value).tolist() == [bool(w) for w in where]
        found = log_prob_anywhere(fn, value)
        assert torch.equal(found.isneginf(), ~inside(fn, value))
    event = dist.Exponential(torch.ones(3)).to_event(1)
    assert inside(event, torch.tensor([[1.0, 2.0, 3.0], [1.0, -2.0, 3.0]])).tolist() == [True, False]
    assert is_unbounded(dist.Normal(torch.zeros(3), 1.0).to_event(1))
    assert not is_unbounded(dist.VonMises(torch.zeros(3), torch.ones(3)).to_event(1))
    assert support_of(dist.VonMises(torch.zeros(3), torch.ones(3)).to_event(1)).event_dim == 1
    assert log_prob_anywhere(dist.Categorical(torch.ones(3) / 3), torch.tensor([0, 3])).tolist() == [
        pytest.approx(-log(3)),
        -torch.inf,
    ]


def test_bounds_that_differ_by_datum() -> None:
    low, high = torch.tensor([-1.0, 0.0, -3.0]).double(), torch.tensor([1.0, 4.0, 0.5]).double()
    pair = one_latent(dist.Uniform(low, high), lambda x: dist.Uniform(low, high))
    pair_of = {
        n: one_latent(dist.Uniform(low[n], high[n]), lambda x, n=n: dist.Uniform(low[n], high[n])) for n in range(3)
    }
    x = torch.tensor([0.5, 1.0, -1.0]).double()
    normal = dist.Normal(ZERO, ONE)
    exact = ((normal.cdf(high - x) - normal.cdf(low - x)) / (high - low)).log()
    for n, one in pair_of.items():
        assert pv.grid_integration(*one, x[n : n + 1]).log_px.item() == pytest.approx(exact[n].item(), abs=1e-3)
    for proposal in (Guide(), Widened(), Prior()):
        found = pv.importance_sampling(*pair, x, num_samples=20_000, proposal=proposal)
        assert ((found.log_px - exact).abs() < 4.5 * found.standard_error).all()


def test_a_probability_that_rounds_to_one_is_not_accepted() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            p = pyro.sample("p", dist.Beta(torch.tensor(0.05), torch.tensor(0.05)))
            pyro.sample("x", dist.Bernoulli(p), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("p", dist.Beta(torch.tensor(0.5), torch.tensor(0.5)))

    found = pv.grid_integration(model, guide, torch.ones(1))
    assert abs(found.log_px.item() - log(0.5)) > 0.1
    assert not found.accepted.any()


def test_latents_of_two_types() -> None:
    linear = torch.nn.Linear(1, 1)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            b = pyro.sample("b", dist.Normal(ZERO, 1.0))
            pyro.sample("x", dist.Normal(linear(a).squeeze(-1).double() + b, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Normal(0.3 * x.float()[:, None], 1.0).to_event(1))
            pyro.sample("b", dist.Normal(0.5 * x, 1.0))

    x = torch.linspace(-1, 1, 5).double()
    w, c = linear.weight.item(), linear.bias.item()
    exact = dist.Normal(torch.tensor(c).double(), sqrt(w**2 + 1.25)).log_prob(x)
    found = pv.annealed_importance_sampling(model, guide, x, num_temperatures=50)
    assert (found.log_px - exact).abs().max() < 0.3
    assert (pv.grid_integration(model, guide, x).log_px - exact).abs().max() < 1e-3


# ---------------------------------------------------------------------------------------------------------------
# Masks.


def masked(with_handler: bool, guide_mask: Callable[[Tensor], Tensor] = lambda mask: mask) -> Pair:
    def model(x: Tensor, mask: Tensor) -> None:
        handler = poutine.mask(mask=mask) if with_handler else pyro.plate_stack("none", ())
        with pyro.plate("data", len(x), dim=-2), pyro.plate("time", 3, dim=-1), handler:
            prior = dist.Normal(ZERO, 1.0)
            z = pyro.sample("z", prior if with_handler else prior.mask(mask))
            lik = dist.Normal(z, 0.7)
            pyro.sample("x", lik if with_handler else lik.mask(mask), obs=x)

    def guide(x: Tensor, mask: Tensor) -> None:
        handler = poutine.mask(mask=guide_mask(mask)) if with_handler else pyro.plate_stack("none", ())
        with pyro.plate("data", len(x), dim=-2), pyro.plate("time", 3, dim=-1), handler:
            q = dist.Normal(0.6 * x, 0.7)
            pyro.sample("z", q if with_handler else q.mask(guide_mask(mask)))

    return model, guide


@pytest.mark.parametrize("with_handler", [False, True], ids=["distribution", "handler"])
def test_masked_latents(with_handler: bool) -> None:
    """As in models of sequences of different lengths."""
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).double()
    mask = torch.arange(3) < torch.tensor([1, 2, 3, 1, 2])[:, None]
    exact = torch.where(mask, dist.Normal(0.0, sqrt(1.49)).log_prob(x), 0.0).sum(1)
    found = pv.importance_sampling(*masked(with_handler), x, mask, num_samples=20_000)
    assert ((found.log_px - exact).abs() < 4.5 * found.standard_error).all()
    for proposal in (Widened(), StudentT(), Local()):
        with pytest.raises(ValueError, match="The latent 'z' is masked"):
            pv.importance_sampling(*masked(with_handler), x, mask, proposal=proposal)
    with pytest.raises(ValueError, match="'z' is masked differently in the two programs"):
        pv.importance_sampling(*masked(with_handler, torch.ones_like), x, mask)


# ---------------------------------------------------------------------------------------------------------------
# Discrete latents whose values depend on others.


def test_values_that_depend_on_another_latent_are_refused() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            n = pyro.sample("n", dist.Binomial(9, torch.full_like(x, 0.7)))
            m = pyro.sample("m", dist.Binomial(n, torch.full_like(x, 0.8)))
            pyro.sample("x", dist.Normal(m, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            n = pyro.sample("n", dist.Binomial(9, torch.full_like(x, 0.1)))
            pyro.sample("m", dist.Binomial(n, torch.full_like(x, 0.4)))

    for num_data in (1, 4):
        with pytest.raises(ValueError, match=r"'m' .*(depend on another latent|not for all data alike)"):
            pv.enumeration(model, guide, torch.tensor([5.0, 1.0, 2.0, 3.0])[:num_data].double())


def test_values_that_depend_on_the_datum() -> None:
    def model(x: Tensor, total: Tensor) -> None:
        with pyro.plate("data", len(x)):
            n = pyro.sample("n", dist.Binomial(total, torch.full_like(x, 0.3)))
            pyro.sample("x", dist.Normal(n, 0.5), obs=x)

    def guide(x: Tensor, total: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("n", dist.Binomial(total, torch.full_like(x, 0.5)))

    x, total = torch.tensor([1.0, 2.0, 0.0]).double(), torch.tensor([2.0, 5.0, 3.0]).double()
    with pytest.raises(ValueError, match=r"'n' is discrete and its values cannot be listed .*not for all data alike"):
        pv.enumeration(model, guide, x, total)
    for n in range(3):
        one = pv.enumeration(model, guide, x[n : n + 1], total[n : n + 1]).log_px
        values = torch.arange(int(total[n]) + 1).double()
        prior = dist.Binomial(total[n], torch.tensor(0.3).double()).log_prob(values)
        assert one.item() == pytest.approx((prior + dist.Normal(values, 0.5).log_prob(x[n])).logsumexp(0).item())


def test_a_guide_that_depends_on_another_latent_for_later_data_only() -> None:
    """b depends on a where y is 1, and the first twenty data have y = 0."""

    def model(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(ZERO, 1.0))
            b = pyro.sample("b", dist.Normal(a * y, 1.0))
            pyro.sample("x", dist.Normal(b, 0.5), obs=x)

    def guide(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Normal(0.2 * x * y, 1.0))
            pyro.sample("b", dist.Normal(0.7 * x + 0.3 * a * y, 0.6))

    y = (torch.arange(40) >= 20).double()
    x = torch.linspace(-2, 2, 40).double()
    one = pv.importance_sampling(model, guide, x, y, num_samples=4000)
    other = pv.importance_sampling(model, guide, x.flip(0), y.flip(0), num_samples=4000)
    assert (one.elbo.mean() - other.elbo.mean()).abs() < 0.02
    exact = dist.Normal(ZERO, (1.25 + y).sqrt()).log_prob(x)
    for proposal in (Guide(), Widened(factor=1.3)):
        found = pv.importance_sampling(model, guide, x, y, num_samples=4000, proposal=proposal)
        assert ((found.log_px - exact).abs() < 4.5 * found.standard_error + 0.05).all()
    assert not pv.scoring.Pair(model, guide, x, y).encodes_once


def test_a_latent_named_as_an_autoguide_names_its_own() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            one = pyro.sample("z_unconstrained", dist.Normal(ZERO, 1.0))
            z = pyro.sample("z", dist.LogNormal(ZERO, 0.5 * ONE))
            pyro.sample("x", dist.Normal(one + z, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z_unconstrained", dist.Normal(0.5 * x, 1.0))
            pyro.sample("z", dist.LogNormal(0.0 * x, 0.6 * ONE))

    x = torch.linspace(-1, 2, 5).double()
    exact = pv.importance_sampling(model, guide, x, num_samples=200_000)
    assert (pv.grid_integration(model, guide, x).log_px - exact.log_px).abs().max() < 0.02


def test_an_autoguide_that_has_not_run_is_refused() -> None:
    model, _ = one_latent(dist.Normal(ZERO, 1.0), lambda x: dist.Normal(x, 1.0))
    with pytest.raises(ValueError, match="The autoguide has not run yet"):
        pv.importance_sampling(model, AutoNormal(model), torch.zeros(3).double())


# ---------------------------------------------------------------------------------------------------------------
# Data that are no draw from the model together with their latents.


def test_sandwich_refuses_what_is_no_joint_draw() -> None:
    guide = one_latent(None, lambda x: dist.Normal(x.double(), 1.0))[1]
    x = torch.randn(11).double()

    def reads_its_data(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(ZERO, 1.0))
            pyro.sample("x", dist.Normal(z + 0.9 * x.roll(1).detach(), 1.0), obs=x)

    def of_whole_numbers(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(ZERO, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.double())

    def returns_its_mean(x: Tensor | None = None, *, num_data: int = 1) -> Tensor:
        with pyro.plate("data", num_data if x is None else len(x)):
            z = pyro.sample("z", dist.Normal(ZERO, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            return z

    for model, args in ((of_whole_numbers, (torch.arange(11),)), (returns_its_mean, ())):
        with pytest.raises(ValueError, match="the model observes something else at 'x', or thinks otherwise of it"):
            pv.sandwich(model, guide, *args, num_data=11)
    with pytest.raises(ValueError, match=r"batch|thinks otherwise"):
        pv.sandwich(reads_its_data, guide, x)

    def with_factor(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(ZERO, 1.0))
            pyro.factor("weight", -(z**2))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="The model has a factor, 'weight'"):
        pv.sandwich(with_factor, guide, x)

    def with_input(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(y, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide_with_input(x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    with pytest.raises(ValueError, match="equals 2 of its arguments"):
        pv.sandwich(with_input, guide_with_input, x, x)
    with pytest.raises(ValueError, match="fixed proportions from its parts"):
        pv.sandwich(with_input, guide_with_input, x, x + 1, proposal=Defensive())


def test_many_configurations_are_scored_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """`max_rows` bounds the rows of a run, configurations included."""
    weights = torch.linspace(-1, 1, 5).double()
    seen: list[int] = []

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            c = pyro.sample("c", dist.Bernoulli(torch.full((5,), 0.4).double()).to_event(1))
            z = pyro.sample("z", dist.Normal(ZERO, 1.0))
            seen.append(c.shape[:-1].numel())
            pyro.sample("x", dist.Normal(z + c @ weights, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("c", dist.Bernoulli(torch.full((5,), 0.5).double()).to_event(1))
            pyro.sample("z", dist.Normal(x, 1.0))

    x = torch.linspace(-1, 1, 3).double()
    found = pv.importance_sampling(model, guide, x, num_samples=200, proposal=Widened(), max_rows=500)
    assert max(seen) <= 500
    exact = pv.grid_integration(model, guide, x)
    assert ((found.log_px - exact.log_px).abs() < 4.5 * found.standard_error).all()
