"""Log weights of any pair: the same numbers in every form, and a sentence where there are none."""

from __future__ import annotations

import itertools
from typing import Any

import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormalMessenger
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from ppl_vae import isolation
from ppl_vae.autoencoder import Autoencoder
from ppl_vae.coin import BetaBernoulli
from ppl_vae.likelihoods import Bernoulli, Gaussian
from ppl_vae.scoring import Pair, check_data, log_weights, loop, particles, rows, tiles
from ppl_vae.vae import VAE


@pytest.fixture
def lg() -> Any:
    return pairs.linear_gaussian()


@pytest.fixture
def x(lg: Any) -> Tensor:
    return pairs.simulated(lg)


EXPECTED_STRATEGY = {"with_two_dimensional_decoder": tiles, "one_sample_at_a_time": loop}


@pytest.mark.parametrize("form", pairs.FORMS)
def test_every_form_has_the_weights_of_the_formula(form: str, lg: Any, x: Tensor) -> None:
    guide = lg.perturbed_guide()
    model, q = pairs.FORMS[form](lg, guide.q)
    pair = Pair(model, q, x)
    z, log_q = pair.draw(pair.encode(x), x, num_samples=5)
    log_p = pair.log_joint(z, x, num_samples=5)
    latent = z["z"].reshape(5, pairs.NUM_DATA, pairs.LATENT_DIM)
    by_hand = pairs.prior(lg).log_prob(latent) + pairs.conditional(lg, latent).to_event(1).log_prob(x)
    torch.testing.assert_close(log_q, guide.q(x).log_prob(latent), rtol=0, atol=1e-12)
    torch.testing.assert_close(log_p, by_hand, rtol=0, atol=1e-11)
    assert log_p.shape == log_q.shape == (5, pairs.NUM_DATA)
    assert log_p.dtype == log_q.dtype == torch.float64
    assert pair.strategy is EXPECTED_STRATEGY.get(form, particles)
    assert pair.encodes_once
    assert pair.splits == (form != "with_fixed_plate")


