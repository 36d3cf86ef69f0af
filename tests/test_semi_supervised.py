"""M2 and the bound that trains it: exact where everything is linear, the sum over classes written out, few labels."""

from __future__ import annotations

from math import log
from typing import Any

import linear
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch import Tensor, nn

import ppl_vae as pv
from ppl_vae import scoring
from ppl_vae.proposals import Defensive
from ppl_vae.semi_supervised import M2

NUM_DATA = 11
# Data, their dimensions, classes and latents: all different primes, and all the same.
SIZES = [(NUM_DATA, 7, 5, 3), (5, 5, 5, 5)]


@pytest.fixture(params=SIZES, ids=["primes", "D = B"])
def exact(request: Any) -> tuple[Any, ...]:
    """A pair, its exact log p(x, y) of each class `(num_classes, batch)`, data and their classes."""
    num_data, *sizes = request.param
    m2, p = linear.m2(*sizes)
    y = torch.arange(num_data).flip(0) % sizes[1]
    x = p.sample((num_data,))[torch.arange(num_data), y]
    return m2, linear.log_pxy(p, x), x, y


def half(y: Tensor) -> Tensor:
    """Every second label missing."""
    return torch.where(torch.arange(len(y)) % 2 == 0, y, -1)


def log_p(log_pxy: Tensor, label: Tensor) -> Tensor:
    """log p(x, label) where there is a label, log p(x) where there is none."""
    of_label = log_pxy.gather(0, label.clamp(min=0).unsqueeze(0)).squeeze(0)
    return torch.where(label >= 0, of_label, log_pxy.logsumexp(0))


# The pair.


def test_with_the_exact_posterior_every_weight_is_exact_with_and_without_labels(exact: Any) -> None:
    m2, log_pxy, x, y = exact
    for args in ((x, y), (x, half(y)), (x, torch.full_like(y, -1)), (x,)):
        expected = log_p(log_pxy, args[1] if len(args) > 1 else torch.full_like(y, -1))
        log_w = scoring.log_weights(m2.model, m2.guide, *args, num_samples=13)
        torch.testing.assert_close(log_w, expected.expand(13, -1), rtol=0, atol=1e-9)
        found = pv.importance_sampling(m2.model, m2.guide, *args, num_samples=3)
        torch.testing.assert_close(found.log_px, expected, rtol=0, atol=1e-9)


def test_proposals_sum_over_the_unknown_classes(exact: Any) -> None:
    m2, log_pxy, x, y = exact
    found = pv.importance_sampling(m2.model, m2.guide, x, half(y), num_samples=500, proposal=Defensive())
    assert ((found.log_px - log_p(log_pxy, half(y))).abs() < 4.5 * found.standard_error + 1e-9).all()


def test_the_classifier_of_the_exact_pair_is_bayes_rule(exact: Any) -> None:
    m2, log_pxy, x, _ = exact
    torch.testing.assert_close(m2.classify(x).probs.T, log_pxy.softmax(0), rtol=0, atol=1e-9)


def test_log_px_is_the_sum_over_classes_of_what_each_label_would_have(exact: Any) -> None:
    m2, log_pxy, x, _ = exact
    untrained = M2(x.shape[1], len(log_pxy), 2, hidden_dims=(13,), likelihood=pv.likelihoods.Gaussian(1.0)).double()
    for pair, tolerance in ((m2, 1e-9), (untrained, None)):
        each = [
            pv.importance_sampling(pair.model, pair.guide, x, torch.full((len(x),), c), num_samples=1000)
            for c in range(len(log_pxy))
        ]
        log_px = torch.stack([e.log_px for e in each]).logsumexp(0)
        if tolerance is not None:
            torch.testing.assert_close(log_px, log_pxy.logsumexp(0), rtol=0, atol=tolerance)
            continue
        drawn = pv.importance_sampling(pair.model, pair.guide, x, num_samples=1000)
        error = torch.stack([e.standard_error for e in [*each, drawn]]).square().sum(0).sqrt()
        assert ((drawn.log_px - log_px).abs() < 4.5 * error).all()


