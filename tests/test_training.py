"""`fit` on any pair: it trains what it says, says what it does not train, and stops in words."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from math import log, pi
from typing import Any

import pairs
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoNormal, AutoNormalMessenger
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from ppl_vae import coin
from ppl_vae.autoencoder import Autoencoder
from ppl_vae.data import DynamicBinarization
from ppl_vae.likelihoods import Gaussian
from ppl_vae.networks import MLP, ConvDecoder, ConvEncoder
from ppl_vae.training import History, fit
from ppl_vae.training.steps import KEPT_EVERY
from ppl_vae.vae import VAE

NUM_DATA, DATA_DIM, LATENT_DIM = 101, 7, 2


@pytest.fixture
def x() -> Tensor:
    """Binary data of two kinds, so that there is something to learn."""
    kind = torch.rand(NUM_DATA, 1) < 0.5
    return torch.bernoulli(torch.where(kind, 0.9, 0.1).expand(-1, DATA_DIM))


def small_vae() -> VAE:
    return VAE(
        (DATA_DIM,),
        LATENT_DIM,
        encoder=MLP(DATA_DIM, 2 * LATENT_DIM, hidden_dims=(13,)),
        decoder=MLP(LATENT_DIM, DATA_DIM, hidden_dims=(13,)),
    )


def moved(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


# ---------------------------------------------------------------------------------------------------------------
# Build, train, build, train: the second one learns.


def by_svi(vae: VAE, x: Tensor) -> None:
    svi = SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO())
    for _ in range(150):
        svi.step(x)


def by_elbo_module(vae: VAE, x: Tensor) -> None:
    loss = Trace_ELBO()(vae.model, vae.guide)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        (loss(x) / len(x)).backward()
        optimizer.step()


def by_fit(vae: VAE, x: Tensor) -> None:
    fit(vae.model, vae.guide, x, epochs=150, batch_size=len(x), learning_rate=1e-2, progress=False)


@pytest.mark.parametrize("train", [by_svi, by_elbo_module, by_fit], ids=lambda f: f.__name__)
def test_build_train_build_train(train: Callable[[VAE, Tensor], None], x: Tensor) -> None:
    losses = []
    for _ in range(2):
        vae = small_vae()
        before, start = copied(vae), Trace_ELBO().loss(vae.model, vae.guide, x) / len(x)
        train(vae, x)
        assert moved(vae, before) == set(before)
        losses.append((start, Trace_ELBO(num_particles=10).loss(vae.model, vae.guide, x) / len(x)))
    assert all(end < start - 0.5 for start, end in losses)


def test_the_three_loops_take_the_same_first_step(x: Tensor) -> None:
    """On the same weights and noise SVI, ELBOModule and fit have the same gradient, so Adam moves alike."""
    vae = small_vae()
    start, ends = copied(vae), []
    for loop in ("svi", "module", "fit"):
        vae.load_state_dict(start)
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        if loop == "svi":
            SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 1e-2}), Trace_ELBO(max_plate_nesting=1)).step(x)
        elif loop == "module":
            loss = Trace_ELBO(max_plate_nesting=1)(vae.model, vae.guide)
            optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
            loss(x).backward()
            optimizer.step()
        else:
            history = fit(vae.model, vae.guide, x, epochs=1, batch_size=len(x), learning_rate=1e-2, progress=False)
            assert len(history.loss) == 1
        ends.append(copied(vae))
    for name in start:
        torch.testing.assert_close(ends[0][name], ends[1][name])
        # fit draws its batch first, so its noise is another; Adam's first step has the size of the learning rate
        assert ((ends[2][name] - start[name]).abs() <= 1.001e-2).all()


# ---------------------------------------------------------------------------------------------------------------
# Every form of a pair.


def functions_with_pyro_module() -> tuple[Any, Any, list[nn.Module]]:
    encoder, decoder = MLP(DATA_DIM, 2 * LATENT_DIM, hidden_dims=(13,)), MLP(LATENT_DIM, DATA_DIM, hidden_dims=(13,))

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT_DIM), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, raw = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    return model, guide, [encoder, decoder]


def bound_methods() -> tuple[Any, Any, list[nn.Module]]:
    """As Pyro's own VAE example."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = MLP(DATA_DIM, 2 * LATENT_DIM, hidden_dims=(13,))
            self.decoder = MLP(LATENT_DIM, DATA_DIM, hidden_dims=(13,))

        def model(self, x: Tensor) -> None:
            pyro.module("decoder", self.decoder)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(LATENT_DIM), 1.0).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

        def guide(self, x: Tensor) -> None:
            pyro.module("encoder", self.encoder)
            with pyro.plate("data", len(x)):
                loc, raw = self.encoder(x).chunk(2, -1)
                pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    both = Both()
    return both.model, both.guide, [both]