@pytest.mark.parametrize("form", pairs.FORMS)
@pytest.mark.parametrize("strategy", [particles, tiles, loop])
def test_strategies_agree(form: str, strategy: Any, lg: Any, x: Tensor) -> None:
    model, q = pairs.FORMS[form](lg, lg.perturbed_guide().q)
    pair = Pair(model, q, x)
    z, log_q = pair.draw(pair.encode(x), x, num_samples=5)
    try:
        again = strategy(pair.layout, q, (x,), z, 5).total
        scored = strategy(pair.layout, model, (x,), z, 5).total
    except (ValueError, RuntimeError):
        assert strategy is not pair.strategy
        return
    torch.testing.assert_close(again, log_q, rtol=0, atol=1e-12)
    torch.testing.assert_close(scored, loop(pair.layout, model, (x,), z, 5).total, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", pairs.FORMS)
def test_a_loop_that_draws_gives_canonical_latents(form: str, lg: Any, x: Tensor) -> None:
    model, q = pairs.FORMS[form](lg, lg.perturbed_guide().q)
    pair = Pair(model, q, x)
    shapes = set()
    for strategy in (particles, tiles, loop):
        try:
            z, *_ = scores = strategy(pair.layout, q, (x,), {}, 5)
            log_q = scores.total
        except (ValueError, RuntimeError):
            continue
        shapes.add((tuple(z["z"].shape), tuple(log_q.shape)))
    assert len(shapes) == 1
    assert shapes.pop()[1] == (5, pairs.NUM_DATA)


def test_exact_posterior_has_weights_without_variance(lg: Any, x: Tensor) -> None:
    lw = log_weights(lg.model, lg.guide, x, num_samples=13)
    torch.testing.assert_close(lw, lg.log_px(x).expand(13, -1), rtol=0, atol=1e-12)


def test_latent_dim_equal_to_batch_size() -> None:
    """D = B, where a forgotten to_event or a broadcast of the wrong axis goes unnoticed."""
    lg = pairs.linear_gaussian(latent_dim=5, data_dim=5)
    x = pairs.simulated(lg, num_data=5)
    for form in pairs.FORMS.values():
        if form not in (pairs.with_fixed_plate, pairs.one_sample_at_a_time):
            lw = log_weights(*form(lg, lg.posterior), x, num_samples=5)
            torch.testing.assert_close(lw, lg.log_px(x).expand(5, -1), rtol=0, atol=1e-11)


def test_autonormal_inside_the_plate(lg: Any, x: Tensor) -> None:
    guide = lg.perturbed_guide()
    model, auto = pairs.auto_normal(lg, guide, x)
    pair = Pair(model, auto, x)
    z, log_q = pair.draw(pair.encode(x), x, num_samples=5)
    torch.testing.assert_close(log_q, guide.q(x).log_prob(z["z"]), rtol=0, atol=1e-9)
    assert not pair.splits
    assert not pair.encodes_once
    assert pair.strategy is particles


def test_autonormal_brings_the_jacobian_of_a_constrained_latent() -> None:
    coin = BetaBernoulli(2.0, 3.0)
    tosses = torch.bernoulli(torch.full((5, 7), 0.4))
    auto = pyro.infer.autoguide.AutoNormal(coin.model, init_scale=0.8)
    auto(tosses)
    lw = log_weights(coin.model, auto, tosses, num_samples=20_000).detach()
    ratio = (lw - coin.log_px(tosses)).exp()
    error = (ratio.mean(0) - 1) / (ratio.std(0) / 20_000**0.5)
    assert error.abs().max() < 4.5
    wrong = lw + pair_jacobian(auto, tosses)
    off = wrong.exp().mean(0) / coin.log_px(tosses).exp() - 1
    assert off.abs().max() > 0.5


def pair_jacobian(auto: Any, tosses: Tensor) -> Tensor:
    """log |dz/du| at the middle of the guide: what a guide without its Jacobian would leave out."""
    p = auto.median(tosses)["z"].detach()
    return (p * (1 - p)).log().double()


def test_a_guide_with_one_latent_given_another_runs_again_for_each_sample(x: Tensor) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
            z1 = pyro.sample("z1", dist.Normal(z2.sum(-1, keepdim=True).expand((*z2.shape[:-1], 3)), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z1.mean(-1, keepdim=True).expand((*z1.shape[:-1], 7)), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(x[..., :3], 1.0).to_event(1))
            pyro.sample("z2", dist.Normal(z1[..., :2], 1.0).to_event(1))

    pair = Pair(model, guide, x)
    assert not pair.encodes_once
    z, log_q = pair.draw(pair.encode(x), x, num_samples=5)
    by_hand = dist.Normal(x[:, :3], 1.0).to_event(1).log_prob(z["z1"])
    by_hand = by_hand + dist.Normal(z["z1"][..., :2], 1.0).to_event(1).log_prob(z["z2"])
    torch.testing.assert_close(log_q, by_hand, rtol=0, atol=1e-12)
    torch.testing.assert_close(pair.log_joint(z, x, num_samples=5), loop(pair.layout, model, (x,), z, 5).total)


def test_the_guide_runs_once_for_all_samples(lg: Any, x: Tensor) -> None:
    runs = []

    def guide(x: Tensor) -> None:
        runs.append(len(x))
        lg.guide(x)

    pair = Pair(lg.model, guide, x)
    runs.clear()
    pair.log_weights(x, num_samples=1000)
    assert runs == [pairs.NUM_DATA]


def test_masked_data_do_not_count(lg: Any, x: Tensor) -> None:
    mask = torch.rand(x.shape, dtype=torch.float64) < 0.5

    def model(x: Tensor, mask: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pairs.prior(lg))
            pyro.sample("x", pairs.conditional(lg, z).mask(mask).to_event(1), obs=x)

    def by_handler(x: Tensor, mask: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", pairs.prior(lg).expand([1]))
            with pyro.plate("pixels", x.shape[1], dim=-1), poutine.mask(mask=mask):
                pyro.sample("x", pairs.conditional(lg, z.squeeze(-2)), obs=x)

    def guide(x: Tensor, mask: Tensor) -> None:
        lg.guide(x)

    def guide_with_pixels(x: Tensor, mask: Tensor) -> None:
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", lg.posterior(x.unsqueeze(-2)))

    with isolation.seeded(1):
        one = log_weights(model, guide, x, mask, num_samples=5)
    with isolation.seeded(1):
        other = log_weights(by_handler, guide_with_pixels, x, mask, num_samples=5)
    pair = Pair(model, guide, x, mask)
    z, _ = pair.draw(pair.encode(x, mask), x, mask, num_samples=5)
    log_p = pairs.prior(lg).log_prob(z["z"]) + (pairs.conditional(lg, z["z"]).log_prob(x) * mask).sum(-1)
    torch.testing.assert_close(pair.log_joint(z, x, mask, num_samples=5), log_p, rtol=0, atol=1e-12)
    assert one.shape == other.shape


def test_weights_do_not_depend_on_the_other_data(lg: Any, x: Tensor) -> None:
    pair = Pair(lg.model, lg.perturbed_guide(), x)
    z, log_q = pair.draw(pair.encode(x), x, num_samples=5)
    whole = pair.log_joint(z, x, num_samples=5) - log_q
    for n in range(len(x)):
        alone = pair.log_joint({"z": z["z"][:, n : n + 1]}, x[n : n + 1], num_samples=5) - log_q[:, n : n + 1]
        torch.testing.assert_close(alone, whole[:, n : n + 1], rtol=0, atol=1e-12)


def test_mean_log_weight_is_pyros_elbo(lg: Any, x: Tensor) -> None:
    guide = lg.perturbed_guide()
    lw = log_weights(lg.model, guide, x, num_samples=1)
    pair = Pair(lg.model, guide, x)
    with isolation.seeded(4):
        trace_loss = Trace_ELBO().loss(lg.model, guide, x)
    with isolation.seeded(4):
        guide_trace = poutine.trace(guide).get_trace(x)
    z = {"z": guide_trace.nodes["z"]["value"].unsqueeze(0)}
    mine = pair.log_joint(z, x, num_samples=1) - guide.q(x).log_prob(z["z"])
    assert lw.shape == (1, len(x))
    assert -mine.sum().item() == pytest.approx(trace_loss, abs=1e-9)


def test_conv_decoders_flatten_and_raw_ones_are_tiled() -> None:
    x = torch.bernoulli(torch.full((5, 8, 8), 0.5))
    vae = VAE((8, 8), 2)
    raw = nn.Sequential(nn.Unflatten(1, (2, 1, 1)), nn.ConvTranspose2d(2, 1, 8), nn.Flatten(1), nn.Unflatten(1, (8, 8)))
    own = VAE((8, 8), 2, decoder=raw)
    assert Pair(own.model, own.guide, x).strategy is particles

    def model(x: Tensor) -> None:
        pyro.module("raw", raw)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", vae.prior())
            pyro.sample("x", dist.Bernoulli(logits=raw(z)).to_event(2), obs=x)

    pair = Pair(model, vae.guide, x)
    assert pair.strategy is tiles
    z, _ = pair.draw(pair.encode(x), x, num_samples=3)
    torch.testing.assert_close(pair.log_joint(z, x, num_samples=3), loop(pair.layout, model, (x,), z, 3).total)


def test_batch_normalisation_is_caught_and_tiled() -> None:
    """BatchNorm1d on (samples, batch, features) takes the batch for its features when the two are equal."""
    decoder = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 4))
    decoder[1].running_mean.copy_(torch.tensor([0.1, -0.4, 0.7]))
    decoder[1].running_var.copy_(torch.tensor([0.5, 1.5, 2.5]))

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[..., :2], 1.0).to_event(1))

    with isolation.evaluation():
        assert Pair(model, guide, torch.randn(3, 4)).strategy is tiles
    assert decoder[1].training