def test_annealing_sums_over_the_unknown_classes(exact: Any) -> None:
    m2, log_pxy, x, y = exact
    annealed = pv.annealed_importance_sampling(
        m2.model, m2.guide, x, half(y), num_chains=16, num_temperatures=5, seed=1
    )
    assert ((annealed.log_px - log_p(log_pxy, half(y))).abs() < 4.5 * annealed.standard_error + 1e-9).all()


def test_every_way_to_run_many_samples_gives_the_same_scores(exact: Any) -> None:
    m2, _, x, y = exact
    args = x, half(y)
    pair = scoring.Pair(m2.model, m2.guide, *args)
    assert pair.strategy is scoring.particles
    z, log_q = pair.draw({}, *args, num_samples=3)
    log_joint = pair.log_joint(z, *args, num_samples=3)
    for strategy in (scoring.tiles, scoring.loop):
        pair.strategy = strategy
        torch.testing.assert_close(pair.log_joint(z, *args, num_samples=3), log_joint)
        torch.testing.assert_close(pair.log_q({}, z, *args, num_samples=3), log_q)


def test_programs_have_the_shapes_of_the_contract() -> None:
    m2 = M2((3, 7), 5, 2, hidden_dims=(13,))
    x, label = m2.model(num_data=NUM_DATA), half(torch.arange(NUM_DATA) % 5)
    assert x.shape == (NUM_DATA, 3, 7)
    guide_trace = poutine.trace(m2.guide).get_trace(x, label)
    model_trace = poutine.trace(poutine.replay(m2.model, trace=guide_trace)).get_trace(x, label)
    y = guide_trace.nodes["y"]["value"]
    assert y.shape == (NUM_DATA,)
    assert torch.equal(y[::2], label[::2])
    for name in ("y", "label", "z", "x"):
        assert model_trace.nodes[name]["fn"].batch_shape == (NUM_DATA,)
        assert [f.name for f in model_trace.nodes[name]["cond_indep_stack"]] == ["data"]
    assert m2.classify(x).probs.shape == (NUM_DATA, 5)
    assert "label" not in poutine.trace(m2.model).get_trace(x)
    assert m2.sample(torch.tensor([0, 4]), seed=1).shape == (2, 3, 7)
    assert m2.reconstruct(x, y).shape == x.shape


def test_the_model_simulates_all_classes_alike() -> None:
    m2, p = linear.m2()
    with torch.no_grad():
        x = m2.model(num_data=(num := 20_000))
    assert ((x.mean(0) - p.mean.mean(0)).abs() < 4.5 * (x.var(0) / num).sqrt()).all()
    share = m2.classify(x).probs.double()  # exact, so that its mean is the prior
    assert ((share.mean(0) - 1 / 5).abs() < 4.5 * share.std(0) / num**0.5).all()


@pytest.mark.parametrize(
    ("label", "error", "match"),
    [
        (torch.tensor([0, 5, 1]), ValueError, r"Classes go from 0 to 4, or -1 where it is not known; got some from 0"),
        (torch.tensor([0, -2, 1]), ValueError, r"got some from -2 to 1\. Number them from 0"),
        (torch.tensor([0.0, -1.0, 2.0]), TypeError, r"must be a tensor of integers; got torch\.float32\. Convert"),
        (torch.tensor([0, 1]), ValueError, r"a class for each of 3 data, shape \(3,\); got \(2,\)"),
    ],
)
def test_what_is_no_label_is_refused(label: Any, error: type[Exception], match: str) -> None:
    m2 = M2(7, 5, 2)
    for program in (m2.model, m2.guide):
        with pytest.raises(error, match=match):
            program(torch.zeros(3, 7), label)
        with pytest.raises(ValueError, match=r"built for a batch of shape \(batch, 7\); got"):
            program(torch.zeros(3, 8))
    with pytest.raises(ValueError, match="num_classes must be an integer of at least 1; got 0"):
        M2(7, 0, 2)


