"""Checkpoints of `fit`: a run that was stopped and went on is the run that was not stopped, to the last bit."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ppl_vae import files
from ppl_vae.batches import Batches
from ppl_vae.networks import MLP
from ppl_vae.training import History, checkpoints, fit
from ppl_vae.training.checkpoints import Run
from ppl_vae.training.steps import Trained
from ppl_vae.vae import VAE

NUM_DATA, DATA_DIM, LATENT_DIM, BATCH = 41, 7, 2, 17
NUM_BATCHES, EPOCHS = 3, 5
Pair = tuple[Any, Any, list[nn.Module]]
Build = Callable[[int], Pair]


@pytest.fixture
def x() -> Tensor:
    return torch.bernoulli(torch.full((NUM_DATA, DATA_DIM), 0.3))


class Interrupted(TensorDataset):
    """Presses Ctrl-C when a batch is asked for the n-th time."""

    def __init__(self, x: Tensor, at: int) -> None:
        super().__init__(x)
        self.left = at

    def __getitem__(self, index: Any) -> tuple[Tensor, ...]:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return super().__getitem__(index)


# Pairs, with other weights for another seed.


class Features(nn.Module):
    """Fixed random features with a bias, statistics of the batches, and dropout: nothing of it is in the optimiser."""

    def __init__(self) -> None:
        super().__init__()
        self.fixed = nn.Linear(LATENT_DIM, 11).requires_grad_(False)
        self.rest = nn.Sequential(nn.BatchNorm1d(11, affine=False), nn.Dropout(0.3), nn.Linear(11, DATA_DIM))

    def forward(self, z: Tensor) -> Tensor:
        return self.rest(self.fixed(z))


def modules(seed: int) -> Pair:
    torch.manual_seed(seed)
    vae = VAE(DATA_DIM, LATENT_DIM, encoder=MLP(DATA_DIM, 2 * LATENT_DIM, hidden_dims=(13,)), decoder=Features())
    return vae.model, vae.guide, [vae]


def functions(seed: int) -> Pair:
    """A pair that only Pyro's store knows, with a lazily built layer and a parameter under a constraint."""
    torch.manual_seed(seed)
    pyro.clear_param_store()  # as in a new process
    encoder, decoder = nn.LazyLinear(LATENT_DIM), Features()
    start = torch.rand(()) + 0.5

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder.rest)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT_DIM), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        loc = encoder(x)
        pyro.module("encoder", encoder)
        scale = pyro.param("scale", start, constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return model, guide, [encoder, decoder]


def end(pair: Pair) -> dict[str, Tensor]:
    """All there is at the end: weights, buffers and the store's own."""
    states = {f"{i}.{n}": t.clone() for i, m in enumerate(pair[2]) for n, t in m.state_dict().items()}
    store = pyro.get_param_store()
    return {**states, **({"scale": store["scale"].detach().clone()} if "scale" in store else {})}


def train(build: Build, weights: int, data: Any, x: Tensor, **options: Any) -> tuple[Any, History]:
    pair = build(weights)
    defaults = {"epochs": EPOCHS, "batch_size": BATCH, "validation": x[:11], "seed": 3, "progress": False}
    defaults["learning_rate"] = lambda share: 3e-2 * 0.1**share
    history = fit(pair[0], pair[1], data, **{**defaults, **options})
    return end(pair), history


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def whole(build: Build, x: Tensor, **options: Any) -> tuple[dict[str, Tensor], History]:
    return train(build, 1, TensorDataset(x), x, **options)


def stopped(build: Build, x: Tensor, folder: Path, *, after: int = 2, **options: Any) -> None:
    """Trains until the middle of an epoch, and leaves a checkpoint of those before it."""
    _, history = train(build, 1, Interrupted(x, at=after * NUM_BATCHES + 4), x, checkpoint=folder, **options)
    assert history.stopped == "interrupted"
    assert len(history.validation) == after


def resumed(build: Build, x: Tensor, folder: Path, **options: Any) -> tuple[dict[str, Tensor], History]:
    """Goes on with a pair that was built with other weights."""
    return train(build, 2, TensorDataset(x), x, checkpoint=folder, resume=True, **options)


class Particles(Trace_ELBO):
    """In its first call it counts the plates, which takes random numbers that a run that goes on does not take."""

    def __init__(self) -> None:
        super().__init__(num_particles=3, vectorize_particles=True)


CASES = {
    "modules": (modules, {}),
    "functions": (functions, {}),
    "clipped": (functions, {"clip_norm": 0.5}),
    "particles": (modules, {"objective": Particles}),
    "early stopping": (modules, {"patience": 3}),
}


def case(name: str) -> tuple[Build, Callable[[], dict[str, Any]]]:
    build, options = CASES[name]
    return build, lambda: {k: v() if k == "objective" else v for k, v in options.items()}


@pytest.mark.parametrize("name", CASES)
def test_stopped_and_resumed_is_uninterrupted(name: str, x: Tensor, tmp_path: Path) -> None:
    build, options = case(name)
    expected, history = whole(build, x, **options())
    stopped(build, x, tmp_path, **options())
    got, continued = resumed(build, x, tmp_path, **options())
    assert same(got, expected)
    assert (continued.loss, continued.validation) == (history.loss, history.validation)
    assert (continued.stopped, len(continued.loss)) == ("finished", EPOCHS)


@pytest.mark.parametrize("kind", ["parameter", "buffer", "frozen parameter", "moment", "random state", "warm up"])
def test_each_part_of_a_checkpoint_is_needed(
    kind: str, x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left as it happens to be in the new process, each changes the end: so the test above would see it missing."""
    build, options = case("particles")
    expected, _ = whole(build, x, **options())
    stopped(build, x, tmp_path, **options())
    if kind == "warm up":
        monkeypatch.setattr(Trained, "warm_up", lambda self, batches: None)
    else:
        restore = Run.restore

        def forgetful(run: Run, kept: dict[str, dict[str, Tensor]]) -> None:
            kept[kind] = {name: tensor.clone() for name, tensor in run.tensors()[kind].items()}
            restore(run, kept)

        monkeypatch.setattr(Run, "restore", forgetful)
    got, _ = resumed(build, x, tmp_path, **options())
    assert not same(got, expected)


@pytest.mark.parametrize("mutant", [None, "best", "best_loss", "waited"])
def test_early_stopping_goes_on_waiting(
    mutant: str | None, x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while waiting for something better than an epoch before; what is best is kept, and since when."""
    options = {"epochs": 100, "patience": 4, "learning_rate": 0.1}
    expected, history = whole(modules, x, **options)
    best = history.validation.index(min(history.validation)) + 1
    assert (history.stopped, len(history.loss)) == ("early stopping", best + 4)
    stopped(modules, x, tmp_path, after=best + 2, **options)
    if mutant:
        restore = checkpoints.Checkpoint.restore

        def forgetful(self: checkpoints.Checkpoint, run: Run, batches: Batches) -> None:
            fresh = getattr(run, mutant)
            restore(self, run, batches)
            setattr(run, mutant, fresh if mutant != "best" else run.trained.copy())

        monkeypatch.setattr(checkpoints.Checkpoint, "restore", forgetful)
    got, continued = resumed(modules, x, tmp_path, **options)
    if mutant:
        assert not (same(got, expected) and continued.loss == history.loss)
        return
    assert same(got, expected)
    assert (continued.loss, continued.stopped) == (history.loss, history.stopped)
    got, continued = resumed(modules, x, tmp_path, **options)  # once more, with nothing left to do
    assert same(got, expected)
    assert continued.loss == history.loss


def test_more_epochs_go_on_by_the_schedule_of_so_many(x: Tensor, tmp_path: Path) -> None:
    shares: list[float] = []

    def rate(share: float) -> float:
        shares.append(share)
        return 1e-2

    whole(modules, x, epochs=2, checkpoint=tmp_path, learning_rate=rate)
    assert shares[-1] == pytest.approx(5 / 6)
    shares.clear()
    got, history = resumed(modules, x, tmp_path, epochs=4, learning_rate=rate)
    assert shares[1] == 0.5  # the first is asked for when the optimiser is made
    assert len(history.loss) == 4
    expected, _ = whole(modules, x, epochs=4, learning_rate=rate)
    assert same(got, expected)  # which this schedule, a constant, leaves to the epochs
    with pytest.raises(ValueError, match=r"has 4 epochs behind it, more than epochs=3"):
        resumed(modules, x, tmp_path, epochs=3)


def test_a_finished_run_is_not_trained_again(x: Tensor, tmp_path: Path) -> None:
    expected, history = whole(modules, x, checkpoint=tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    written = path.stat().st_mtime_ns
    got, again = resumed(modules, x, tmp_path)
    assert same(got, expected)
    assert again.loss == history.loss
    assert again.seconds > json.loads(files.read_tensors(path)[1]["run"])["history"]["seconds"] > 0
    assert path.stat().st_mtime_ns == written


def test_resume_begins_where_there_is_nothing_yet(x: Tensor, tmp_path: Path) -> None:
    expected, _ = whole(modules, x)
    got, _ = whole(modules, x, checkpoint=tmp_path / "new", resume=True)
    assert same(got, expected)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["checkpoint.safetensors"]


def test_ctrl_c_in_the_first_epoch_leaves_nothing_to_resume(x: Tensor, tmp_path: Path) -> None:
    _, history = train(modules, 1, Interrupted(x, at=3), x, checkpoint=tmp_path / "new")
    assert history.stopped == "interrupted"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("seconds", "times"), [(0.0, EPOCHS), (1e6, 1)])
def test_it_is_written_now_and_then_and_at_the_end(
    seconds: float, times: int, x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    write = files.write_tensors
    monkeypatch.setattr(checkpoints, "SECONDS", seconds)
    monkeypatch.setattr(files, "write_tensors", lambda *args: (written.append(1), write(*args)))
    expected, _ = whole(modules, x, checkpoint=tmp_path)
    assert len(written) == times
    monkeypatch.undo()
    assert same(resumed(modules, x, tmp_path)[0], expected)


KILLED = """
import os, signal, sys
import torch
from test_checkpoints import checkpoints, functions, whole
torch.set_num_threads(1)
checkpoints.SECONDS, synced, fsync = 0.0, [], os.fsync
def kill_in_the_third(file):
    synced.append(file)
    if len(synced) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    fsync(file)
os.fsync = kill_in_the_third
whole(functions, torch.load(sys.argv[1]), checkpoint=sys.argv[2])
"""


def test_a_kill_in_the_middle_of_writing_leaves_the_earlier_one(x: Tensor, tmp_path: Path) -> None:
    torch.save(x, tmp_path / "x.pt")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "x.pt"), str(tmp_path / "run")]
    killed = subprocess.run(command, cwd=Path(__file__).parent, check=False)
    assert killed.returncode == -signal.SIGKILL
    got, history = resumed(functions, x, tmp_path / "run")
    expected, uninterrupted = whole(functions, x)
    assert same(got, expected)
    assert history.loss == uninterrupted.loss


# What is refused.


def test_an_earlier_run_is_not_overwritten(x: Tensor, tmp_path: Path) -> None:
    whole(modules, x, epochs=1, checkpoint=tmp_path)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"of an earlier run\. Go on from it with resume=True"):
        whole(modules, x, checkpoint=tmp_path)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match="nothing to resume from: name the folder"):
        whole(modules, x, resume=True)