@pytest.mark.parametrize("likelihood", [Bernoulli, Gaussian, lambda: Gaussian(per_pixel=True)])
def test_log_weights_can_be_recorded_into_one_graph(likelihood: Any) -> None:
    """No Python on the hot path depends on a value: the recorded graph gives the same weights on other data."""
    vae = VAE((8, 8), 3, likelihood=likelihood())
    x, other = torch.bernoulli(torch.full((2, 5, 8, 8), 0.5))
    with torch.no_grad(), pyro.validation_enabled(False):
        pair = Pair(vae.model, vae.guide, x)
        graph = make_fx(lambda x: pair.log_weights(x, num_samples=7))(x)
        with isolation.seeded(1):
            recorded = graph(other)
        with isolation.seeded(1):
            torch.testing.assert_close(recorded, pair.log_weights(other, num_samples=7), rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------
# What is refused.


def z_prior() -> Any:
    return dist.Normal(torch.zeros(2), 1.0).to_event(1)


def ok_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", z_prior())
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def ok_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", z_prior())


def global_latent(x: Tensor) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", z_prior())
        pyro.sample("x", dist.Normal(z.sum(-1) + w, 1.0), obs=x)


def global_guide(x: Tensor) -> None:
    pyro.sample("w", dist.Normal(0.0, 1.0))
    ok_guide(x)


def no_plate(x: Tensor) -> None:
    z = pyro.sample("z", z_prior().expand([len(x)]))
    pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def no_plate_guide(x: Tensor) -> None:
    pyro.sample("z", z_prior().expand([len(x)]))


def scaled_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        with poutine.scale(scale=0.5):
            z = pyro.sample("z", z_prior())
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def scaled_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)), poutine.scale(scale=0.5):
        pyro.sample("z", z_prior())