# The bound.


@pytest.fixture
def untrained() -> tuple[M2, Tensor, Tensor]:
    torch.manual_seed(1)
    m2 = M2(7, 5, 3, hidden_dims=(13,), activation=nn.Tanh(), likelihood=pv.likelihoods.Gaussian(0.5)).double()
    return m2, torch.randn(NUM_DATA, 7, dtype=torch.float64), torch.arange(NUM_DATA) % 5


def by_hand(m2: M2, x: Tensor, y: Tensor) -> Tensor:
    """log p(x, y, z) − log q(z given x, y) at a draw of z for each x and y, broadcast."""
    q = m2.encode(x, y)
    z = q.rsample()
    return -log(m2.num_classes) + m2.model.prior().log_prob(z) + m2.decode(z, y).log_prob(x) - q.log_prob(z)


def summed_by_hand(m2: M2, x: Tensor) -> Tensor:
    """The bound of each x without a label, the sum over the classes written out."""
    q = m2.classify(x)
    log_w = by_hand(m2, x, torch.arange(m2.num_classes).unsqueeze(1))
    return (q.probs.T * log_w).sum(0) + q.entropy()


def gradients(loss: Tensor, m2: M2) -> dict[str, Tensor]:
    names, parameters = zip(*m2.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))


def test_at_the_exact_posterior_the_bound_is_log_p(exact: Any) -> None:
    m2, log_pxy, x, y = exact
    for label in (y, half(y), torch.full_like(y, -1)):
        for alpha in (0.0, 7.0):
            loss, bound = pv.SemiSupervisedELBO(alpha).terms(m2.model, m2.guide, x, label)
            torch.testing.assert_close(bound, log_p(log_pxy, label), rtol=0, atol=1e-9)
            known = label >= 0
            classified = log_pxy.log_softmax(0).gather(0, y.unsqueeze(0)).squeeze(0)[known].sum()
            torch.testing.assert_close(loss, -bound.sum() - alpha * classified, rtol=0, atol=1e-8)


def test_it_is_the_sum_over_classes_of_pyro(exact: Any) -> None:
    """With another classifier, and z still exact: nothing is random, and both are Σ_y q(y) [log p(x, y) − log q(y)]."""
    m2, log_pxy, x, _ = exact
    with torch.no_grad():
        m2.guide.classifier.layers[0].weight.mul_(0.3)
    objective, missing = pv.SemiSupervisedELBO(1.0), torch.full((len(x),), -1)
    loss = objective.differentiable_loss(m2.model, m2.guide, x, missing)
    q = m2.classify(x)
    expected = -(q.probs.T * (log_pxy - q.logits.T)).sum()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-8)
    assert loss > -log_pxy.logsumexp(0).sum() + 0.1
    pyros = TraceEnum_ELBO(max_plate_nesting=1)
    enumerated = pyros.differentiable_loss(m2.model, config_enumerate(m2.guide, "parallel"), x)
    torch.testing.assert_close(loss, enumerated, rtol=0, atol=1e-8)
    # The classifier's gradient has no noise either.
    classifier = list(m2.guide.classifier.parameters())
    for one, other in zip(
        torch.autograd.grad(loss, classifier), torch.autograd.grad(enumerated, classifier), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-8)


