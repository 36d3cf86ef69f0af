"""The VAE and the autoencoder as Pyro programs."""

from __future__ import annotations

import copy
from math import log, pi
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from ppl_vae.autoencoder import Autoencoder
from ppl_vae.likelihoods import Bernoulli, Gaussian
from ppl_vae.networks import MLP, ConvDecoder, ConvEncoder
from ppl_vae.priors import StandardNormal
from ppl_vae.vae import VAE

SHAPES = [(7,), (5, 7), (3, 5, 7), (28, 28), (8, 8)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "likelihood", [Bernoulli, Gaussian, lambda: Gaussian(per_pixel=True)], ids=["bernoulli", "gaussian", "per pixel"]
)
def test_programs_have_the_shapes_of_the_contract(shape: tuple[int, ...], likelihood: Any) -> None:
    vae = VAE(shape, latent_dim=2, likelihood=likelihood())
    x = vae.model(num_data=11)
    assert x.shape == (11, *shape)
    guide_trace = poutine.trace(vae.guide).get_trace(x)
    model_trace = poutine.trace(poutine.replay(vae.model, trace=guide_trace)).get_trace(x)
    for trace in (guide_trace, model_trace):
        z = trace.nodes["z"]
        assert z["value"].shape == (11, 2)
        assert z["fn"].batch_shape == (11,)
        assert z["fn"].event_shape == (2,)
        assert [f.name for f in z["cond_indep_stack"]] == ["data"]
    assert model_trace.nodes["x"]["fn"].event_shape == shape
    assert model_trace.nodes["x"]["value"] is x
    assert model_trace.nodes["z"]["value"] is guide_trace.nodes["z"]["value"]


@pytest.mark.parametrize("shape", [(8, 8), (28, 28), (3, 32, 32)])
def test_convolutional_networks_fit_in(shape: tuple[int, ...]) -> None:
    likelihood = Gaussian(per_pixel=True)
    vae = VAE(
        shape,
        5,
        likelihood=likelihood,
        encoder=ConvEncoder(shape, 10, channels=(2, 3), hidden_dim=7),
        decoder=ConvDecoder(5, shape, num_parameters=2, channels=(3, 2), hidden_dim=7),
    )
    x = torch.rand(3, *shape)
    assert vae.encode(x).mean.shape == (3, 5)
    assert vae.decode(torch.randn(2, 3, 5)).mean.shape == (2, 3, *shape)
    assert torch.isfinite(torch.tensor(Trace_ELBO().loss(vae.model, vae.guide, x)))


def test_any_module_that_gives_the_right_count_of_numbers() -> None:
    """A decoder of flat numbers for one row at a time, as from another library."""
    vae = VAE(
        (5, 7),
        2,
        encoder=nn.Sequential(nn.Flatten(1), nn.Linear(35, 4)),
        decoder=nn.Sequential(nn.Linear(2, 35), nn.BatchNorm1d(35)),
    )
    assert vae.decode(torch.randn(11, 3, 2)).event_shape == (5, 7)
    assert vae.decode(torch.randn(11, 3, 2)).batch_shape == (11, 3)


def test_the_elbo_is_the_formula() -> None:
    """The analytic-KL ELBO of Pyro against E log p(x given z) − KL by hand, for z at q's mean ± nothing."""
    vae = VAE((5,), 2)
    x = torch.bernoulli(torch.full((11, 5), 0.5))
    q = vae.encode(x)
    kl = 0.5 * (q.mean.square() + q.variance - 1 - q.variance.log()).sum()
    loss = TraceMeanField_ELBO(num_particles=3000, vectorize_particles=True, max_plate_nesting=1).loss(
        vae.model, vae.guide, x
    )
    z = q.sample((3000,))
    log_lik = vae.decode(z).log_prob(x).sum(1)
    expected = kl - log_lik.mean()
    assert abs(loss - expected) < 4.5 * (2 * log_lik.var() / 3000).sqrt()


def test_sampling_and_reconstruction() -> None:
    vae = VAE((5, 7), 2, decoder=nn.Sequential(MLP(2, (5, 7)), nn.Dropout(0.5)))
    state = torch.get_rng_state()
    assert torch.equal(vae.sample(11, seed=1), vae.sample(11, seed=1))
    assert not torch.equal(vae.sample(11, seed=1), vae.sample(11, seed=2))
    assert torch.equal(torch.get_rng_state(), state)
    assert set(vae.sample(11).unique().tolist()) <= {0.0, 1.0}
    means = vae.sample(11, mean=True)
    assert ((means > 0) & (means < 1)).all()
    x = vae.sample(11)
    assert torch.equal(vae.reconstruct(x), vae.reconstruct(x))  # dropout is off
    assert vae.decoder[1].training
    assert not vae.reconstruct(x).requires_grad
    assert not torch.equal(vae.sample(3, seed=None), vae.sample(3, seed=None))