def test_a_damaged_checkpoint_is_refused(x: Tensor, tmp_path: Path) -> None:
    whole(modules, x, epochs=1, checkpoint=tmp_path)
    path = tmp_path / "checkpoint.safetensors"
    content = path.read_bytes()
    for damaged in (content[:-100], content[:-1] + bytes([content[-1] ^ 1]), b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"checkpoint\.safetensors is corrupt"):
            resumed(modules, x, tmp_path)
    files.write_tensors(path, {"weight": torch.ones(2)})
    with pytest.raises(ValueError, match="was not written by fit"):
        resumed(modules, x, tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": 13}, "batch_size = 17; now it is 13"),
        ({"seed": 4}, "seed = 3; now it is 4"),
        ({"patience": 2}, "patience = None; now it is 2"),
        ({"validation": None}, "validation data = 11; now it is None"),
        ({"objective": Particles()}, r"objective = Trace_ELBO\(num_particles=1\); now it is Particles"),
    ],
)
def test_other_settings_are_refused(options: dict[str, Any], said: str, x: Tensor, tmp_path: Path) -> None:
    whole(modules, x, epochs=1, checkpoint=tmp_path)
    with pytest.raises(ValueError, match=f"{said}.*Go on with the same"):
        resumed(modules, x, tmp_path, **options)
    with pytest.raises(ValueError, match="data = 41; now it is 40"):
        resumed(modules, x[:-1], tmp_path)


