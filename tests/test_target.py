"""The densities of a pair over unconstrained coordinates: any form, any support, discrete latents summed out."""

from __future__ import annotations

from math import log, sqrt
from typing import Any

import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from ppl_vae import isolation
from ppl_vae.evidence import importance_sampling
from ppl_vae.scoring import Pair, Target
from ppl_vae.scoring.configurations import configurations
from ppl_vae.scoring.layout import Layout


@pytest.mark.parametrize("form", [*pairs.FORMS, "auto_normal"])
def test_every_form_gives_the_densities(form: str) -> None:
    lg = pairs.linear_gaussian()
    x, guide = pairs.simulated(lg), lg.perturbed_guide()
    model, q = pairs.auto_normal(lg, guide, x) if form == "auto_normal" else pairs.FORMS[form](lg, guide.q)
    # A program that takes batches of certain lengths only is given no other.
    width = None if form == "one_sample_at_a_time" else 17
    with isolation.evaluation(model, q, seed=0):
        target = Target(Pair(model, q, x), x, width=width)
        u = target.draw_guide(5)
        assert u.shape == (5, pairs.NUM_DATA, pairs.LATENT_DIM)
        log_prior, log_joint = target.log_parts(u)
        torch.testing.assert_close(log_joint, lg.posterior(x).log_prob(u) + lg.log_px(x), rtol=0, atol=1e-9)
        torch.testing.assert_close(log_prior, pairs.prior(lg).log_prob(u), rtol=0, atol=1e-9)
        torch.testing.assert_close(target.log_guide(u), guide.q(x).log_prob(u), rtol=0, atol=1e-9)
        prior = target.draw_prior(500)
        assert abs(prior.mean()) < 4.5 / sqrt(prior.numel())
        assert abs(prior.var() - 1) < 4.5 * sqrt(2 / prior.numel())


def several_supports(x: Tensor) -> None:
    """On the line, positive, in an interval that differs by datum, on a simplex, and a plate of parts."""
    n = len(x)
    with pyro.plate("data", n, dim=-2):
        pyro.sample("a", dist.Normal(torch.zeros(n, 1).double(), 1.0))
        pyro.sample("b", dist.Gamma(torch.full((n, 1), 2.0).double(), 1.5))
        pyro.sample("c", dist.Uniform(-x.abs().unsqueeze(-1) - 1, 2.0))
        pyro.sample("d", dist.Dirichlet(torch.tensor([1.5, 2.0, 3.0]).double().expand(n, 1, 3)))
        with pyro.plate("parts", 5, dim=-1):
            e = pyro.sample("e", dist.LogNormal(torch.zeros(n, 5).double(), torch.full((5,), 0.5).double()))
        pyro.sample("x", dist.Normal(e.sum(-1, keepdim=True), 1.0), obs=x.unsqueeze(-1))


def guide_of_several_supports(x: Tensor) -> None:
    n = len(x)
    with pyro.plate("data", n, dim=-2):
        pyro.sample("a", dist.Normal(x.unsqueeze(-1), 1.2))
        pyro.sample("b", dist.Gamma(torch.full((n, 1), 3.0).double(), 1.0))
        pyro.sample("c", dist.Uniform(-x.abs().unsqueeze(-1) - 1, 2.0))
        pyro.sample("d", dist.Dirichlet(torch.tensor([2.5, 2.0, 1.0]).double().expand(n, 1, 3)))
        with pyro.plate("parts", 5, dim=-1):
            pyro.sample("e", dist.LogNormal(torch.zeros(n, 5).double(), torch.full((5,), 0.6).double()))