def test_samples_follow_the_model() -> None:
    """`vae.sample`, `vae.model` without data and Pyro's `Predictive` are three ways to the same distribution."""
    vae = VAE((3,), 2, likelihood=Gaussian(0.1))
    num = 20_000
    by_sample = vae.sample(num)
    by_model = vae.model(num_data=num).detach()
    predicted = Predictive(lambda: vae.model(None, num_data=num), num_samples=1)()["x"].squeeze(0).detach()
    for other in (by_model, predicted):
        error = ((by_sample.var(0) + other.var(0)) / num).sqrt()
        assert ((by_sample.mean(0) - other.mean(0)).abs() < 4.5 * error).all()


def test_a_copy_trains_itself() -> None:
    """deepcopy has the same names in the store; the one that runs is the one that is registered."""
    vae = VAE((5,), 2)
    twin = copy.deepcopy(vae)
    x = torch.bernoulli(torch.full((11, 5), 0.5))
    svi = pyro.infer.SVI(twin.model, twin.guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    Trace_ELBO().loss(vae.model, vae.guide, x)
    before = [p.clone() for p in vae.parameters()]
    svi.step(x)
    assert all(torch.equal(p, old) for p, old in zip(vae.parameters(), before, strict=True))
    assert all(not torch.equal(p, old) for p, old in zip(twin.parameters(), before, strict=True))


def test_data_of_another_shape_are_refused() -> None:
    vae = VAE((5, 7), 2)
    for bad in (torch.zeros(11, 1, 5, 7), torch.zeros(11, 35), torch.zeros(5, 7)):
        for program in (vae.model, vae.guide):
            with pytest.raises(ValueError, match=r"built for a batch of shape \(batch, 5, 7\); got"):
                program(bad)
    with pytest.raises(TypeError, match=r"got torch\.uint8\. Convert with x\.float\(\)"):
        vae.guide(torch.zeros(11, 5, 7, dtype=torch.uint8))


@pytest.mark.parametrize("bad", [0, -3, 2.5])
def test_bad_latent_dims_are_refused(bad: Any) -> None:
    for program in (VAE, Autoencoder):
        with pytest.raises(ValueError, match="latent_dim must be an integer of at least 1"):
            program((5,), bad)
    for shape in ((), 0, (5, 0)):
        with pytest.raises(ValueError, match="data_shape must be the sizes of one datum"):
            VAE(shape, 2)
    with pytest.raises(ValueError, match="The prior is over 3 dimensions, where latent_dim is 2"):
        VAE(5, 2, prior=StandardNormal(3))


def test_networks_of_another_size_are_named() -> None:
    x = torch.zeros(3, 5)
    with pytest.raises(
        ValueError, match=r"The encoder must give 4 numbers for each datum; it gives 6, in the shape \(6,\)"
    ):
        VAE(5, 2, encoder=nn.Linear(5, 6)).encode(x)
    with pytest.raises(ValueError, match="The decoder must give 10 numbers for each datum; it gives 5"):
        VAE(5, 2, likelihood=Gaussian(per_pixel=True), decoder=nn.Linear(2, 5)).decode(torch.zeros(3, 2))


# The autoencoder.


def test_an_autoencoder_is_a_pair_whose_loss_is_the_l2_loss() -> None:
    autoencoder = Autoencoder((5, 7), 3)
    x = torch.rand(11, 5, 7)
    loss = Trace_ELBO().loss(autoencoder.model, autoencoder.guide, x)
    squares = 0.5 * (x - autoencoder.reconstruct(x)).square().sum()
    assert loss == pytest.approx(squares.item() + 11 * 0.5 * 35 * log(2 * pi), rel=1e-5)
    code = autoencoder.encode(x)
    assert torch.equal(code.mean, code.sample())
    with pytest.raises(NotImplementedError, match="an autoencoder cannot generate data"):
        autoencoder.sample(3)
    with pytest.raises(NotImplementedError, match="an autoencoder cannot generate data"):
        autoencoder.model(num_data=3)


def test_the_gradient_of_an_autoencoder_is_that_of_the_l2_loss() -> None:
    autoencoder = Autoencoder((7,), 3)
    x = torch.rand(11, 7)
    Trace_ELBO().differentiable_loss(autoencoder.model, autoencoder.guide, x).backward()
    by_elbo = [p.grad.clone() for p in autoencoder.parameters() if p.grad is not None]
    autoencoder.zero_grad()
    (0.5 * (x - autoencoder.decoder(autoencoder.encoder(x))).square().sum()).backward()
    by_hand = [p.grad for p in autoencoder.parameters()]
    for one, other in zip(by_elbo, by_hand, strict=True):
        torch.testing.assert_close(one, other)