def test_without_labels_it_is_the_sum_over_classes_written_out(untrained: Any) -> None:
    m2, x, _ = untrained
    objective, missing = pv.SemiSupervisedELBO(3.0), torch.full((NUM_DATA,), -1)
    objective.loss(m2.model, m2.guide, x, missing)  # looks at the pair, which draws
    torch.manual_seed(2)
    loss, bound = objective.terms(m2.model, m2.guide, x, missing)
    torch.manual_seed(2)
    m2.guide(x)  # for q(y given x)
    expected = summed_by_hand(m2, x)
    torch.testing.assert_close(bound, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(loss, -expected.sum(), rtol=0, atol=1e-5)
    found, by_formula = gradients(loss, m2), gradients(-expected.sum(), m2)
    for name in found:
        torch.testing.assert_close(found[name], by_formula[name], rtol=1e-6, atol=1e-8)
        assert found[name].abs().sum() > 0
    # What would be wrong is told apart: without the entropy, and with all classes alike.
    entropy = m2.classify(x).entropy()
    torch.manual_seed(2)
    m2.guide(x)
    alike = by_hand(m2, x, torch.arange(5).unsqueeze(1)).mean(0) + entropy
    for wrong in (expected - entropy, alike):
        assert (wrong - bound).abs().max() > 0.1


def test_with_labels_it_is_the_formula_and_alpha_is_of_the_loss_alone(untrained: Any) -> None:
    m2, x, y = untrained
    for alpha in (0.0, 3.0):
        objective = pv.SemiSupervisedELBO(alpha)
        objective.loss(m2.model, m2.guide, x, y)
        torch.manual_seed(2)
        loss, bound = objective.terms(m2.model, m2.guide, x, y)
        torch.manual_seed(2)
        m2.guide(x)
        m2.guide.classify(x, y).sample()
        expected = by_hand(m2, x, y)
        torch.testing.assert_close(bound, expected, rtol=0, atol=1e-5)
        with_alpha = -expected.sum() - alpha * m2.classify(x).log_prob(y).sum()
        torch.testing.assert_close(loss, with_alpha, rtol=0, atol=1e-5)
        found, by_formula = gradients(loss, m2), gradients(with_alpha, m2)
        for name in found:
            torch.testing.assert_close(found[name], by_formula[name], rtol=1e-6, atol=1e-8)
            assert (found[name].abs().sum() > 0) == (alpha > 0 or "classifier" not in name)


def test_a_mixed_batch_is_its_two_parts_added(exact: Any) -> None:
    """At a z that is exact, where nothing is random."""
    m2, _, x, y = exact
    with torch.no_grad():
        m2.guide.classifier.layers[0].weight.mul_(0.3)
    label, objective = half(y), pv.SemiSupervisedELBO(3.0)
    known = label >= 0
    together = objective.terms(m2.model, m2.guide, x, label)
    parts = [objective.terms(m2.model, m2.guide, x[part], label[part]) for part in (known, ~known)]
    torch.testing.assert_close(together.loss, parts[0].loss + parts[1].loss)
    for part, terms in zip((known, ~known), parts, strict=True):
        torch.testing.assert_close(together.bound[part], terms.bound)


def test_the_gradient_is_that_of_the_loss(untrained: Any) -> None:
    """Central differences in a random direction, with the same draws."""
    m2, x, y = untrained
    objective = pv.SemiSupervisedELBO(3.0)

    def loss() -> Tensor:
        torch.manual_seed(4)
        return objective.differentiable_loss(m2.model, m2.guide, x, half(y))

    loss()
    direction = {name: torch.randn_like(p) for name, p in m2.named_parameters()}
    slope = sum((g * direction[name]).sum() for name, g in gradients(loss(), m2).items())
    values, step = [], 1e-5
    for sign in (1, -2):
        with torch.no_grad():
            for name, p in m2.named_parameters():
                p.add_(sign * step * direction[name])
        values.append(loss().item())
    assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope.item(), rel=1e-5)