def plain_modules() -> tuple[Any, Any, list[nn.Module]]:
    """Modules that register nothing: with `SVI` alone they would not train."""
    vae = small_vae()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = vae.decoder

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(LATENT_DIM), 1.0).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    class Guide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = vae.encoder

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                loc, raw = self.encoder(x).chunk(2, -1)
                pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    return Model(), Guide(), [vae.encoder, vae.decoder]


def subsampled_plate() -> tuple[Any, Any, list[nn.Module]]:
    vae = small_vae()

    def model(x: Tensor) -> None:
        pyro.module("decoder", vae.decoder)
        with pyro.plate("data", NUM_DATA, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT_DIM), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=vae.decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", vae.encoder)
        with pyro.plate("data", NUM_DATA, subsample_size=len(x)):
            pyro.sample("z", vae.encode(x))

    return model, guide, [vae.encoder, vae.decoder]


FORMS = [functions_with_pyro_module, bound_methods, plain_modules, subsampled_plate]


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
def test_every_form_trains_and_reports_nats_per_datum(form: Any, x: Tensor) -> None:
    model, guide, modules = form()
    before = [copied(m) for m in modules]
    history = fit(model, guide, x, epochs=30, batch_size=17, learning_rate=2e-2, validation=x, progress=False)
    for module, old in zip(modules, before, strict=True):
        assert moved(module, old) == set(old)
    assert history.loss[-1] < history.loss[0] - 0.5
    # 7 binary pixels: the entropy of fair coins is where an untrained model starts, whatever the plate's scale
    assert history.loss[0] == pytest.approx(DATA_DIM * log(2), rel=0.25)
    assert history.validation[-1] == pytest.approx(history.loss[-1], rel=0.15)
    assert history.stopped == "finished"
    assert len(history.loss) == len(history.validation) == 30


OBJECTIVES = [
    Trace_ELBO(num_particles=3),
    TraceMeanField_ELBO(),
    TraceGraph_ELBO(),
    JitTrace_ELBO(ignore_jit_warnings=True),
    RenyiELBO(alpha=0.5, num_particles=3),
    Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
]


@pytest.mark.filterwarnings("ignore:.torch.jit.*:FutureWarning")
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: f"{type(o).__name__}-{o.vectorize_particles}")
def test_any_elbo_object_trains(objective: Any, x: Tensor) -> None:
    vae = small_vae()
    before = copied(vae)
    x = x[:100]  # two batches of one size, for the objectives that record one
    history = fit(
        vae.model, vae.guide, x, objective=objective, epochs=40, batch_size=50, learning_rate=2e-2, progress=False
    )
    assert moved(vae, before) == set(before)
    assert history.loss[-1] < history.loss[0] - 0.3
    assert history.loss[0] == pytest.approx(DATA_DIM * log(2), rel=0.25)


