"""Every prior and posterior in a VAE: trained, scored by every method, drawn from, saved and loaded."""

from __future__ import annotations

from importlib.util import find_spec
from math import log
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.contrib.zuko import ZukoToPyro
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

import ppl_vae as pv
from ppl_vae.posteriors import (
    CouplingFlow,
    DiagonalNormal,
    FullCovarianceNormal,
    NormalMixture,
    Posterior,
    SplineFlow,
)
from ppl_vae.posteriors.flows import _zuko
from ppl_vae.priors import FlowPrior, GaussianMixture, VampPrior

NUM_DATA, LATENT_DIM, DATA_DIM = 5, 2, 7

FAMILIES: dict[str, Any] = {
    "mixture prior": lambda: (GaussianMixture(2, 3), DiagonalNormal()),
    "vamp": lambda: (VampPrior(3), DiagonalNormal()),
    "flow prior": lambda: (FlowPrior(2, num_layers=2, hidden_dim=5), DiagonalNormal()),
    "full": lambda: (None, FullCovarianceNormal()),
    "mixture": lambda: (None, NormalMixture(3)),
    "coupling": lambda: (None, CouplingFlow(2, num_layers=2, hidden_dim=5, context_dim=3)),
    "vamp of mixtures": lambda: (VampPrior(5), NormalMixture(3)),
    "vamp of full": lambda: (VampPrior(5), FullCovarianceNormal()),
    "flows": lambda: (
        FlowPrior(2, num_layers=2, hidden_dim=5),
        CouplingFlow(2, num_layers=2, hidden_dim=5, context_dim=3),
    ),
}


def bits(num_data: int) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.bernoulli(torch.rand(num_data, DATA_DIM, generator=g), generator=g)


def built(prior: nn.Module | None, posterior: Posterior) -> pv.VAE:
    return pv.VAE(
        DATA_DIM,
        LATENT_DIM,
        prior=prior,
        posterior=posterior,
        encoder=pv.networks.MLP(DATA_DIM, posterior.num_features(LATENT_DIM), hidden_dims=(11,)),
        decoder=pv.networks.MLP(LATENT_DIM, DATA_DIM, hidden_dims=(11,)),
    )


@pytest.fixture(scope="module", params=FAMILIES)
def vae(request: pytest.FixtureRequest) -> pv.VAE:
    torch.manual_seed(3)
    made = built(*FAMILIES[request.param]())
    before = {name: value.clone() for name, value in made.named_parameters()}
    history = pv.fit(made.model, made.guide, bits(130), epochs=8, batch_size=13, learning_rate=1e-2, progress=False)
    assert history.loss[-1] < history.loss[0]
    still = [name for name, value in made.named_parameters() if torch.equal(value, before[name])]
    assert not still
    return made


@pytest.fixture(scope="module")
def exact(vae: pv.VAE) -> Any:
    found = pv.grid_integration(vae.model, vae.guide, bits(NUM_DATA))
    assert found.accepted.all()
    return found


def test_every_estimate_agrees_with_the_grid(vae: pv.VAE, exact: Any) -> None:
    x = bits(NUM_DATA)
    evidence = pv.importance_sampling(vae.model, vae.guide, x, num_samples=2000)
    annealed = pv.annealed_importance_sampling(vae.model, vae.guide, x, num_chains=7, num_temperatures=5)
    for found in (evidence, annealed):
        # The logarithm of a mean is too low by half its variance.
        away = (found.log_px - exact.log_px).abs() - found.standard_error.square()
        assert (away < 4.5 * found.standard_error).all()
    spread = pv.log_weights(vae.model, vae.guide, x, num_samples=500).std(0) / 2000**0.5
    assert ((evidence.elbo - exact.elbo).abs() < 4.5 * spread + 1e-3).all()
    assert torch.isfinite(exact.kl).all()
    assert (exact.kl > 0).all()