def test_every_way_of_training_moves_every_weight() -> None:
    x, label = torch.bernoulli(torch.full((NUM_DATA, 7), 0.4)), half(torch.arange(NUM_DATA) % 5)
    objective = pv.SemiSupervisedELBO(2.0)

    def by_svi(m2: M2) -> None:
        pyro.infer.SVI(m2.model, m2.guide, pyro.optim.Adam({"lr": 1e-2}), objective).step(x, label)

    def by_torch(m2: M2) -> None:
        optimizer = torch.optim.Adam(m2.parameters(), lr=1e-2)
        objective(m2.model, m2.guide)(x, label).backward()
        optimizer.step()

    def by_fit(m2: M2) -> None:
        history = pv.fit(
            m2.model, m2.guide, x, label, objective=objective, validation=(x, label), epochs=1, progress=False
        )
        assert history.loss[0] > -history.bound[0] + 0.1  # alpha is in the one and not in the other

    for train in (by_svi, by_torch, by_fit):
        m2 = M2(7, 5, 3, hidden_dims=(13,))
        before = [p.clone() for p in m2.parameters()]
        train(m2)
        assert all(not torch.equal(p, old) for p, old in zip(m2.parameters(), before, strict=True))


def test_its_gradient_has_less_noise_than_that_of_drawn_classes(untrained: Any) -> None:
    """What the sum is for: `Trace_ELBO` estimates the same gradient of the classifier, with much more noise."""
    m2, x, _ = untrained
    missing = torch.full((NUM_DATA,), -1)
    weight = m2.guide.classifier.layers[0].bias

    def some(objective: Any, num: int) -> Tensor:
        losses = (objective.differentiable_loss(m2.model, m2.guide, x, missing) for _ in range(num))
        return torch.stack([torch.autograd.grad(loss, weight)[0] for loss in losses])

    summed, drawn = some(pv.SemiSupervisedELBO(1.0), 30), some(Trace_ELBO(), 120)
    error = (summed.var(0) / 30 + drawn.var(0) / 120).sqrt()
    assert ((summed.mean(0) - drawn.mean(0)).abs() < 4.5 * error).all()
    assert summed.var(0).sum() < 0.2 * drawn.var(0).sum()


def test_what_it_cannot_train_is_refused() -> None:
    for alpha in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="alpha must be a number of at least 0; got"):
            pv.SemiSupervisedELBO(alpha)

    def model(x: Tensor, label: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1, keepdim=True), 1.0).to_event(1), obs=x)

    def guide(x: Tensor, label: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0).expand([len(x), 2]).to_event(1))

    with pytest.raises(ValueError, match=r"sums over a discrete latent 'y', the class, but the guide draws \['z'\]"):
        pv.SemiSupervisedELBO(1.0).loss(model, guide, torch.zeros(3, 1), torch.tensor([0, -1, 1]))


# Few labels.


def test_images_without_labels_help_to_classify_digits() -> None:
    """100 labels among 1,438 digits: M2 against its own classifier trained on the labels alone."""
    digits = pv.data.load("digits").static_binarization(seed=0)
    x, y, test, test_y = digits.train, digits.train_labels, digits.test, digits.test_labels
    assert y is not None
    assert test_y is not None
    torch.manual_seed(0)
    labelled = torch.cat([(y == c).nonzero().squeeze(1)[:10] for c in range(10)])

    def built() -> M2:
        return M2((8, 8), 10, 10, hidden_dims=(100,))

    def accuracy(m2: M2) -> float:
        with torch.no_grad():
            return (m2.classify(test).probs.argmax(-1) == test_y).double().mean().item()

    alone = built()
    optimizer = torch.optim.Adam(alone.guide.classifier.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        (-alone.classify(x[labelled]).log_prob(y[labelled]).mean()).backward()
        optimizer.step()

    m2 = built()
    label = torch.full_like(y, -1)
    label[labelled] = y[labelled]
    pv.fit(
        m2.model,
        m2.guide,
        x,
        label,
        objective=pv.SemiSupervisedELBO(50.0),
        epochs=15,
        batch_size=100,
        learning_rate=1e-2,
        progress=False,
    )
    assert accuracy(alone) > 0.65
    assert accuracy(m2) > accuracy(alone) + 0.03