@pytest.mark.filterwarnings("ignore:.torch.jit.*:FutureWarning")
def test_a_recorded_objective_refuses_batches_of_another_size(x: Tensor) -> None:
    """`JitTrace_ELBO` keeps the first batch's plate, and would charge the last, short batch for all of it."""
    vae = small_vae()
    with pytest.raises(ValueError, match=r"records the program for the first batch, of 50 data.* for a batch of 1"):
        fit(
            vae.model,
            vae.guide,
            x,
            objective=JitTrace_ELBO(ignore_jit_warnings=True),
            batch_size=50,
            progress=False,
        )


def test_global_parameters_and_constraints() -> None:
    """`pyro.param` under a constraint, no latent at all: the coin."""
    tosses = torch.cat([torch.ones(40), torch.zeros(60)])
    history = fit(coin.model, coin.guide, tosses, epochs=200, batch_size=100, learning_rate=0.05, progress=False)
    assert pyro.param("probability").item() == pytest.approx(0.4, abs=1e-3)
    assert history.loss[-1] == pytest.approx(-coin.log_likelihood(0.4, tosses).item() / 100, abs=1e-4)


def test_an_autoguide_over_all_data_trains() -> None:
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg)
    model = pairs.as_functions(lg, lg.posterior)[0]
    auto = AutoNormal(model)
    history = fit(
        model, auto, x, epochs=1000, batch_size=len(x), learning_rate=lambda t: 0.05 * 0.01**t, progress=False
    )
    best = lg.perturbed_guide(shift=0.0, spread=1.0).elbo(x).mean().item()
    assert sum(history.loss[-200:]) / 200 == pytest.approx(-best, abs=0.05)


def test_a_linear_vae_reaches_the_elbo_in_closed_form() -> None:
    """With a linear decoder and encoder the best ELBO is log p(x) less ½(Σ log Λ_ii − log|Λ|), exactly."""
    lg = pairs.linear_gaussian(latent_dim=2, data_dim=5, noise=0.5)
    x = pairs.simulated(lg, num_data=400).float()
    vae = VAE((5,), 2, likelihood=Gaussian(0.5), encoder=MLP(5, 4, hidden_dims=()), decoder=MLP(2, 5, hidden_dims=()))
    with torch.no_grad():
        vae.decoder.layers[0].weight.copy_(lg.w)
        vae.decoder.layers[0].bias.copy_(lg.mean)
    vae.decoder.requires_grad_(False).eval()
    history = fit(vae.model, vae.guide, x, epochs=300, learning_rate=lambda t: 0.03 * 0.01**t, progress=False)
    best = lg.perturbed_guide(shift=0.0, spread=1.0).elbo(x.double()).mean().item()
    tail = torch.tensor(history.loss[-30:])
    assert -tail.mean() == pytest.approx(best, abs=0.02)


# ---------------------------------------------------------------------------------------------------------------
# The autoencoder.


@pytest.mark.parametrize("networks", ["classical", "convolutional"])
def test_the_loss_of_an_autoencoder_is_the_l2_loss(networks: str) -> None:
    x = torch.rand(53, 8, 8)
    if networks == "classical":
        encoder: nn.Module = MLP((8, 8), 3, activation=nn.Sigmoid())
        decoder: nn.Module = nn.Sequential(MLP(3, (8, 8), activation=nn.Sigmoid()), nn.Sigmoid())
    else:
        encoder, decoder = ConvEncoder((8, 8), 3), ConvDecoder(3, (8, 8))
    autoencoder = Autoencoder((8, 8), 3, encoder=encoder, decoder=decoder)
    before = copied(autoencoder)
    history = fit(autoencoder.model, autoencoder.guide, x, epochs=3, batch_size=20, validation=x, progress=False)
    assert moved(autoencoder, before) == set(before)
    squares = 0.5 * (x - autoencoder.reconstruct(x)).square().flatten(1).sum(1)
    constant = 0.5 * 64 * log(2 * pi)
    assert history.validation[-1] == pytest.approx((squares.mean() + constant).item(), abs=1e-4)
    assert history.loss[-1] < history.loss[0]


# ---------------------------------------------------------------------------------------------------------------
# Data.