def test_coordinates_of_every_support_go_there_and_back() -> None:
    x = torch.tensor([0.5, -2.0, 3.0]).double()
    with isolation.evaluation(seed=1):
        pair = Pair(several_supports, guide_of_several_supports, x)
        target = Target(pair, x)
        assert target.dim == 1 + 1 + 1 + 2 + 5
        z, log_q = pair.draw(pair.encode(x), x, num_samples=7)
        u = target.coordinates.flatten(z)
        assert u.shape == (7, 3, 10)
        back, log_det = target.coordinates.restore(u)
        for name in "abcde":
            torch.testing.assert_close(back[name], z[name], rtol=0, atol=1e-9)
        torch.testing.assert_close(target.log_guide(u), log_q + log_det, rtol=0, atol=1e-7)
        one = u[:1, :1].reshape(-1)
        jacobian = torch.autograd.functional.jacobian(lambda v: flat(target, v.expand(1, 3, 10)), one)
        # A simplex of three is given by its first two coordinates.
        rows = [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
        torch.testing.assert_close(torch.linalg.slogdet(jacobian[rows])[1], log_det[0, 0], rtol=0, atol=1e-8)


def flat(target: Target, u: Tensor) -> Tensor:
    """z of the first datum as one vector."""
    z, _ = target.coordinates.restore(u)
    return torch.cat([z[name].movedim(1, 1)[0, 0].reshape(-1) for name in "abcde"])


def test_configurations_are_every_joint_value_once() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("c", dist.Categorical(torch.ones(4) / 4).expand([len(x), 1]))
            pyro.sample("b", dist.Bernoulli(torch.full((2,), 0.5)).expand([len(x), 1, 2]).to_event(1))
            pyro.sample("h", dist.OneHotCategorical(torch.ones(3) / 3).expand([len(x), 1]))
            with pyro.plate("parts", 2, dim=-1):
                pyro.sample("n", dist.Binomial(2, torch.tensor(0.5)).expand([len(x), 2]))

    trace = pyro.poutine.trace(model).get_trace(torch.zeros(7))
    sites = {name: trace.nodes[name] for name in "cbhn"}
    layout = Layout("data", -2, 2, dict.fromkeys("cbhn", 2), torch.inf)
    count, values = configurations(layout, sites, 7, most=1000)
    assert count == 4 * 4 * 3 * 9
    assert {name: tuple(value.shape[1:]) for name, value in values.items()} == {
        "c": (7, 1),
        "b": (7, 1, 2),
        "h": (7, 1, 3),
        "n": (7, 2),
    }
    joint = torch.cat([value[:, 3].reshape(count, -1).double() for value in values.values()], 1)
    assert len(joint.unique(dim=0)) == count
    with pytest.raises(ValueError, match=r"more than 431 configurations"):
        configurations(layout, sites, 7, most=431)


def test_a_plate_shorter_than_the_block() -> None:
    """Random numbers are drawn for as many data as the plate can hold, and no more."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", 20, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", 20, subsample_size=len(x)):
            pyro.sample("z", dist.Normal(0.5 * x, sqrt(0.5)))

    x = torch.linspace(-1, 1, 11).double()
    found = importance_sampling(model, guide, x, num_samples=3)
    assert (found.log_px - dist.Normal(0.0, sqrt(2)).log_prob(x)).abs().max() < 1e-7


# ---------------------------------------------------------------------------------------------------------------
# A guide that reaches beyond the prior's support: the weight there is 0, whatever torch's density says.


def bernoulli(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3)))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def geometric_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Geometric(torch.tensor(0.5)))


def exponential(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Exponential(torch.tensor(1.0)))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def normal_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x, 1.2))


def exact_bernoulli(x: Tensor) -> Tensor:
    parts = [dist.Normal(z, 1.0).log_prob(x) + log(p) for z, p in ((0.0, 0.7), (1.0, 0.3))]
    return torch.stack(parts).logsumexp(0)


def exact_exponential(x: Tensor) -> Tensor:
    """∫ e^−z N(x; z, 1) dz over z > 0 = e^(½ − x) Φ(x − 1)."""
    return 0.5 - x + dist.Normal(0.0, 1.0).cdf(x - 1).log()


@pytest.mark.parametrize(
    ("model", "guide", "exact"),
    [(bernoulli, geometric_guide, exact_bernoulli), (exponential, normal_guide, exact_exponential)],
)
def test_outside_the_support_the_weight_is_zero(model: Any, guide: Any, exact: Any) -> None:
    x = torch.linspace(-1, 2, 5)
    found = importance_sampling(model, guide, x, num_samples=100_000)
    assert ((found.log_px - exact(x)).abs() < 4.5 * found.standard_error).all()
    assert found.standard_error.max() < 0.02
