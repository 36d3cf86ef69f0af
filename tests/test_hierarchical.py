"""Two layers of latents: exact where everything is linear, and a program like the others where it is not."""

from __future__ import annotations

from math import log
from typing import Any

import linear
import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

import ppl_vae as pv
from ppl_vae import scoring
from ppl_vae.hierarchical import HierarchicalVAE

NUM_DATA = 11
# Data, their dimensions and those of both latents: all different primes, and all the same.
SIZES = [(NUM_DATA, 7, (3, 2)), (5, 5, (5, 5))]


@pytest.fixture(params=SIZES, ids=["primes", "D = B"])
def exact(request: Any) -> tuple[HierarchicalVAE, MultivariateNormal, Tensor]:
    num_data, data_dim, latent_dims = request.param
    hvae, p = linear.hierarchical(data_dim, latent_dims)
    return hvae, p, p.sample((num_data,))


class Perturbed(nn.Module):
    """The exact guide of a linear pair, but wider, off by a shift, and (a mutant) with z2 blind to the z1 drawn."""

    def __init__(self, hvae: HierarchicalVAE, *, shift: float = 0.0, spread: float = 1.0, blind: bool = False) -> None:
        super().__init__()
        self.hvae, self.shift, self.spread, self.blind = hvae, shift, spread, blind

    def moved(self, q: Any) -> Any:
        return pyro.distributions.Normal(q.mean + self.shift * q.stddev, self.spread * q.stddev).to_event(1)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            q1 = self.hvae.encode(x)
            z1 = pyro.sample("z1", self.moved(q1))
            pyro.sample("z2", self.moved(self.hvae.guide.ascend(q1.mean if self.blind else z1)))


def test_with_the_exact_posterior_every_weight_is_log_px(exact: Any) -> None:
    hvae, p, x = exact
    log_w = scoring.log_weights(hvae.model, hvae.guide, x, num_samples=13)
    assert log_w.shape == (13, len(x))
    torch.testing.assert_close(log_w, p.log_prob(x).expand(13, -1), rtol=0, atol=1e-9)
    for num_samples in (1, 17):
        found = pv.importance_sampling(hvae.model, hvae.guide, x, num_samples=num_samples)
        torch.testing.assert_close(found.log_px, p.log_prob(x), rtol=0, atol=1e-9)


def test_a_guide_that_forgets_what_it_drew_is_not_exact(exact: Any) -> None:
    hvae, p, x = exact
    log_w = scoring.log_weights(hvae.model, Perturbed(hvae, blind=True), x, num_samples=13)
    assert (log_w - p.log_prob(x)).abs().mean() > 0.1
    again = scoring.log_weights(hvae.model, Perturbed(hvae), x, num_samples=13)
    torch.testing.assert_close(again, p.log_prob(x).expand(13, -1), rtol=0, atol=1e-9)


def test_importance_sampling_and_annealing_from_a_wrong_guide_are_right_within_their_errors(exact: Any) -> None:
    hvae, p, x = exact
    guide = Perturbed(hvae, shift=0.4, spread=1.2)
    found = pv.importance_sampling(hvae.model, guide, x, num_samples=4000)
    assert (found.standard_error > 1e-3).all()
    assert ((found.log_px - p.log_prob(x)).abs() < 4.5 * found.standard_error).all()
    annealed = pv.annealed_importance_sampling(hvae.model, guide, x, num_chains=64, num_temperatures=10)
    assert ((annealed.log_px - p.log_prob(x)).abs() < 4.5 * annealed.standard_error).all()


def test_bounds_rise_with_the_number_of_samples_to_log_px(exact: Any) -> None:
    """L_1 < L_5 < L_50 < log p(x) (Burda et al., 2016), on the same draws."""
    hvae, p, x = exact
    log_w = scoring.log_weights(hvae.model, Perturbed(hvae, shift=0.4, spread=1.2), x, num_samples=5000)
    of = {k: (log_w.reshape(k, -1, len(x)).logsumexp(0) - log(k)).mean(1) for k in (1, 5, 50)}
    for low, high in ((1, 5), (5, 50)):
        difference = of[high].mean() - of[low].mean()
        error = (of[high].std() ** 2 + of[low].std() ** 2).sqrt() / len(of[high]) ** 0.5
        assert difference > 4.5 * error
    assert of[50].mean() < p.log_prob(x).mean()


def test_every_way_to_run_many_samples_gives_the_same_scores(exact: Any) -> None:
    hvae, _, x = exact
    pair = scoring.Pair(hvae.model, hvae.guide, x)
    assert pair.strategy is scoring.particles
    assert not pair.encodes_once
    z, log_q = pair.draw({}, x, num_samples=3)
    log_joint = pair.log_joint(z, x, num_samples=3)
    for strategy in (scoring.tiles, scoring.loop):
        pair.strategy = strategy
        torch.testing.assert_close(pair.log_joint(z, x, num_samples=3), log_joint)
        torch.testing.assert_close(pair.log_q({}, z, x, num_samples=3), log_q)


def test_the_model_simulates_its_marginal() -> None:
    hvae, p = linear.hierarchical()
    num = 20_000
    with torch.no_grad():
        by_model = hvae.model(num_data=num)
    for x in (by_model, hvae.sample(num, seed=3)):
        assert ((x.mean(0) - p.mean).abs() < 4.5 * (x.var(0) / num).sqrt()).all()
        products = (x - p.mean).unsqueeze(2) * (x - p.mean).unsqueeze(1)
        assert ((products.mean(0) - p.covariance_matrix).abs() < 4.5 * products.std(0) / num**0.5).all()