class ItemByItem(Dataset[Tensor]):
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Tensor:
        assert isinstance(index, int)
        return self.x[index]


SOURCES: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "tensor dataset": TensorDataset,
    "dataset": ItemByItem,
    "loader": lambda x: DataLoader(TensorDataset(x), batch_size=17, shuffle=True),
    "loader of a dataset": lambda x: DataLoader(ItemByItem(x), batch_size=17, shuffle=True),
    "dynamic": DynamicBinarization,
}


@pytest.mark.parametrize("source", SOURCES)
def test_data_of_every_kind(source: str, x: Tensor) -> None:
    vae = small_vae()
    data = SOURCES[source](x)
    history = fit(
        vae.model, vae.guide, data, epochs=20, batch_size=17, learning_rate=2e-2, validation=data, progress=False
    )
    assert history.loss[-1] < history.loss[0] - 0.3
    assert len(history.validation) == 20


def test_every_datum_is_seen_once_an_epoch(x: Tensor) -> None:
    vae, seen = small_vae(), []
    model = vae.model

    def spy(x: Tensor, index: Tensor) -> None:
        seen.append(index)
        model(x)

    def guide(x: Tensor, index: Tensor) -> None:
        vae.guide(x)

    fit(
        spy,
        guide,
        x,
        torch.arange(NUM_DATA),
        epochs=2,
        batch_size=20,
        progress=False,
        objective=Trace_ELBO(max_plate_nesting=1),
    )
    epochs = torch.cat(seen[1:])[: 2 * NUM_DATA].split(NUM_DATA)
    assert all(torch.equal(epoch.sort().values, torch.arange(NUM_DATA)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert [len(index) for index in seen[1:7]] == [20, 20, 20, 20, 20, 1]


def test_a_seed_gives_the_same_training_and_leaves_the_global_state(x: Tensor) -> None:
    vae = small_vae()
    start, ends = copied(vae), []
    for seed in (1, 1, 2):
        vae.load_state_dict(start)
        state = torch.get_rng_state()
        fit(vae.model, vae.guide, x, epochs=2, seed=seed, progress=False)
        assert torch.equal(torch.get_rng_state(), state)
        ends.append(copied(vae))
    assert all(torch.equal(ends[0][n], ends[1][n]) for n in start)
    assert any(not torch.equal(ends[0][n], ends[2][n]) for n in start)


# ---------------------------------------------------------------------------------------------------------------
# Options.


def test_eps_is_adams(x: Tensor) -> None:
    """Far above every gradient it makes of Adam a gradient descent with steps of learning_rate / eps."""
    vae = small_vae()
    before, parameter = copied(vae), vae.decoder.layers[0].bias
    fit(vae.model, vae.guide, x, epochs=1, batch_size=len(x), learning_rate=1.0, eps=1e4, progress=False)
    moved_by = parameter.detach() - before["model.decoder.layers.0.bias"]
    assert 0 < moved_by.abs().max() < 1e-3


def test_learning_rate_as_a_function(x: Tensor) -> None:
    vae, shares = small_vae(), []

    def rate(share: float) -> float:
        shares.append(share)
        return 1e-3

    fit(vae.model, vae.guide, x, epochs=3, batch_size=60, learning_rate=rate, progress=False)
    assert shares[1:] == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6])


def test_a_zero_learning_rate_moves_nothing(x: Tensor) -> None:
    vae = small_vae()
    before = copied(vae)
    fit(vae.model, vae.guide, x, epochs=1, learning_rate=0.0, progress=False)
    assert moved(vae, before) == set()


