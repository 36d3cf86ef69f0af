"""The gradients of the objectives: the formula, unbiased, zero where they must be, exact in parts."""

from __future__ import annotations

import itertools
from math import log
from typing import Any

import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from layered import PAIRS, PHI, THETA, one_layer, one_layer_guide, two_layer_guide, two_layers
from pyro.infer import SVI, RenyiELBO
from pyro.infer.autoguide import AutoNormal, init_to_value
from torch import Tensor, nn

from ppl_vae.linear_gaussian import LinearGaussian
from ppl_vae.objectives import (
    IWAE,
    VIMCO,
    BetaELBO,
    DReG,
    Objective,
    StickingTheLanding,
)
from ppl_vae.vae import VAE

# How many times each gradient is drawn: the parameters come with the data, one row of them for each replicate.
REPLICATES = 20_011


def gradients(objective: Objective, model: Any, guide: Any, *, seed: int) -> tuple[Tensor, Tensor]:
    """The gradient of the bound by theta and by phi, `(REPLICATES, parameters)`."""
    theta, phi = (p.repeat(REPLICATES, 1).requires_grad_() for p in (THETA, PHI))
    x = torch.full((REPLICATES,), 0.7, dtype=torch.float64)
    torch.manual_seed(seed)
    objective.differentiable_loss(model, guide, x, theta, phi).backward()
    assert theta.grad is not None
    assert phi.grad is not None
    return -theta.grad, -phi.grad


def apart(one: Tensor, other: Tensor) -> float:
    """The largest distance of two means in standard errors; columns without any gradient are left out."""
    variance = (one.var(0) + other.var(0)) / len(one)
    distance = (one.mean(0) - other.mean(0)).abs()
    return (distance[variance > 0] / variance[variance > 0].sqrt()).max().item()


@pytest.fixture(scope="module", params=PAIRS)
def pair_and_iwae(request: pytest.FixtureRequest) -> tuple[Any, Any, tuple[Tensor, Tensor]]:
    model, guide = PAIRS[request.param]
    return model, guide, gradients(IWAE(num_particles=3), model, guide, seed=1)


def test_dreg_is_unbiased_and_less_noisy(pair_and_iwae: Any) -> None:
    model, guide, (theta, phi) = pair_and_iwae
    for at_once in (2, 3):
        objective = DReG(num_particles=3, max_particles_at_once=at_once)
        dreg_theta, dreg_phi = gradients(objective, model, guide, seed=2)
        assert apart(theta, dreg_theta) < 4.5
        assert apart(phi, dreg_phi) < 4.5
    assert dreg_phi.var(0).sum() < phi.var(0).sum()


def test_vimco_is_unbiased_for_continuous_latents_too(pair_and_iwae: Any) -> None:
    model, guide, (theta, phi) = pair_and_iwae
    vimco_theta, vimco_phi = gradients(VIMCO(num_particles=3), model, guide, seed=3)
    assert apart(theta, vimco_theta) < 4.5
    assert apart(phi, vimco_phi) < 4.5


@pytest.mark.parametrize("name", PAIRS)
def test_sticking_the_landing_is_unbiased_for_one_particle_and_biased_for_more(name: str) -> None:
    model, guide = PAIRS[name]
    theta, phi = gradients(BetaELBO(1.0), model, guide, seed=4)
    stl_theta, stl_phi = gradients(StickingTheLanding(), model, guide, seed=5)
    assert apart(theta, stl_theta) < 4.5
    assert apart(phi, stl_phi) < 4.5
    _, phi = gradients(DReG(num_particles=5), model, guide, seed=6)
    theta_5, stl_phi = gradients(StickingTheLanding(num_particles=5), model, guide, seed=7)
    assert apart(phi, stl_phi) > 9
    assert apart(theta_5, gradients(IWAE(num_particles=5), model, guide, seed=8)[0]) < 4.5