@pytest.mark.parametrize("shape", [(7,), (5, 7), (3, 5, 7)])
@pytest.mark.parametrize(
    "likelihood", [pv.likelihoods.Bernoulli, lambda: pv.likelihoods.Gaussian(per_pixel=True)], ids=["bits", "per pixel"]
)
def test_programs_have_the_shapes_of_the_contract(shape: tuple[int, ...], likelihood: Any) -> None:
    hvae = HierarchicalVAE(shape, (3, 2), hidden_dims=((13,), ()), likelihood=likelihood())
    x = hvae.model(num_data=NUM_DATA)
    assert x.shape == (NUM_DATA, *shape)
    guide_trace = poutine.trace(hvae.guide).get_trace(x)
    model_trace = poutine.trace(poutine.replay(hvae.model, trace=guide_trace)).get_trace(x)
    for trace in (guide_trace, model_trace):
        for name, size in (("z1", 3), ("z2", 2)):
            assert trace.nodes[name]["value"].shape == (NUM_DATA, size)
            assert trace.nodes[name]["fn"].batch_shape == (NUM_DATA,)
            assert [f.name for f in trace.nodes[name]["cond_indep_stack"]] == ["data"]
    assert model_trace.nodes["x"]["fn"].event_shape == shape
    assert hvae.decode(torch.randn(2, NUM_DATA, 3)).batch_shape == (2, NUM_DATA)
    reconstructed = hvae.reconstruct(x)
    assert reconstructed.shape == x.shape
    assert torch.equal(reconstructed, hvae.reconstruct(x))
    assert not reconstructed.requires_grad
    assert torch.equal(hvae.sample(5, seed=1), hvae.sample(5, seed=1))
    assert not torch.equal(hvae.sample(5, seed=1, mean=True), hvae.sample(5, seed=2, mean=True))


def test_the_default_is_the_architecture_of_burda_et_al() -> None:
    hvae = HierarchicalVAE((28, 28))
    widths = {
        name: [layer.in_features for layer in network.layers] + [network.layers[-1].out_features]
        for name, network in (
            ("up to z1", hvae.guide.encoder),
            ("up to z2", hvae.guide.upper),
            ("down to z1", hvae.model.upper),
            ("down to x", hvae.model.decoder),
        )
    }
    assert widths == {
        "up to z1": [784, 200, 200, 200],
        "up to z2": [100, 100, 100, 100],
        "down to z1": [50, 100, 100, 200],
        "down to x": [100, 200, 200, 784],
    }
    assert all(isinstance(network.activation, nn.Tanh) for network in (hvae.guide.encoder, hvae.model.upper))


def test_every_way_of_training_moves_every_weight() -> None:
    x = torch.bernoulli(torch.full((NUM_DATA, 7), 0.4))

    def by_svi(hvae: HierarchicalVAE) -> None:
        pyro.infer.SVI(hvae.model, hvae.guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO()).step(x)

    def by_torch(hvae: HierarchicalVAE) -> None:
        optimizer = torch.optim.Adam(hvae.parameters(), lr=1e-2)
        Trace_ELBO()(hvae.model, hvae.guide)(x).backward()
        optimizer.step()

    def by_fit(hvae: HierarchicalVAE) -> None:
        pv.fit(hvae.model, hvae.guide, x, epochs=1, progress=False)

    for train in (by_svi, by_torch, by_fit):
        hvae = HierarchicalVAE(7, (3, 2), hidden_dims=((13,), (5,)))
        before = [p.clone() for p in hvae.parameters()]
        train(hvae)
        assert all(not torch.equal(p, old) for p, old in zip(hvae.parameters(), before, strict=True))


def test_training_beats_pixels_on_their_own() -> None:
    digits = pv.data.load("digits").static_binarization(seed=0)
    torch.manual_seed(0)
    hvae = HierarchicalVAE((8, 8), (10, 3), hidden_dims=((64,), (32,)))
    pv.fit(hvae.model, hvae.guide, digits.train, epochs=15, learning_rate=5e-3, progress=False)
    x = digits.test[:53]
    found = pv.importance_sampling(hvae.model, hvae.guide, x, num_samples=500)
    shares = (digits.train.sum(0) + 1) / (len(digits.train) + 2)
    alone = pv.likelihoods.Bernoulli()(shares.logit(), event_dim=2).log_prob(x)
    assert (found.log_px - alone).mean() > 2


@pytest.mark.parametrize(
    ("arguments", "options", "match"),
    [
        (((5, 0),), {}, "data_shape must be one or more sizes"),
        ((5, (3, 0)), {}, "latent_dims must be one or more sizes"),
        ((5, 3), {}, "latent_dims must be for two layers, the one next to the data first; got"),
        ((5, (3, 2, 2)), {}, "latent_dims must be for two layers"),
        ((5, (3, 2)), {"hidden_dims": ((7,), (7,), (7,))}, "hidden_dims must be for two layers"),
        ((5, (3, 2)), {"hidden_dims": ((7, 0), (7,))}, "hidden_dims must be one or more sizes"),
    ],
)
def test_bad_arguments_are_refused(arguments: Any, options: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        HierarchicalVAE(*arguments, **options)


def test_data_of_another_shape_are_refused() -> None:
    hvae = HierarchicalVAE((5, 7), (3, 2))
    for program in (hvae.model, hvae.guide):
        with pytest.raises(ValueError, match=r"built for a batch of shape \(batch, 5, 7\); got"):
            program(torch.zeros(NUM_DATA, 35))
        with pytest.raises(TypeError, match=r"got torch\.uint8\. Convert with x\.float\(\)"):
            program(torch.zeros(NUM_DATA, 5, 7, dtype=torch.uint8))