def test_bounds_and_gaps_hold(vae: pv.VAE, exact: Any) -> None:
    sandwich = pv.sandwich(vae.model, vae.guide, num_data=11, num_chains=3, num_temperatures=5)
    width = sandwich.upper - sandwich.lower
    assert width.mean() > -4.5 * width.std() / 11**0.5
    gaps = pv.inference_gaps(vae.model, vae.guide, bits(NUM_DATA), num_steps=10, num_samples=500, log_px=exact.log_px)
    assert ((gaps.kl - exact.kl).abs() < 4.5 * gaps.standard_error["kl"] + 1e-3).all()


def test_it_draws_reconstructs_and_comes_back_from_disk(vae: pv.VAE, tmp_path: Path) -> None:
    x = bits(NUM_DATA)
    assert vae.sample(11).shape == (11, DATA_DIM)
    assert vae.model(num_data=11).shape == (11, DATA_DIM)
    assert vae.reconstruct(x).shape == x.shape
    pv.save(vae, tmp_path / "vae.safetensors")
    again = pv.load(tmp_path / "vae.safetensors")
    assert repr(again) == repr(vae)
    for draw in (lambda v: v.sample(11), lambda v: v.reconstruct(x)):
        assert torch.equal(draw(vae), draw(again))
    found = [pv.importance_sampling(v.model, v.guide, x, num_samples=11).log_px for v in (vae, again)]
    assert torch.equal(*found)


def test_it_moves_to_float64(vae: pv.VAE, exact: Any, tmp_path: Path) -> None:
    pv.save(vae, tmp_path / "vae.safetensors")
    double = pv.load(tmp_path / "vae.safetensors").double()
    x = bits(NUM_DATA).double()
    assert double.sample(3).dtype == torch.float64
    assert double.encode(x).rsample().dtype == torch.float64
    z = torch.randn(3, NUM_DATA, LATENT_DIM).double()
    log_q, log_p = double.encode(x).log_prob(z), double.prior().log_prob(z)
    assert log_q.dtype == log_p.dtype == torch.float64
    torch.testing.assert_close(vae.encode(x.float()).log_prob(z.float()).double(), log_q, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(vae.prior().log_prob(z.float()).double(), log_p, rtol=1e-3, atol=1e-3)


def test_a_spline_flow_in_a_vae(tmp_path: Path) -> None:
    if find_spec("zuko") is None:
        pytest.skip("zuko, of the extra [flows], is not installed")
    x = bits(NUM_DATA)
    vae = built(None, SplineFlow(LATENT_DIM, num_layers=2, hidden_dims=(5,), context_dim=3))
    before = {key: value.clone() for key, value in vae.named_parameters()}
    pv.fit(vae.model, vae.guide, x, epochs=3, progress=False)
    assert not [key for key, value in vae.named_parameters() if torch.equal(value, before[key])]
    pv.save(vae, tmp_path / "vae.safetensors")
    again = pv.load(tmp_path / "vae.safetensors")
    found = [pv.importance_sampling(v.model, v.guide, x, num_samples=2000) for v in (vae, again)]
    torch.testing.assert_close(found[0].log_px, found[1].log_px)
    exact = pv.grid_integration(vae.model, over_the_prior, x)
    away = (found[0].log_px - exact.log_px).abs() - found[0].standard_error.square()
    assert (away < 4.5 * found[0].standard_error).all()


@pytest.mark.parametrize("name", ["vamp", "flows"])
def test_svi_trains_the_same_weights(name: str) -> None:
    prior, posterior = FAMILIES[name]()
    vae = pv.VAE(DATA_DIM, LATENT_DIM, prior=prior, posterior=posterior)
    before = {key: value.clone() for key, value in vae.named_parameters()}
    svi = SVI(
        vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO(num_particles=3, vectorize_particles=True)
    )
    for _ in range(3):
        svi.step(bits(NUM_DATA))
    assert not [key for key, value in vae.named_parameters() if torch.equal(value, before[key])]


def of_torch() -> tuple[Any, Any]:
    """A prior that is torch's mixture, whose support is a constraint of its own."""
    loc = torch.tensor([[-1.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    components = dist.Normal(loc, 0.7).to_event(1)
    wide = dist.Normal(torch.zeros(LATENT_DIM), 1.5).to_event(1)
    return lambda: dist.MixtureSameFamily(dist.Categorical(torch.ones(3)), components), lambda x: wide.expand([len(x)])


def of_zuko() -> tuple[Any, Any]:
    """A prior and a guide in Pyro's wrapper of zuko, which declares no support at all."""
    if find_spec("zuko") is None:
        pytest.skip("zuko, of the extra [flows], is not installed")
    flows = _zuko().flows
    options = {"transforms": 2, "hidden_features": (5,), "passes": 2}
    prior, guide = flows.NSF(LATENT_DIM, 0, **options), flows.NSF(LATENT_DIM, DATA_DIM, **options)
    return lambda: ZukoToPyro(prior()), lambda x: ZukoToPyro(guide(x))


@pytest.mark.parametrize("make", [of_torch, of_zuko])
def test_mixtures_and_flows_of_other_packages_are_scored(make: Any) -> None:
    decoder, (prior, q) = nn.Linear(LATENT_DIM, DATA_DIM), make()

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior().expand([len(x)]))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", q(x))

    x = bits(3)
    axis = torch.linspace(-8, 8, 161)
    z = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        likelihood = dist.Bernoulli(logits=decoder(z).unsqueeze(-2)).to_event(1).log_prob(x)
        log_px = (prior().log_prob(z).unsqueeze(-1) + likelihood).double().logsumexp(0) + 2 * log(0.1)
    evidence = pv.importance_sampling(model, guide, x, num_samples=2000)
    annealed = pv.annealed_importance_sampling(model, guide, x, num_temperatures=20, num_leapfrog=3)
    for found in (evidence, annealed):
        away = (found.log_px - log_px).abs() - found.standard_error.square()
        assert (away < 4.5 * found.standard_error).all()


class OneNumber(nn.Module):
    """z ~ N(0, I) in two dimensions, x = f(z) with noise: posteriors of a shape that f decides."""

    def __init__(self, f: Any) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.f(z), 0.3).to_event(1), obs=x)


class Encoder(nn.Module):
    def __init__(self, posterior: Posterior) -> None:
        super().__init__()
        self.posterior = posterior
        self.network = pv.networks.MLP(1, posterior.num_features(2), hidden_dims=(32,), activation=nn.Tanh())

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.posterior(self.network(x)))