def test_gradient_clipping_bounds_the_gradient(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    step = torch.optim.Adam.step

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        norms.append(torch.nn.utils.get_total_norm([p.grad for g in self.param_groups for p in g["params"]]).item())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    vae = small_vae()
    fit(vae.model, vae.guide, x, epochs=1, clip_norm=0.01, progress=False)
    assert max(norms) <= 0.01 * (1 + 1e-5)
    norms.clear()
    fit(vae.model, vae.guide, x, epochs=1, progress=False)
    assert max(norms) > 0.01


def test_early_stopping_goes_back_to_the_best_weights(x: Tensor) -> None:
    vae = small_vae()
    few, held_out = x[:20], x[20:]
    history = fit(
        vae.model,
        vae.guide,
        few,
        epochs=2000,
        batch_size=20,
        learning_rate=3e-2,
        validation=held_out,
        patience=15,
        progress=False,
    )
    assert history.stopped == "early stopping"
    assert len(history.loss) < 2000
    best = min(range(len(history.validation)), key=history.validation.__getitem__)
    assert best == len(history.validation) - 16
    again = fit(
        vae.model, vae.guide, few, epochs=1, batch_size=20, learning_rate=0.0, validation=held_out, progress=False
    )
    assert again.validation[0] == pytest.approx(history.validation[best], abs=1e-4)


def test_patience_without_validation_is_refused(x: Tensor) -> None:
    vae = small_vae()
    with pytest.raises(ValueError, match=r"patience.* needs validation data"):
        fit(vae.model, vae.guide, x, patience=3)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises, also where pytest was started with SIGINT ignored, as a job in the background is."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_returns_what_was_learned(x: Tensor) -> None:
    vae = small_vae()
    before = copied(vae)
    timer = threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    history = fit(vae.model, vae.guide, x, epochs=10**6, learning_rate=1e-2, progress=False)
    timer.join()
    assert history.stopped == "interrupted"
    assert 0 < len(history.loss) < 10**6
    assert moved(vae, before) == set(before)
    assert "interrupted" in repr(history)


def test_history_speaks() -> None:
    assert repr(History([3.0, 2.0], [2.5, 2.25], "finished", 61.2, bound=[-3.0, -2.0])) == (
        "History(finished after 2 epochs, 61 s: loss 2.000, validation 2.250 nats per datum)"
    )
    assert "before the first step" in repr(History(stopped="interrupted"))


def test_a_bar_is_shown(x: Tensor, capsys: pytest.CaptureFixture[str]) -> None:
    if os.environ.get("TQDM_DISABLE"):
        pytest.skip("TQDM_DISABLE switches every bar off in this environment")
    vae = small_vae()
    fit(vae.model, vae.guide, x, epochs=2, validation=x)
    shown = capsys.readouterr().err
    assert "loss=" in shown
    assert "validation=" in shown


# ---------------------------------------------------------------------------------------------------------------
# What stops it, in words.


def test_a_loss_that_is_not_finite_stops_with_good_weights_of_shortly_before(x: Tensor) -> None:
    vae, calls = small_vae(), itertools.count()
    good: list[dict[str, Tensor]] = []

    def model(x: Tensor) -> None:
        pyro.module("decoder", vae.decoder)
        poison = torch.nan if next(calls) >= 9 else 0.0
        if poison == 0.0:
            good.append(copied(vae))  # weights whose loss was finite
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", vae.prior())
            pyro.sample("x", dist.Normal(vae.decoder(z) + poison, 1.0).to_event(1), obs=x)

    with pytest.raises(RuntimeError, match=r"no longer finite in epoch 2, batch \d: site 'x' of the model"):
        fit(model, vae.guide, x, epochs=5, batch_size=20, progress=False)
    assert any(moved(vae, weights) == set() for weights in good[-KEPT_EVERY:])
    assert all(torch.isfinite(value).all() for value in vae.state_dict().values())


def test_an_exploding_scale_is_named(x: Tensor) -> None:
    vae = small_vae()

    class Exploding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_scale = nn.Parameter(torch.tensor(100.0))

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", vae.prior())
                pyro.sample("x", dist.Normal(vae.decoder(z), self.log_scale.exp()).to_event(1), obs=x)

    model = Exploding()
    model.decoder = vae.decoder
    with pytest.raises(RuntimeError, match=r"no longer finite in epoch 1, batch 1.*'x' of the model.*clip_norm"):
        fit(model, vae.guide, x, progress=False)
    assert model.log_scale.item() == 100.0


def test_an_infinite_gradient_is_named(x: Tensor) -> None:
    class Sharp(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor) -> Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
            return gradient * float("nan")

    vae = small_vae()
    before = copied(vae)

    def model(x: Tensor) -> None:
        pyro.module("decoder", vae.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", vae.prior())
            pyro.sample("x", dist.Bernoulli(logits=Sharp.apply(vae.decoder(z))).to_event(1), obs=x)

    with pytest.raises(RuntimeError, match=r"The gradient of .* is no longer finite in epoch 1, batch 1"):
        fit(model, vae.guide, x, progress=False)
    assert moved(vae, before) == set()


def test_grey_pixels_are_refused(x: Tensor) -> None:
    vae = small_vae()
    x[37, 2] = 0.5
    pyro.enable_validation(False)  # as the official VAE notebook does
    with pytest.raises(ValueError, match=r"In epoch 1, batch \d: A Bernoulli likelihood scores data in \{0, 1\}"):
        fit(vae.model, vae.guide, x, batch_size=10, progress=False)
    pyro.enable_validation(True)


def test_bad_data_are_refused(x: Tensor) -> None:
    vae = small_vae()
    with pytest.raises(ValueError, match="NaN or infinite"):
        fit(vae.model, vae.guide, x * float("nan"))
    with pytest.raises(ValueError, match="There are no data"):
        fit(vae.model, vae.guide, x[:0])
    with pytest.raises(ValueError, match="There are no data"):
        fit(vae.model, vae.guide, TensorDataset(x[:0]))
    with pytest.raises(TypeError, match="must be a tensor with one row per datum; got list"):
        fit(vae.model, vae.guide, [1.0, 2.0])
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1"):
        fit(vae.model, vae.guide, x, batch_size=0)
    with pytest.raises(ValueError, match="epochs must be an integer of at least 1; got 0"):
        fit(vae.model, vae.guide, x, epochs=0)
    with pytest.raises(TypeError, match=r"The data give 2 arguments, which model\(.*only the images"):
        fit(vae.model, vae.guide, TensorDataset(x, torch.zeros(len(x))))
    with pytest.raises(ValueError, match=r"was built for a batch of shape \(batch, 7\); got"):
        fit(vae.model, vae.guide, x.unsqueeze(1))
    with pytest.raises(TypeError, match=r"floating-point data; got torch.int64"):
        fit(vae.model, vae.guide, x.long())


def test_nothing_to_train_is_said(x: Tensor) -> None:
    vae = small_vae().requires_grad_(False).eval()
    with pytest.raises(RuntimeError, match="There is nothing to train"):
        fit(vae.model, vae.guide, x, progress=False)


def test_an_unregistered_network_is_named(x: Tensor) -> None:
    vae = small_vae()
    _, guide, _ = functions_with_pyro_module()
    loose = nn.Linear(LATENT_DIM, DATA_DIM)

    def forgetful(x: Tensor) -> None:
        pyro.module("decoder", vae.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", vae.prior())
            pyro.sample("x", dist.Bernoulli(logits=vae.decoder(z) + loose(z)).to_event(1), obs=x)

    with pytest.raises(RuntimeError, match=r"Linear\(.*nothing registers its parameter 'weight'.*pyro\.module"):
        fit(forgetful, guide, x, progress=False)
    loose.requires_grad_(False)
    assert fit(forgetful, guide, x, epochs=1, progress=False).loss


def test_a_stale_store_is_named(x: Tensor) -> None:
    """A notebook cell run twice: plain functions that register a new network under an old name."""
    for attempt in range(2):
        model, guide, _ = functions_with_pyro_module()
        if attempt == 0:
            fit(model, guide, x, epochs=1, progress=False)
        else:
            with pytest.raises(RuntimeError, match=r"still holds '(en|de)coder\..*pyro\.clear_param_store\(\)"):
                fit(model, guide, x, epochs=1, progress=False)
            pyro.clear_param_store()
            assert fit(model, guide, x, epochs=1, progress=False).loss


def test_a_second_pyromodule_pair_trains(x: Tensor) -> None:
    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = PyroModule[nn.Linear](LATENT_DIM, DATA_DIM)

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(LATENT_DIM), 1.0).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    class Guide(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = PyroModule[nn.Linear](DATA_DIM, 2 * LATENT_DIM)

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                loc, raw = self.encoder(x).chunk(2, -1)
                pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))

    for _ in range(2):
        model, guide = Model(), Guide()
        before = copied(model), copied(guide)
        fit(model, guide, x, epochs=3, learning_rate=1e-2, progress=False)
        assert moved(model, before[0]) == set(before[0])
        assert moved(guide, before[1]) == set(before[1])


def test_a_parameter_without_gradient_is_named(x: Tensor) -> None:
    vae = small_vae()
    vae.model.unused = nn.Parameter(torch.zeros(3))
    with pytest.warns(UserWarning, match=r"received no gradient in the first step.*model\.unused"):
        fit(vae.model, vae.guide, x, epochs=1, progress=False)


def test_a_loss_without_any_gradient_is_an_error(x: Tensor) -> None:
    vae = small_vae()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = vae.decoder

        def forward(self, x: Tensor) -> None:
            with torch.no_grad():
                vae.model(x)

    def guide(x: Tensor) -> None:
        with torch.no_grad():
            vae.guide(x)

    with pytest.raises(RuntimeError, match="No parameter received a gradient"):
        fit(Model(), guide, x, progress=False)


def test_renyi_and_plain_modules_do_not_silently_stand_still(x: Tensor) -> None:
    model, guide, _ = plain_modules()
    with pytest.raises(RuntimeError, match="No parameter received a gradient from RenyiELBO"):
        fit(model, guide, x, objective=RenyiELBO(alpha=0.5), progress=False)


def test_a_bare_tensor_that_asks_for_a_gradient_is_named(x: Tensor) -> None:
    vae, offset = small_vae(), torch.zeros(3, 1, requires_grad=True)

    def model(x: Tensor) -> None:
        pyro.module("decoder", vae.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", vae.prior())
            pyro.sample("x", dist.Bernoulli(logits=vae.decoder(z) + offset.sum()).to_event(1), obs=x)

    with pytest.raises(RuntimeError, match=r"A tensor of shape \(3, 1\) takes part in the loss.*pyro\.param"):
        fit(model, vae.guide, x, progress=False)
    offset.requires_grad_(False)
    assert fit(model, vae.guide, x, epochs=1, progress=False).loss


def test_a_module_and_the_store_may_use_one_name(x: Tensor) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, self.scale.exp()), obs=x)

    def guide(x: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(0.1), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, scale))

    model = Model()
    fit(model, guide, x[:, 0], epochs=20, learning_rate=0.05, progress=False)
    assert pyro.param("scale").item() > 0.2
    assert model.scale.item() != 0


