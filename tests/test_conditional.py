"""Data of known classes: exact where everything is linear, and what is no class is refused."""

from __future__ import annotations

from typing import Any

import linear
import pytest
import torch
from pyro import poutine

import ppl_vae as pv
from ppl_vae import scoring
from ppl_vae.conditional import ConditionalVAE

NUM_DATA = 11
# Data, their dimensions, classes and latents: all different primes, and all the same.
SIZES = [(NUM_DATA, 7, 5, 3), (5, 5, 5, 5)]


@pytest.fixture(params=SIZES, ids=["primes", "D = B"])
def exact(request: Any) -> tuple[Any, ...]:
    """A pair, its exact p(x given y) of each class, data and their classes."""
    num_data, *sizes = request.param
    cvae, p = linear.conditional(*sizes)
    y = torch.arange(num_data).flip(0) % sizes[1]
    return cvae, p, p.sample((num_data,))[torch.arange(num_data), y], y


def test_with_the_exact_posterior_every_weight_is_log_px_given_y(exact: Any) -> None:
    cvae, p, x, y = exact
    every = p.log_prob(x.unsqueeze(1)).T  # (num_classes, batch)
    expected = every.gather(0, y.unsqueeze(0)).squeeze(0)
    log_w = scoring.log_weights(cvae.model, cvae.guide, x, y, num_samples=13)
    torch.testing.assert_close(log_w, expected.expand(13, -1), rtol=0, atol=1e-9)
    found = pv.importance_sampling(cvae.model, cvae.guide, x, y, num_samples=3)
    torch.testing.assert_close(found.log_px, expected, rtol=0, atol=1e-9)
    wrong = pv.importance_sampling(cvae.model, cvae.guide, x, (y + 1) % len(every), num_samples=3)
    assert (wrong.log_px - expected).abs().min() > 1e-3


def test_every_way_to_run_many_samples_gives_the_same_scores(exact: Any) -> None:
    cvae, _, x, y = exact
    pair = scoring.Pair(cvae.model, cvae.guide, x, y)
    assert pair.strategy is scoring.particles
    assert pair.encodes_once
    z, _ = pair.draw(pair.encode(x, y), x, y, num_samples=3)
    log_joint = pair.log_joint(z, x, y, num_samples=3)
    for strategy in (scoring.tiles, scoring.loop):
        pair.strategy = strategy
        torch.testing.assert_close(pair.log_joint(z, x, y, num_samples=3), log_joint)


def test_the_model_simulates_its_conditional() -> None:
    cvae, p = linear.conditional()
    num = 20_000
    for label in (0, 4):
        y = torch.full((num,), label)
        with torch.no_grad():
            by_model = cvae.model(None, y)
        for x in (by_model, cvae.sample(y, seed=3)):
            assert ((x.mean(0) - p.mean[label]).abs() < 4.5 * (x.var(0) / num).sqrt()).all()
            assert ((x.mean(0) - p.mean[1]).abs() > 10 * (x.var(0) / num).sqrt()).any()


@pytest.mark.parametrize("shape", [(7,), (5, 7), (3, 5, 7)])
@pytest.mark.parametrize(
    "likelihood", [pv.likelihoods.Bernoulli, lambda: pv.likelihoods.Gaussian(per_pixel=True)], ids=["bits", "per pixel"]
)
def test_programs_have_the_shapes_of_the_contract(shape: tuple[int, ...], likelihood: Any) -> None:
    cvae = ConditionalVAE(shape, 5, 2, hidden_dims=(13,), likelihood=likelihood())
    y = torch.arange(NUM_DATA) % 5
    x = cvae.model(None, y)
    assert x.shape == (NUM_DATA, *shape)
    trace = poutine.trace(cvae.guide).get_trace(x, y)
    assert trace.nodes["z"]["value"].shape == (NUM_DATA, 2)
    assert trace.nodes["z"]["fn"].batch_shape == (NUM_DATA,)
    each = cvae.encode(x, torch.arange(5).unsqueeze(1))
    assert each.batch_shape == (5, NUM_DATA)
    torch.testing.assert_close(each.mean[y, torch.arange(NUM_DATA)], cvae.encode(x, y).mean)
    assert cvae.decode(torch.randn(3, NUM_DATA, 2), y).batch_shape == (3, NUM_DATA)
    assert cvae.reconstruct(x, y).shape == x.shape
    assert not torch.equal(cvae.reconstruct(x, y), cvae.reconstruct(x, (y + 1) % 5))
    assert torch.equal(cvae.sample(y, seed=1), cvae.sample(y, seed=1))
    assert not torch.equal(cvae.sample(y, seed=1, mean=True), cvae.sample(y, seed=2, mean=True))