def test_another_pair_is_refused_and_left_alone(x: Tensor, tmp_path: Path) -> None:
    whole(modules, x, epochs=1, checkpoint=tmp_path)

    def wider(seed: int) -> Pair:
        vae = VAE(DATA_DIM, LATENT_DIM, encoder=MLP(DATA_DIM, 2 * LATENT_DIM, hidden_dims=(17,)), decoder=Features())
        others.append(end((None, None, [vae])))
        vaes.append(vae)
        return vae.model, vae.guide, [vae]

    def in_doubles(seed: int) -> Pair:
        model, guide, (vae,) = modules(seed)
        vae.double()
        return model, guide, [vae]

    others: list[dict[str, Tensor]] = []
    vaes: list[nn.Module] = []
    with pytest.raises(
        ValueError, match=r"parameter 'guide\.encoder.*' is float32 \(13,\) there and float32 \(17,\) here"
    ):
        resumed(wider, x, tmp_path)
    assert same(end((None, None, vaes)), others[0])
    with pytest.raises(ValueError, match=r"is float32 .* there and float64 .* here"):
        resumed(in_doubles, x.double(), tmp_path)
    with pytest.raises(ValueError, match=r"is missing there|missing here"):
        resumed(functions, x, tmp_path)


def test_a_first_step_that_fails_leaves_what_was_resumed(x: Tensor, tmp_path: Path) -> None:
    expected, _ = whole(functions, x, epochs=1, checkpoint=tmp_path)
    left: list[Pair] = []

    def poisoned(seed: int) -> Pair:
        model, guide, networks = functions(seed)

        def poisoned_model(x: Tensor) -> None:
            model(x)
            with pyro.plate("once more", len(x)):
                pyro.factor("poison", torch.full((len(x),), -torch.inf))

        left.append((model, guide, networks))
        return poisoned_model, guide, networks

    with pytest.raises(RuntimeError, match="no longer finite in epoch 2, batch 1: site 'poison'"):
        resumed(poisoned, x, tmp_path, epochs=2)
    assert same(end(left[0]), expected)