def test_a_parameter_that_comes_late_is_named(x: Tensor) -> None:
    vae, calls = small_vae(), itertools.count()

    def model(x: Tensor) -> None:
        pyro.module("decoder", vae.decoder)
        offset = pyro.param("late", torch.tensor(3.0)) if next(calls) > 2 else 0.0
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", vae.prior())
            pyro.sample("x", dist.Bernoulli(logits=vae.decoder(z) + offset).to_event(1), obs=x)

    with pytest.raises(RuntimeError, match="'late' was first asked for after the first batch"):
        fit(model, vae.guide, x, batch_size=20, progress=False)


def test_an_autoguide_in_several_batches_is_refused() -> None:
    lg = pairs.linear_gaussian()
    x = pairs.simulated(lg, num_data=53)
    model = pairs.as_functions(lg, lg.posterior)[0]
    for autoguide in (AutoNormal(model), AutoNormalMessenger(model)):
        with pytest.raises(ValueError, match=r"has a parameter of 'z' for each datum.*batch_size=len\(x\)"):
            fit(model, autoguide, x, batch_size=10, progress=False)


def test_bad_options_are_refused(x: Tensor) -> None:
    vae = small_vae()
    for options, match in (
        ({"patience": 0, "validation": x}, "patience must be an integer of at least 1; got 0"),
        ({"clip_norm": -1.0}, "clip_norm .* must be positive; got -1.0"),
        ({"clip_norm": 0.0}, "must be positive"),
        ({"epochs": 1.5}, "epochs must be an integer"),
    ):
        with pytest.raises(ValueError, match=match):
            fit(vae.model, vae.guide, x, **options)
    with pytest.raises(TypeError, match=r"objective must be an instance of a pyro\.infer\.ELBO"):
        fit(vae.model, vae.guide, x, objective=Trace_ELBO)
    with pytest.raises(TypeError, match="has a loss for each program"):
        fit(vae.model, vae.guide, x, objective=ReweightedWakeSleep(), progress=False)
    with pytest.raises(ValueError, match="argument 2 of the programs has 100 rows"):
        fit(vae.model, vae.guide, x, torch.zeros(NUM_DATA - 1))


