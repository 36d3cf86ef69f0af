"""Mixtures and flows over z: densities, draws and the gradients through them."""

from __future__ import annotations

import copy
from math import log, pi
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from ppl_vae.distributions import Couplings, Flow, NormalMixture

NUM_DRAWS = 20_000


def mixture(dim: int = 2, components: int = 3, batch: tuple[int, ...] = ()) -> NormalMixture:
    g = torch.Generator().manual_seed(2)
    shape = (*batch, components)
    logits = torch.randn(shape, generator=g).double()
    loc = 1.5 * torch.randn(*shape, dim, generator=g).double()
    return NormalMixture(logits, loc, 0.3 + torch.rand(*shape, dim, generator=g).double())


def couplings(dim: int, *, context_dim: int = 0, num_layers: int = 3) -> Couplings:
    """Layers that bend as if they had been trained."""
    g = torch.Generator().manual_seed(4)
    layers = Couplings(dim, num_layers=num_layers, hidden_dim=7, context_dim=context_dim).double()
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=g).double())
    return layers


def flow(dim: int = 2) -> Flow:
    return couplings(dim)(torch.linspace(-1, 1, dim).double(), torch.linspace(0.5, 1.0, dim).double())


DISTRIBUTIONS: dict[str, Any] = {"mixture": mixture, "flow": flow}