SHAPES: dict[str, tuple[Any, Any]] = {
    "a ridge": (lambda z: z.sum(-1, keepdim=True), FullCovarianceNormal),
    "a banana": (lambda z: z[..., :1] + z[..., 1:].square() / 2, lambda: CouplingFlow(2)),
    "two modes": (lambda z: 2 * z[..., :1].abs(), lambda: NormalMixture(2)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_family_takes_the_shape_that_a_diagonal_normal_cannot(name: str) -> None:
    """KL(q, posterior) after equal training, log p(x) by a sum over a grid."""
    f, family = SHAPES[name]
    model, x = OneNumber(f), torch.linspace(1, 3, 11)[:, None]
    axis = torch.linspace(-6, 6, 601).double()
    z = torch.cartesian_prod(axis, axis)
    log_joint = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + dist.Normal(f(z), 0.3).log_prob(x[::5].mT.double()).mT
    log_px = log_joint.logsumexp(-1) + 2 * log(0.02)
    objective = Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=1)
    kl = []
    for posterior in (DiagonalNormal(), family()):
        torch.manual_seed(7)
        guide = Encoder(posterior)
        rate = {"epochs": 300, "learning_rate": lambda t: 1e-2 * 0.05**t}
        pv.fit(model, guide, x, objective=objective, progress=False, **rate)
        kl.append((log_px - pv.importance_sampling(model, guide, x[::5], num_samples=2000).elbo).mean().item())
    assert kl[0] > 0.5
    assert kl[1] < kl[0] / 3


def over_the_prior(x: Tensor) -> None:
    """In place of a guide whose density is dear: for log p(x) a grid needs no other."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