def hooked(x: Tensor, theta: Tensor, phi: Tensor, num_particles: int, *, at_copies: bool) -> Tensor:
    """The doubly reparameterised bound of the two layers in plain torch, by hooks.

    The mutant hooks the draws themselves, so that what reaches z1 by way of z2 is multiplied twice.
    """
    a, b, s1, c, d, s2 = phi.unbind(-1)
    held = phi.detach()
    weights: list[Tensor] = []

    def hook(gradient: Tensor) -> Tensor:
        return gradient * weights[0]

    def draw(loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        z = loc + scale * torch.randn(num_particles, len(x), dtype=x.dtype)
        copy = z.view_as(z)
        (copy if at_copies else z).register_hook(hook)
        return z, copy if at_copies else z

    z1, scored_1 = draw(a * x + b, s1.exp())
    _, scored_2 = draw(c * z1 + d * x, s2.exp())
    log_q = dist.Normal(held[:, 0] * x + held[:, 1], held[:, 2].exp()).log_prob(scored_1)
    log_q = log_q + dist.Normal(held[:, 3] * scored_1 + held[:, 4] * x, held[:, 5].exp()).log_prob(scored_2)
    ta, tb, tc = theta.unbind(-1)
    log_p = dist.Normal(0.0, 1.0).log_prob(scored_2) + dist.Normal(ta * scored_2 + tc, 0.8).log_prob(scored_1)
    log_p = log_p + dist.Normal(tb * torch.sin(scored_1) + scored_1, 0.5).log_prob(x)
    log_w = log_p - log_q
    weights.append(log_w.detach().softmax(0))
    return log_w.logsumexp(0) - log(num_particles)


@pytest.mark.parametrize("at_copies", [True, False])
def test_hooks_on_the_draws_themselves_would_be_caught(at_copies: bool) -> None:
    _, phi = gradients(DReG(num_particles=3), two_layers, two_layer_guide, seed=2)
    theta, free = (p.repeat(REPLICATES, 1).requires_grad_() for p in (THETA, PHI))
    torch.manual_seed(9)
    hooked(torch.full((REPLICATES,), 0.7).double(), theta, free, 3, at_copies=at_copies).sum().backward()
    assert free.grad is not None
    assert (apart(phi, free.grad) < 4.5) == at_copies


# ---------------------------------------------------------------------------------------------------------------
# Draw by draw.


class Encoder(nn.Module):
    def __init__(self, lg: LinearGaussian) -> None:
        super().__init__()
        exact = lg.posterior(torch.zeros(1, lg.w.shape[0]).double())
        gain = lg.posterior(torch.eye(lg.w.shape[0]).double()).mean - exact.mean
        self.gain, self.offset = nn.Parameter(gain), nn.Parameter(exact.mean[0])
        self.scale_tril = nn.Parameter(exact.scale_tril[0].detach().clone())

    def forward(self, x: Tensor) -> dist.TorchDistribution:
        return dist.MultivariateNormal(x @ self.gain + self.offset, scale_tril=self.scale_tril)


@pytest.mark.parametrize("form", ["as_modules", "as_functions", "as_bound_methods", "with_pixel_plate"])
def test_at_the_exact_posterior_the_encoder_has_no_gradient(form: str) -> None:
    lg = pairs.linear_gaussian()
    x, encoder = pairs.simulated(lg), Encoder(lg)
    model, guide = pairs.FORMS[form](lg, encoder)

    def largest(objective: Objective) -> float:
        encoder.zero_grad()
        objective(model, guide)(x).backward()
        return max(p.grad.abs().max().item() for p in encoder.parameters() if p.grad is not None)

    assert largest(DReG(num_particles=5)) < 1e-9
    assert largest(StickingTheLanding()) < 1e-9
    assert largest(StickingTheLanding(num_particles=5)) < 1e-9
    assert largest(IWAE(num_particles=5)) > 1e-2


def test_the_path_of_an_autoguide_goes_through_its_jacobian() -> None:
    """`AutoNormal` draws an unconstrained value and computes the latent from it, a Delta that carries the Jacobian."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Gamma(torch.full_like(x, 2.0), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    x = torch.full((REPLICATES,), 1.1, dtype=torch.float64)
    guide = AutoNormal(model, init_loc_fn=init_to_value(values={"z": torch.full_like(x, 1.6)}), init_scale=0.3)
    guide(x)
    leaves = guide.locs.z_unconstrained, guide.scales.z_unconstrained
    found = []
    for objective in (IWAE(num_particles=3), DReG(num_particles=3), StickingTheLanding(num_particles=3)):
        loss = objective.differentiable_loss(model, guide, x)
        found.append(torch.stack(torch.autograd.grad(loss, leaves), -1))
    assert apart(found[0], found[1]) < 4.5
    assert apart(found[0], found[2]) > 9
    assert found[1].var(0).sum() < found[0].var(0).sum()


def test_the_gradient_is_the_formula_and_that_of_finite_differences() -> None:
    """∇ log 1/K Σ w = Σ_k v_k ∇ log w_k with v = w / Σ w."""
    x = torch.tensor([0.7, -1.1, 0.2, 2.3, -0.4], dtype=torch.float64)
    theta, phi = THETA.repeat(5, 1).requires_grad_(), PHI.repeat(5, 1).requires_grad_()

    def loss() -> Tensor:
        torch.manual_seed(1)
        return IWAE(num_particles=3).differentiable_loss(one_layer, one_layer_guide, x, theta, phi)

    loss().backward()
    assert theta.grad is not None
    assert phi.grad is not None
    torch.manual_seed(1)
    torch.randn(5, dtype=torch.float64)  # the guide's own run
    free_theta, free_phi = theta.detach().requires_grad_(), phi.detach().requires_grad_()
    (a, b, c), (d, e, s, *_) = free_theta.unbind(-1), free_phi.unbind(-1)
    z = d * x + e + s.exp() * torch.randn(3, 5, dtype=torch.float64)
    log_w = dist.Normal(c, 1.0).log_prob(z) + dist.Normal(b * torch.sin(z) + a * z, 0.5).log_prob(x)
    log_w = log_w - dist.Normal(d * x + e, s.exp()).log_prob(z)
    (log_w.detach().softmax(0) * log_w).sum().backward()
    torch.testing.assert_close(theta.grad, -free_theta.grad)
    torch.testing.assert_close(phi.grad, -free_phi.grad)
    for parameter, row, column in ((theta, 2, 1), (phi, 3, 0), (phi, 0, 2)):
        with torch.no_grad():
            parameter[row, column] += 1e-6
            up = loss()
            parameter[row, column] -= 2e-6
            slope = (up - loss()) / 2e-6
            parameter[row, column] += 1e-6
        torch.testing.assert_close(slope, parameter.grad[row, column], rtol=1e-6, atol=1e-6)


def test_parameters_that_both_programs_share_get_both_gradients() -> None:
    def model(x: Tensor, shared: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))
            pyro.sample("x", dist.Normal(shared * z, 0.5), obs=x)

    def guide(x: Tensor, shared: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(shared * x, 0.7))

    found = []
    for objective in (IWAE(num_particles=5), DReG(num_particles=5)):
        x, shared = (torch.full((REPLICATES,), value, dtype=torch.float64) for value in (0.7, 0.6))
        objective.differentiable_loss(model, guide, x, shared.requires_grad_()).backward()
        assert shared.grad is not None
        found.append(shared.grad[:, None])
    assert apart(*found) < 4.5


# ---------------------------------------------------------------------------------------------------------------
# Discrete latents.

LOGIT = torch.tensor(0.4, dtype=torch.float64)


def two_states(x: Tensor, logit: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(torch.full_like(x, 0.3)))
        pyro.sample("x", dist.Normal(2 * z, 0.8), obs=x)


def two_state_guide(x: Tensor, logit: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Bernoulli(logits=logit))


def enumerated(x: float, num_particles: int) -> float:
    """∂/∂logit of E L_K, by the sum over all K-tuples of states."""
    logit, total = LOGIT.clone().requires_grad_(), torch.zeros((), dtype=torch.float64)
    for states in itertools.product((0.0, 1.0), repeat=num_particles):
        z = torch.tensor(states, dtype=torch.float64)
        log_q = dist.Bernoulli(logits=logit).log_prob(z)
        log_w = dist.Bernoulli(torch.tensor(0.3).double()).log_prob(z) + dist.Normal(2 * z, 0.8).log_prob(
            torch.tensor(x).double()
        )
        total = total + log_q.sum().exp() * ((log_w - log_q).logsumexp(0) - log(num_particles))
    return torch.autograd.grad(total, logit)[0].item()


def test_vimco_is_unbiased_against_enumeration_where_pyro_gives_zero() -> None:
    exact = enumerated(0.7, 3)
    x = torch.full((REPLICATES,), 0.7, dtype=torch.float64)
    logit = LOGIT.repeat(REPLICATES).requires_grad_()
    VIMCO(num_particles=3).differentiable_loss(two_states, two_state_guide, x, logit).backward()
    assert logit.grad is not None
    error = logit.grad.std() / REPLICATES**0.5
    assert abs(-logit.grad.mean() - exact) < 4.5 * error
    assert abs(exact) > 9 * error
    # With the bound itself for a signal it is unbiased, too, and noisier.
    z = torch.bernoulli(LOGIT.sigmoid().expand(3, REPLICATES))
    raw_logit = LOGIT.repeat(REPLICATES).requires_grad_()
    log_q = dist.Bernoulli(logits=raw_logit).log_prob(z)
    log_w = dist.Bernoulli(torch.tensor(0.3).double()).log_prob(z) + dist.Normal(2 * z, 0.8).log_prob(x) - log_q
    bound = log_w.logsumexp(0) - log(3)
    (raw,) = torch.autograd.grad((bound.detach() * log_q.sum(0) + bound).sum(), raw_logit)
    assert abs(raw.mean() - exact) < 4.5 * raw.std() / REPLICATES**0.5
    assert logit.grad.var() < raw.var() / 4
    # Without the score of the guide, as Pyro's RenyiELBO(0) and the gradient of the bound at fixed draws:
    logit.grad = None
    RenyiELBO(alpha=0.0, num_particles=3, vectorize_particles=True, max_plate_nesting=1).loss_and_grads(
        two_states, two_state_guide, x, logit
    )
    assert logit.grad is None or not logit.grad.any()


def test_the_signal_of_a_particle_leaves_it_out() -> None:
    from ppl_vae.objectives.weighted import _without_each

    log_w = torch.randn(3, 5, dtype=torch.float64)
    for k, others in enumerate(([1, 2], [0, 2], [0, 1])):
        by_hand = log_w.clone()
        by_hand[k] = log_w[others].mean(0)
        torch.testing.assert_close(_without_each(log_w)[k], by_hand)
    log_w[1] = -torch.inf
    assert not _without_each(log_w).isnan().any()


def test_every_objective_trains_through_a_step_of_svi() -> None:
    x = (torch.randn(11, 7) > 0).float()
    for objective in (IWAE(num_particles=5, max_particles_at_once=2), DReG(num_particles=5), StickingTheLanding()):
        pyro.clear_param_store()
        vae = VAE(7, 2, encoder=nn.Linear(7, 4), decoder=nn.Linear(2, 7))
        svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 3e-2}), objective)
        losses = [svi.step(x) for _ in range(30)]
        assert sum(losses[-10:]) < sum(losses[:10])