def delta_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Delta(torch.zeros(2)).to_event(1))


def other_name_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("latent", z_prior())


def extra_guide(x: Tensor) -> None:
    ok_guide(x)
    with pyro.plate("more", len(x)):
        pyro.sample("auxiliary", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})


def missing_to_event(x: Tensor) -> None:
    """As many latent dimensions as probed data: Pyro's plate does not notice."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(x), len(x)), 1.0))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def missing_to_event_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(len(x), len(x)), 1.0))


def sequential_model(x: Tensor) -> None:
    for i in pyro.plate("data", len(x)):
        z = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
        pyro.sample(f"x_{i}", dist.Normal(z, 1.0), obs=x[i])


def sequential_guide(x: Tensor) -> None:
    for i in pyro.plate("data", len(x)):
        pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))


def subsampled_pixels(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-2):
        z = pyro.sample("z", z_prior().expand([1]))
        with pyro.plate("pixels", 5, subsample_size=2, dim=-1):
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x.unsqueeze(-1).expand(-1, 2))


def subsampled_pixels_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x), dim=-2):
        pyro.sample("z", z_prior().expand([1]))


def one_latent_for_all(x: Tensor) -> None:
    with pyro.plate("data"):
        z = pyro.sample("z", z_prior())
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def one_latent_for_all_guide(x: Tensor) -> None:
    with pyro.plate("data"):
        pyro.sample("z", z_prior())


def picks_its_own_data(x: Tensor) -> None:
    with pyro.plate("data", len(x), subsample_size=2) as index:
        z = pyro.sample("z", z_prior())
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x[index])


def picks_its_own_data_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x), subsample_size=2):
        pyro.sample("z", z_prior())


def random_density(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", z_prior())
        z = torch.nn.functional.dropout(z, 0.5)  # on in every mode
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


def observing_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", z_prior())
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)


def guide_with_factor(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", z_prior())
        pyro.factor("bonus", torch.ones(len(x)), has_rsample=False)


def masked_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", z_prior().mask(False))


def improper_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real_vector, (), (2,)))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)


COVARIATE = torch.linspace(-2, 2, 5)


def uses_the_index(x: Tensor) -> None:
    with pyro.plate("data", len(x)) as index:
        z = pyro.sample("z", z_prior())
        pyro.sample("x", dist.Normal(z.sum(-1) + COVARIATE[index], 1.0), obs=x)


def uses_the_batch(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", z_prior())
        pyro.sample("x", dist.Normal(z.sum(-1) - x.mean(), 1.0), obs=x)


PLANAR = dist.transforms.planar(2)


def planar_guide(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.TransformedDistribution(z_prior().expand([len(x)]), [PLANAR]))


def two_plates(x: Tensor) -> None:
    with pyro.plate("rows", 5, dim=-2), pyro.plate("columns", 5, dim=-1):
        z = pyro.sample("z", z_prior())
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x.expand(5, 5))


def two_plates_guide(x: Tensor) -> None:
    with pyro.plate("rows", 5, dim=-2), pyro.plate("columns", 5, dim=-1):
        pyro.sample("z", z_prior())


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "latent outside the plate": (global_latent, global_guide, "Site 'w' of the model is outside the plate 'data'"),
    "no plate": (no_plate, no_plate_guide, r"No plate of the model is over the 5 data.*pyro\.plate"),
    "scaled model": (scaled_model, ok_guide, "Site 'z' of the model is scaled by 0.5"),
    "scaled guide": (ok_model, scaled_guide, "Site 'z' of the guide is scaled by 0.5"),
    "delta guide": (ok_model, delta_guide, "puts all of 'z' at one point"),
    "names differ": (ok_model, other_name_guide, "The model draws 'z', which the guide does not"),
    "a latent of the guide alone": (ok_model, extra_guide, "The guide draws 'auxiliary', which the model does not"),
    "no guide for a latent": (global_latent, ok_guide, "The model draws 'w', which the guide does not"),
    "missing to_event": (missing_to_event, missing_to_event_guide, r"Site 'z' of the model .* no plate declares"),
    "sequential plate": (sequential_model, sequential_guide, "is in the sequential plate 'data'"),
    "part of a datum": (subsampled_pixels, subsampled_pixels_guide, "plate 'pixels', of whose 5 elements only 2"),
    "one latent for all": (one_latent_for_all, one_latent_for_all_guide, r"shape \(\), not one for each of the 5 data"),
    "picks its own data": (picks_its_own_data, picks_its_own_data_guide, "No plate of the model is over the 5 data"),
    "guide observes": (ok_model, observing_guide, "The guide observes 'x'"),
    "guide with a factor": (ok_model, guide_with_factor, "The guide observes 'bonus'"),
    "masked in the guide only": (ok_model, masked_guide, "'z' is masked differently in the two programs"),
    "improper prior": (improper_model, ok_guide, "The prior of 'z' is improper"),
    "plate's index": (uses_the_index, ok_guide, "The model gives a datum another density in another batch"),
    "statistics of the batch": (uses_the_batch, ok_guide, "The model gives a datum another density in another batch"),
    "flow without an inverse": (ok_model, planar_guide, "a flow without an inverse"),
    "two plates as long as the data": (two_plates, two_plates_guide, "are all as long as the data; name the one"),
    "random density": (random_density, ok_guide, "The model gave two densities"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_a_sentence(case: str) -> None:
    model, guide, match = REFUSED[case]
    with pytest.raises(ValueError, match=match):
        Pair(model, guide, torch.randn(5))


def test_autoguides_without_a_density_per_datum_are_refused(lg: Any, x: Tensor) -> None:
    model = pairs.as_functions(lg, lg.posterior)[0]
    for autoguide, match in ((AutoDelta(model), "at one point"), (AutoDiagonalNormal(model), "for all data at once")):
        autoguide(x)
        with pytest.raises(ValueError, match=match):
            Pair(model, autoguide, x)


def test_an_autoencoder_is_refused() -> None:
    autoencoder = Autoencoder((8, 8), 2)
    with pytest.raises(ValueError, match=r"no density log q.*autoencoder"):
        Pair(autoencoder.model, autoencoder.guide, torch.zeros(5, 8, 8))


def test_a_missing_to_event_is_explained(lg: Any, x: Tensor) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(13), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(
        ValueError, match=r"^Shape mismatch inside plate.* needs \.to_event\(1\) on its distribution\.$"
    ):
        Pair(model, lg.guide, x)


def test_data_are_checked() -> None:
    assert check_data(torch.zeros(5, 2)) == 5
    assert check_data(torch.zeros(5, dtype=torch.int64)) == 5
    with pytest.raises(TypeError, match="must be a tensor with one row per datum; got list"):
        check_data([1.0])
    with pytest.raises(TypeError, match="got nothing"):
        check_data()
    with pytest.raises(ValueError, match="There are no data"):
        check_data(torch.zeros(0, 5))
    for bad in (float("nan"), float("inf")):
        x = torch.zeros(5, 2)
        x[3, 1] = bad
        with pytest.raises(ValueError, match="1 of 5 data hold NaN or infinite values, datum 3 the first"):
            check_data(x)


def test_rows_of_every_tensor() -> None:
    x, y = torch.arange(5.0), torch.arange(10.0).reshape(5, 2)
    a, b, c, d = rows((x, y, torch.tensor(0.5), "text"), torch.tensor([4, 0]))
    assert a.tolist() == [4.0, 0.0]
    assert b.tolist() == [[8.0, 9.0], [0.0, 1.0]]
    assert c == 0.5
    assert d == "text"
    with pytest.raises(ValueError, match="argument 2 of the programs has 3 rows, the first has 5"):
        check_data(x, torch.ones(3))
    with pytest.raises(ValueError, match="datum 4 the first"):
        check_data(x, torch.tensor([0.0, 0, 0, 0, torch.nan]))


def test_the_data_plate_is_the_one_that_follows_the_data() -> None:
    """As many pixels as probed data, and every site in both plates."""

    def model(x: Tensor) -> None:
        with pyro.plate("pixels", x.shape[1], dim=-1), pyro.plate("batch", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("pixels", x.shape[1], dim=-1), pyro.plate("batch", len(x), dim=-2):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    for num_data in (6, 7):
        x = torch.randn(num_data, 6).double()
        lw = log_weights(model, guide, x, num_samples=3)
        exact = dist.Normal(0.0, 2**0.5).log_prob(x).sum(1)
        torch.testing.assert_close(lw, exact.expand(3, -1), rtol=0, atol=1e-5)


def test_tiles_of_a_subsampled_plate_are_no_longer_than_it() -> None:
    raw = nn.Sequential(nn.Unflatten(1, (2, 1, 1)), nn.ConvTranspose2d(2, 1, 8))

    def model(x: Tensor) -> None:
        pyro.module("raw", raw)
        with pyro.plate("data", 13, subsample_size=len(x)):
            z = pyro.sample("z", z_prior())
            pyro.sample("x", dist.Bernoulli(logits=raw(z)).to_event(3), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", 13, subsample_size=len(x)):
            pyro.sample("z", z_prior())

    x = torch.bernoulli(torch.full((13, 1, 8, 8), 0.5))
    pair = Pair(model, guide, x)
    assert pair.strategy is tiles
    z, _ = pair.draw(pair.encode(x), x, num_samples=5)
    torch.testing.assert_close(pair.log_joint(z, x, num_samples=5), loop(pair.layout, model, (x,), z, 5).total)


def test_a_guide_that_runs_the_model_leaves_out_what_it_observes() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.randn(7)
    guide = AutoNormalMessenger(model, init_scale=0.7)
    guide(x)
    ratio = (log_weights(model, guide, x, num_samples=20_000).detach() - dist.Normal(0.0, 2**0.5).log_prob(x)).exp()
    assert ((ratio.mean(0) - 1).abs() < 4.5 * ratio.std(0) / 20_000**0.5).all()


def test_a_guide_may_reach_beyond_the_support_of_the_prior() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Uniform(torch.tensor(-1.0), torch.tensor(1.0)))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    x = torch.tensor([-0.5, 0.2, 0.9])
    lw = log_weights(model, guide, x, num_samples=20_000)
    assert lw.isneginf().any()
    normal = dist.Normal(0.0, 1.0)
    exact = (normal.cdf((1 - x) / 0.5) - normal.cdf((-1 - x) / 0.5)) / 2
    weights = lw.exp()
    assert ((weights.mean(0) - exact).abs() < 4.5 * weights.std(0) / 20_000**0.5).all()


@pytest.mark.filterwarnings("ignore:.torch.jit.*:FutureWarning", "ignore:.torch.jit.*:DeprecationWarning")
def test_looking_at_a_pair_changes_nothing_in_it() -> None:
    decoder = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 4))
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 4)))
    vae = VAE((4,), 2, encoder=scripted, decoder=decoder)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    state = torch.get_rng_state()
    Pair(vae.model, vae.guide, torch.ones(7, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert all(module.training for module in vae.modules())


# ---------------------------------------------------------------------------------------------------------------
# Wrong variants of the weights, each of which the tests above must catch.


def mutants(lg: Any, guide: Any, x: Tensor, z: Tensor) -> dict[str, Tensor]:
    q, p = guide.q(x), pairs.conditional(lg, z).to_event(1)
    log_prior, log_q, log_lik = pairs.prior(lg).log_prob(z), q.log_prob(z), p.log_prob(x)
    elsewhere = pairs.prior(lg).sample(z.shape[:2])
    return {
        "right": log_prior + log_lik - log_q,
        "prior forgotten": log_lik - log_q,
        "log q forgotten": log_prior + log_lik,
        "model runs with its own z": log_prior + pairs.conditional(lg, elsewhere).to_event(1).log_prob(x) - log_q,
        "plate scale inside": 10 * (log_prior + log_lik - log_q),
        "one weight for the batch": (log_prior + log_lik - log_q).sum(1, keepdim=True).expand_as(log_q),
        "scale taken for variance": log_prior
        + log_lik
        - dist.Normal(q.base_dist.loc, q.base_dist.scale.sqrt()).to_event(1).log_prob(z),
        "likelihood averaged over pixels": log_prior + log_lik / x.shape[1] - log_q,
        "half of the normaliser": log_prior + log_lik - log_q + 0.1,
    }


def test_mutants_fail_where_the_right_weights_pass(lg: Any, x: Tensor) -> None:
    num_samples = 20_000
    guide = lg.perturbed_guide(shift=0.3, spread=1.1)
    z = guide.q(x).sample((num_samples,))
    verdicts = {}
    for name, lw in mutants(lg, guide, x, z).items():
        ratio = (lw - lg.log_px(x)).exp()
        error = (ratio.mean(0) - 1) / (ratio.std(0) / num_samples**0.5)
        verdicts[name] = bool((error.abs() < 4.5).all())
    assert verdicts.pop("right")
    assert not any(verdicts.values()), verdicts


def test_package_weights_are_unbiased(lg: Any, x: Tensor) -> None:
    num_samples = 20_000
    ratio = (log_weights(lg.model, lg.perturbed_guide(), x, num_samples=num_samples) - lg.log_px(x)).exp()
    error = (ratio.mean(0) - 1) / (ratio.std(0) / num_samples**0.5)
    assert error.abs().max() < 4.5


def test_gradients_flow_to_both_programs() -> None:
    x = torch.bernoulli(torch.full((5, 3), 0.5))
    vae = VAE((3,), 2)
    log_weights(vae.model, vae.guide, x, num_samples=7).logsumexp(0).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in itertools.chain(vae.parameters()))
