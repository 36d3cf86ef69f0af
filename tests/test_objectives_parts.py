"""More particles than memory holds: the gradient in parts is the gradient."""

from __future__ import annotations

from collections.abc import Callable

import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from layered import PAIRS, PHI, THETA, two_layers
from torch import Tensor, nn

from ppl_vae import objectives
from ppl_vae.objectives import IWAE, VIMCO, DReG, ImportanceWeightedELBO, StickingTheLanding
from ppl_vae.vae import VAE

CHUNKED: dict[str, Callable[..., ImportanceWeightedELBO]] = {
    "iwae": ImportanceWeightedELBO,
    "dreg": DReG,
    "stl": StickingTheLanding,
    "vimco": VIMCO,
}


@pytest.mark.parametrize("name", CHUNKED)
@pytest.mark.parametrize("pair", PAIRS)
def test_the_gradient_in_parts_is_the_gradient(name: str, pair: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, guide = PAIRS[pair]
    x = torch.randn(5, dtype=torch.float64)
    theta, phi = THETA.repeat(5, 1).requires_grad_(), PHI.repeat(5, 1).requires_grad_()
    objective = CHUNKED[name](num_particles=7, max_particles_at_once=3)

    def found() -> list[Tensor]:
        torch.manual_seed(1)
        loss = objective.differentiable_loss(model, guide, x, theta, phi)
        return [loss.detach(), *torch.autograd.grad(loss, [theta, phi])]

    in_parts = found()
    after = torch.get_rng_state()
    monkeypatch.setattr(objectives.weighted, "checkpoint", lambda f, *args, use_reentrant: f(*args))
    at_once = found()
    assert torch.equal(torch.get_rng_state(), after)
    for one, other in zip(in_parts, at_once, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("at_once", [1, 3, 7, 11])
def test_the_number_in_the_logarithm_is_that_of_all_particles(at_once: int) -> None:
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg)
    for kind in CHUNKED.values():
        bound = kind(num_particles=7, max_particles_at_once=at_once).terms(lg.model, lg.guide, x).bound
        torch.testing.assert_close(bound, lg.log_px(x), rtol=0, atol=1e-6)


def test_in_parts_less_is_held_in_memory() -> None:
    vae = VAE(7, 2)
    x = (torch.randn(11, 7) > 0).float()
    held = {}
    for at_once in (50, 5):
        objective, size = DReG(num_particles=50, max_particles_at_once=at_once), [0]
        objective.loss(vae.model, vae.guide, x)

        def pack(tensor: Tensor, size: list[int] = size) -> Tensor:
            size[0] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            objective.differentiable_loss(vae.model, vae.guide, x)
        held[at_once] = size[0]
    assert held[5] < held[50] / 10


def test_a_dropout_in_a_guide_of_two_layers_is_refused_where_its_path_is_needed() -> None:
    dropout = nn.Dropout(0.5)

    def guide(x: Tensor, theta: Tensor, phi: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(dropout(x), 1.0))
            pyro.sample("z2", dist.Normal(z1, 1.0))

    x = torch.linspace(-2, 2, 11, dtype=torch.float64)
    args = x, THETA.repeat(11, 1), PHI.repeat(11, 1)
    with pytest.raises(ValueError, match="gave two densities for the same draws, as it does with a dropout"):
        DReG(num_particles=3).loss(two_layers, guide, *args)
    assert IWAE(num_particles=3).loss(two_layers, guide, *args) > 0
    dropout.eval()
    assert DReG(num_particles=3).loss(two_layers, guide, *args) > 0