def grid(reach: float = 10.0, num: int = 400) -> tuple[Tensor, float]:
    axis = torch.linspace(-reach, reach, num).double()
    return torch.cartesian_prod(axis, axis), (2 * reach / (num - 1)) ** 2


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_density_integrates_to_one_and_has_the_moments_of_its_draws(name: str) -> None:
    p = DISTRIBUTIONS[name]()
    z, cell = grid()
    with torch.no_grad():
        weight = p.log_prob(z).exp() * cell
        assert abs(weight.sum().item() - 1) < 1e-5
        draws = p.sample((NUM_DRAWS,))
    for power in (1, 2):
        moment = (weight[:, None] * z**power).sum(0)
        error = (draws**power).std(0) / NUM_DRAWS**0.5
        assert ((draws.pow(power).mean(0) - moment).abs() < 4.5 * error).all()
    if isinstance(p, NormalMixture):
        mean = (weight[:, None] * z).sum(0)
        torch.testing.assert_close(p.mean, mean, atol=1e-5, rtol=0)
        torch.testing.assert_close(p.variance, (weight[:, None] * (z - mean) ** 2).sum(0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dim", [2, 3, 5])
def test_a_flow_s_density_is_the_change_of_variables(dim: int) -> None:
    """At points it has not drawn, against the determinant of the whole Jacobian."""
    p = flow(dim)
    z = 2 * torch.randn(7, dim).double()

    def to_noise(one: Tensor) -> Tensor:
        for transform in reversed(p.transforms):
            one = transform.inv(one)
        return one

    def density(one: Tensor, sign: float) -> Tensor:
        jacobian = torch.autograd.functional.jacobian(to_noise, one)
        return dist.Normal(0.0, 1.0).log_prob(to_noise(one)).sum() + sign * jacobian.slogdet().logabsdet

    found = p.log_prob(z)
    torch.testing.assert_close(found, torch.stack([density(one, 1.0) for one in z]))
    assert (found - torch.stack([density(one, -1.0) for one in z])).abs().max() > 0.1  # a determinant upside down


@pytest.mark.parametrize("dim", [2, 3, 5])
def test_every_coordinate_of_a_flow_is_moved_by_others(dim: int) -> None:
    p = couplings(dim, num_layers=3)(torch.zeros(dim).double(), torch.ones(dim).double())

    def bent(noise: Tensor) -> Tensor:
        for transform in p.transforms:
            noise = transform(noise)
        return noise

    slope = torch.autograd.functional.jacobian(bent, torch.randn(dim).double())
    off_diagonal = slope.abs() > 1e-6
    assert (off_diagonal.sum(1) > 1).all()
    assert (off_diagonal.sum(0) > 1).all()


def test_a_flow_scores_its_own_draws_as_it_scores_a_stranger_s() -> None:
    """What a transform remembers of the last draw has no say, whichever value comes next."""
    layers, loc, scale = couplings(3, context_dim=5), torch.randn(11, 3).double(), torch.rand(11, 3).double() + 0.1
    context = torch.randn(11, 5).double()
    p = layers(loc, scale, context)
    z = p.rsample((7,))
    own = p.log_prob(z)
    other = p.log_prob(torch.zeros(3).double())
    torch.testing.assert_close(layers(loc, scale, context).log_prob(z.detach().clone()), own)
    torch.testing.assert_close(p.log_prob(z), own)
    torch.testing.assert_close(p.log_prob(torch.zeros(3).double()), other)
    one_by_one = torch.stack([layers(loc[i], scale[i], context[i]).log_prob(z[:, i]) for i in range(11)], 1)
    torch.testing.assert_close(own, one_by_one)
    assert p.expand((1, 11)).log_prob(z.unsqueeze(1)).shape == (7, 1, 11)
    torch.testing.assert_close(p.expand((1, 11)).log_prob(z.unsqueeze(1)).squeeze(1), own)
    copy.deepcopy(layers)  # nothing of a graph is left in the module
    assert set(layers.state_dict()) == {name for name, _ in layers.named_parameters()}


def test_untrained_couplings_are_the_normal_they_start_from() -> None:
    for dim in (2, 3):
        loc, scale = torch.randn(5, dim).double(), torch.rand(5, dim).double() + 0.1
        p = Couplings(dim).double()(loc, scale)
        z = torch.randn(7, 5, dim).double()
        torch.testing.assert_close(p.log_prob(z), dist.Normal(loc, scale).to_event(1).log_prob(z))
        torch.testing.assert_close(p.mean, loc)


def test_a_flow_s_mean_is_near_and_moves_no_random_state() -> None:
    p = flow(2)
    z, cell = grid()
    with torch.no_grad():
        mean = ((p.log_prob(z).exp() * cell)[:, None] * z).sum(0)
        spread = p.sample((1000,)).std(0)
    state = torch.get_rng_state()
    assert ((p.mean - mean).abs() < 4.5 * spread / 10).all()
    assert torch.equal(p.mean, p.mean)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dim", [1, 0, 2.5])
def test_couplings_need_two_halves(dim: Any) -> None:
    with pytest.raises(ValueError, match="need a latent_dim of at least 2; got"):
        Couplings(dim)


@pytest.mark.parametrize("options", [{"num_layers": 1}, {"hidden_dim": 0}, {"context_dim": -1}])
def test_couplings_need_layers_and_units(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="A flow needs 2 layers or more"):
        Couplings(3, **options)


@pytest.mark.parametrize(("dim", "components", "batch"), [(3, 5, ()), (1, 2, ()), (5, 5, (5,)), (2, 3, (7, 11))])
def test_a_mixture_is_torch_s(dim: int, components: int, batch: tuple[int, ...]) -> None:
    p = mixture(dim, components, batch)
    same = dist.MixtureSameFamily(dist.Categorical(logits=p.logits), dist.Normal(p.loc, p.scale).to_event(1))
    z = 3 * torch.randn(13, *batch, dim).double()
    assert p.batch_shape == same.batch_shape
    assert p.event_shape == same.event_shape
    torch.testing.assert_close(p.log_prob(z), same.log_prob(z))
    torch.testing.assert_close(p.mean, same.mean)
    torch.testing.assert_close(p.variance, same.variance)
    wider = p.expand((17, *batch))
    assert wider.sample((2,)).shape == wider.rsample((2,)).shape == (2, 17, *batch, dim)
    assert wider.mean.shape == wider.variance.shape == (17, *batch, dim)
    z = torch.randn(2, 17, *batch, dim).double()
    torch.testing.assert_close(wider.log_prob(z), same.expand((17, *batch)).log_prob(z))
    assert wider.log_prob(z[0, 0]).shape == (17, *batch)


def test_a_mixture_in_float32_is_as_good_as_its_numbers() -> None:
    """Narrow components far from 0, where the square multiplied out would keep no digit of float32."""
    g = torch.Generator().manual_seed(3)
    loc = 3 + torch.randn(11, 50, generator=g)
    p = NormalMixture(torch.randn(11, generator=g), loc, torch.full((11, 50), 1e-3))
    z = loc[:7] + 1e-3 * torch.randn(7, 50, generator=g)
    log_normal = dist.Normal(loc.double(), p.scale.double()).log_prob(z.double().unsqueeze(-2)).sum(-1)
    exact = (p.logits.double().log_softmax(-1) + log_normal).logsumexp(-1)
    found = p.log_prob(z)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)
    precision = p.scale.pow(-2)
    careless = -0.5 * (z.square() @ precision.T - 2 * z @ (loc * precision).T + (loc.square() * precision).sum(-1))
    careless = (p.logits.log_softmax(-1) + careless - (p.scale.log() + 0.5 * log(2 * pi)).sum(-1)).logsumexp(-1)
    assert (careless - exact).abs().max() > 1


def test_a_mixture_refuses_what_is_no_mixture() -> None:
    with pytest.raises(ValueError, match="scale"):
        NormalMixture(torch.zeros(2), torch.zeros(2, 3), -torch.ones(2, 3), validate_args=True)
    with pytest.raises(ValueError, match="support"):
        mixture().log_prob(torch.full((2,), torch.nan))


class TestGradientsThroughTheDrawsOfAMixture:
    """d/dφ E[f(z)] for f(z) = Σ_ij a_ij z_i z_j + Σ_i b_i z_i, which has a closed form."""

    P = mixture(dim=3, components=2)
    A = torch.tensor([[1.0, 0.7, -0.4], [0.7, -0.5, 0.9], [-0.4, 0.9, 0.3]]).double()
    B = torch.tensor([0.5, -1.0, 2.0]).double()

    def value(self, z: Tensor) -> Tensor:
        return ((z @ self.A) * z).sum(-1) + z @ self.B

    def exact(self, logits: Tensor, loc: Tensor, scale: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            given = [p.clone().requires_grad_() for p in (logits, loc, scale)]
            expected = self.value(given[1]) + (given[2].square() * self.A.diagonal()).sum(-1)
            (given[0].softmax(-1) * expected).sum().backward()
        return [p.grad for p in given]

    def sampled(self, parameters: tuple[Tensor, ...], draw: Any) -> list[tuple[Tensor, Tensor]]:
        """Means over draws and their standard errors; each draw has parameters of its own."""
        given = [p.expand(NUM_DRAWS, *p.shape).clone().requires_grad_() for p in parameters]
        self.value(draw(NormalMixture(*given))).sum().backward()
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in given]
        return [(g.mean(0), g.std(0) / NUM_DRAWS**0.5) for g in gradients]

    def worst(self, draw: Any) -> float:
        """The largest distance from the exact gradient, in standard errors."""
        parameters = self.P.logits, self.P.loc, self.P.scale
        pairs = zip(self.sampled(parameters, draw), self.exact(*parameters), strict=True)
        return max(((mean - exact).abs() / (error + 1e-12)).max().item() for (mean, error), exact in pairs)

    def test_they_are_exact_in_expectation(self) -> None:
        assert self.worst(lambda p: p.rsample()) < 4.5

    def test_of_the_component_that_was_drawn_they_would_not_be(self) -> None:
        def component(p: NormalMixture) -> Tensor:
            index = dist.Categorical(logits=p.logits).sample()[:, None, None].expand(-1, 1, 3)
            loc, scale = p.loc.gather(1, index).squeeze(1), p.scale.gather(1, index).squeeze(1)
            return loc + scale * torch.randn_like(loc)

        assert self.worst(component) > 20

    def test_coordinate_by_coordinate_they_would_not_be(self) -> None:
        """Without what an earlier coordinate does to a later one's distribution."""

        def apart(p: NormalMixture) -> Tensor:
            one = [NormalMixture(p.logits, p.loc[..., i, None], p.scale[..., i, None]) for i in range(3)]
            z = p.sample()
            moved = []
            for i, q in enumerate(one):
                q.sample = lambda _=(), i=i: z[:, i, None]  # type: ignore[method-assign]
                moved.append(q.rsample())
            return torch.cat(moved, -1)

        assert self.worst(apart) > 20

    def test_in_one_dimension_they_are_the_formula(self) -> None:
        """dz/dφ = −(∂F/∂φ) / p(z)."""
        p = mixture(dim=1, components=2)
        given = [q.clone().requires_grad_() for q in (p.logits, p.loc, p.scale)]
        z = NormalMixture(*given).rsample()
        found = torch.autograd.grad(z.sum(), given)
        below = torch.special.ndtr((z.detach() - given[1].squeeze(-1)) / given[2].squeeze(-1))
        by_hand = torch.autograd.grad((given[0].softmax(-1) * below).sum(), given)
        density = p.log_prob(z.detach()).exp()
        for one, other in zip(found, by_hand, strict=True):
            torch.testing.assert_close(one, -other / density)

    def test_they_stay_finite_in_many_dimensions_and_far_apart(self) -> None:
        """Where products of densities over- and underflow in any number format."""
        for scale in (1e-4, 1.0, 1e3):
            loc = torch.stack([torch.full((200,), -9.0), torch.full((200,), 9.0), torch.full((200,), 9.0)])
            given = [
                torch.zeros(3).requires_grad_(),
                loc.requires_grad_(),
                torch.full((3, 200), scale).requires_grad_(),
            ]
            p = NormalMixture(*given)
            z = p.rsample((5,))
            (z.square().sum() + p.log_prob(z).sum()).backward()
            assert all(q.grad.isfinite().all() for q in given)