def test_fit_moves_every_weight_and_learns_what_classes_look_like() -> None:
    """Two classes that are each other's negatives, and a single latent."""
    torch.manual_seed(0)
    y = torch.arange(200) % 2
    x = torch.bernoulli(torch.tensor([[0.9] * 4 + [0.1] * 3, [0.1] * 4 + [0.9] * 3])[y])
    cvae = ConditionalVAE(7, 2, 1, hidden_dims=(13,))
    before = [p.clone() for p in cvae.parameters()]
    pv.fit(cvae.model, cvae.guide, x, y, epochs=40, batch_size=50, learning_rate=1e-2, progress=False)
    assert all(not torch.equal(p, old) for p, old in zip(cvae.parameters(), before, strict=True))
    means = cvae.sample(torch.tensor([0, 1]), mean=True)
    assert (means[0, :4] > 0.6).all()
    assert (means[0, 4:] < 0.4).all()
    assert (means[1, :4] < 0.4).all()
    assert (means[1, 4:] > 0.6).all()


@pytest.mark.parametrize(
    ("y", "error", "match"),
    [
        (torch.tensor([0, 5, 1]), ValueError, r"Classes go from 0 to 4; got some from 0 to 5\. Number them from 0"),
        (torch.tensor([0, -1, 1]), ValueError, r"Classes go from 0 to 4; got some from -1 to 1"),
        (torch.tensor([0.0, 1.0, 2.0]), TypeError, r"must be a tensor of integers; got torch\.float32\. Convert"),
        (torch.tensor([True, False, True]), TypeError, r"must be a tensor of integers; got torch\.bool"),
        ([0, 1, 2], TypeError, "must be a tensor of integers; got list"),
        (torch.tensor([0, 1]), ValueError, r"a class for each of 3 data, shape \(3,\); got \(2,\)"),
        (torch.tensor([[0], [1], [2]]), ValueError, r"a class for each of 3 data, shape \(3,\); got \(3, 1\)"),
    ],
)
def test_what_is_no_class_is_refused(y: Any, error: type[Exception], match: str) -> None:
    cvae = ConditionalVAE(7, 5, 2)
    for program in (cvae.model, cvae.guide):
        with pytest.raises(error, match=match):
            program(torch.zeros(3, 7), y)


def test_bad_arguments_and_data_are_refused() -> None:
    for bad in (0, 2.5, (3,)):
        with pytest.raises(ValueError, match="num_classes must be an integer of at least 1; got"):
            ConditionalVAE(7, bad, 2)
        with pytest.raises(ValueError, match="latent_dim must be an integer of at least 1; got"):
            ConditionalVAE(7, 5, bad)
    with pytest.raises(ValueError, match="data_shape must be one or more sizes"):
        ConditionalVAE((7, 0), 5, 2)
    cvae, y = ConditionalVAE((5, 7), 5, 2), torch.zeros(3, dtype=torch.long)
    for program in (cvae.model, cvae.guide):
        with pytest.raises(ValueError, match=r"built for a batch of shape \(batch, 5, 7\); got"):
            program(torch.zeros(3, 35), y)
    with pytest.raises(ValueError, match=r"Classes go from 0 to 4"):
        cvae.sample(torch.tensor([7]))