def test_a_step_too_far_is_taken_back(x: Tensor) -> None:
    """An enormous learning rate: the step that ruined the weights, and the statistics of the batch, are undone."""
    vae = VAE(
        (DATA_DIM,),
        2,
        likelihood=Gaussian(),
        decoder=nn.Sequential(nn.Linear(2, 5), nn.BatchNorm1d(5), nn.Linear(5, DATA_DIM)),
    )
    before = copied(vae)
    with pytest.raises(RuntimeError, match="no longer finite in epoch 1, batch 2"):
        fit(vae.model, vae.guide, x, batch_size=50, learning_rate=1e30, progress=False)
    parameters = {name for name, _ in vae.named_parameters()}
    assert moved(vae, before).isdisjoint(parameters)
    assert all(torch.isfinite(value).all() for value in vae.state_dict().values())


def test_nan_in_a_dataset_is_the_datas_fault(x: Tensor) -> None:
    vae = VAE((DATA_DIM,), 2, likelihood=Gaussian())
    x[37, 2] = torch.nan
    with pytest.raises(ValueError, match=r"In epoch 1, batch \d+ the data hold NaN"):
        fit(vae.model, vae.guide, TensorDataset(x), batch_size=10, progress=False)
    with pytest.raises(ValueError, match="In the validation data"):
        fit(vae.model, vae.guide, x[:20], validation=TensorDataset(x), progress=False)


def test_data_without_a_length_are_refused(x: Tensor) -> None:
    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Any:
            return iter(x)

    vae = small_vae()
    for data in (Stream(), DataLoader(Stream(), batch_size=5)):
        with pytest.raises(TypeError, match="An IterableDataset has no length"):
            fit(vae.model, vae.guide, data)


def test_nothing_of_fit_is_left_behind(x: Tensor) -> None:
    vae = small_vae()
    fit(vae.model, vae.guide, x, epochs=1, progress=False)
    assert all(p.grad is None for p in vae.parameters())


def test_a_second_module_that_registers_its_network_is_trained_without_a_word() -> None:
    """The store still holds the first one's parameters under that name; the module runs with its own."""

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    class Registering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(1, 2)

        def forward(self, x: Tensor) -> None:
            pyro.module("encoder", self.encoder)
            loc, log_scale = self.encoder(x[:, None]).unbind(-1)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(loc, log_scale.exp()))

    x = torch.randn(101)
    for _ in range(2):
        guide = Registering()
        before = guide.encoder.weight.detach().clone()
        history = fit(model, guide, x, epochs=30, learning_rate=1e-2, progress=False, seed=0)
        assert (guide.encoder.weight != before).all()
        assert history.loss[-1] < history.loss[0]
