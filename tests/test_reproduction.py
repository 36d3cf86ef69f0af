"""`ppl-vae reproduce`: the published protocol, any beginning of it, and its compressed form, on a tiny MNIST."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pyro.infer import Trace_ELBO
from test_cli import Result, Runner, ppl_vae  # noqa: F401 - a fixture
from torch import nn

import ppl_vae as pv
from ppl_vae import files
from ppl_vae.cli import reproduction
from ppl_vae.cli.reproduction import Experiment

Reproduce = Callable[..., Result]

NUM_TRAIN, NUM_TEST = 61, 23


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where an MNIST of 28 × 28 noise lies."""
    root = tmp_path_factory.mktemp("root")
    raw = root / "MNIST/raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, size in (("train", NUM_TRAIN), ("t10k", NUM_TEST)):
        write_idx(raw / f"{part}-images-idx3-ubyte", rng.integers(0, 256, (size, 28, 28)))
        write_idx(raw / f"{part}-labels-idx1-ubyte", rng.integers(0, 10, size))
    return root


@pytest.fixture
def reproduce(ppl_vae: Runner, root: Path) -> Reproduce:  # noqa: F811
    def run(*args: object) -> Result:
        return ppl_vae("reproduce", "iwae", "--root", root, "--num-data", 11, "--num-samples", 30, *args)

    return run


def record(folder: Path) -> Any:
    return json.loads((folder / "run.json").read_text())


def same_tensors(one: Path, other: Path) -> bool:
    a, b = files.read_tensors(one)[0], files.read_tensors(other)[0]
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# The protocol


def test_the_schedule_is_the_published_one() -> None:
    """Stage i, of 3^i passes, has the learning rate 1e-3 · 10^(-i/7); whatever part of it is asked for."""
    whole = [1e-3 * 10 ** (-i / 7) for i in range(8) for _ in range(3**i)]
    assert len(whole) == 3280
    num_batches = 7
    for passes in (1, 3, 13, 40, 3280):
        schedule = reproduction.published(passes)
        assert (schedule.passes, schedule.batch_size) == (passes, 20)
        for done in range(passes):
            for batch in (0, 1, num_batches - 1):
                share = (done + batch / num_batches) / passes  # as `fit` reckons it
                assert schedule.rate(share) == pytest.approx(whole[done], rel=1e-12)
    assert reproduction.published(None).passes == 3280


def test_the_compressed_schedule_visits_every_rate_for_as_long() -> None:
    schedule = reproduction.compressed(40)
    assert (schedule.passes, schedule.batch_size) == (40, 100)
    rates = [schedule.rate(done / 40) for done in range(40)]
    expected = [5**0.5 * 1e-3 * 10 ** (-i / 7) for i in range(8) for _ in range(5)]
    assert rates == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("layers", [1, 2])
def test_the_pair_starts_as_published(layers: int) -> None:
    images = torch.rand(50, 28, 28).round(decimals=1)
    images[:, 0, 0], images[:, 0, 1] = 0.0, 1.0
    program = reproduction.built(Experiment(layers, 5, "iwae", 0, None), images)
    linear = [layer for layer in program.modules() if isinstance(layer, nn.Linear)]
    sizes = sorted((layer.in_features, layer.out_features) for layer in linear)
    one = [(50, 200), (200, 100), (200, 200), (200, 200), (200, 784), (784, 200)]
    # x-200-200-h1(100)-100-100-h2(50): a mean and a scale for each unit of h1 and h2
    two = [(50, 100), (100, 100), (100, 100), (100, 100), (100, 100), (100, 200), (100, 200), (200, 200), (200, 200)]
    assert sizes == (one if layers == 1 else sorted([*two, (200, 200), (200, 784), (784, 200)]))
    others = {type(module) for module in program.modules() if not list(module.children())} - {nn.Linear}
    assert nn.Tanh in others
    assert not others & {nn.ReLU, nn.Softplus, nn.Sigmoid, nn.Dropout}
    last = program.model.decoder.layers[-1]
    torch.testing.assert_close(last.bias.sigmoid().view(28, 28), images.mean(0).clamp(0.001, 0.999))
    for layer in linear:
        bound = (6 / (layer.in_features + layer.out_features)) ** 0.5  # Glorot and Bengio (2010)
        assert 0.9 * bound < layer.weight.abs().max() <= bound
        assert layer is last or not layer.bias.any()


@pytest.mark.parametrize(("name", "k"), [("vae", 1), ("vae", 5), ("iwae", 5), ("dreg", 5)])
def test_the_objectives_are_what_they_are_called(name: str, k: int) -> None:
    objective = reproduction.OBJECTIVES[name](k)
    assert objective.num_particles == k
    assert type(objective) is {"vae": Trace_ELBO, "iwae": pv.IWAE, "dreg": pv.DReG}[name]


def test_what_fit_gets(reproduce: Reproduce, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    fit = pv.fit

    def spy(*args: Any, **options: Any) -> pv.History:
        seen.update(options)
        return fit(*args, **options)

    monkeypatch.setattr("ppl_vae.training.fit", spy)
    assert reproduce("--passes", 2, "--minutes", 7).code == 0
    assert (seen["batch_size"], seen["epochs"], seen["time_limit"], seen["resume"]) == (20, 2, 420, True)
    assert seen["eps"] * 20 == pytest.approx(1e-4)  # of the summed gradient
    assert reproduce("--passes", 2, "--compressed", "--out", "short").code == 0
    assert (seen["batch_size"], seen["epochs"], seen["time_limit"]) == (100, 2, None)
    assert seen["eps"] * 100 == pytest.approx(1e-4)


def test_active_units_are_counted_by_layer() -> None:
    """Of two layers the lower one, whose decoder passes on one unit, and of the upper one none."""
    program = pv.HierarchicalVAE(7, (3, 2), hidden_dims=((11,), (5,)))
    with torch.no_grad():
        program.guide.encoder.layers[-1].weight[1:] = 0.0
        program.guide.encoder.layers[-1].weight[0] = 5.0
        program.guide.upper.layers[-1].weight.zero_()
    found = pv.diagnose(program.model, program.guide, torch.bernoulli(torch.full((101, 7), 0.5)), num_samples=20)
    assert reproduction.active_units(found) == "1+0"


# The command


def test_a_table_beside_the_published_number(reproduce: Reproduce, tmp_path: Path, root: Path) -> None:
    result = reproduce("--k", 5, "--objective", "dreg", "--passes", 2)
    assert result.code == 0, result.err
    folder = tmp_path / "runs/iwae-1-5-dreg"
    assert {path.name for path in folder.iterdir()} == {
        "checkpoint.safetensors",
        "evidence.safetensors",
        "run.json",
        "weights.safetensors",
    }
    published, ours = (line.split() for line in result.out.splitlines() if line.startswith(("Burda", "this run")))
    assert published[-2:] == ["-85.54", "22"]
    evidence, _ = files.read_tensors(folder / "evidence.safetensors")
    assert float(ours[-3]) == pytest.approx(evidence["log_px"].mean().item(), abs=0.006)
    assert float(ours[-2]) == pytest.approx(evidence["log_px"].std().item() / 11**0.5, abs=0.006)
    assert len(evidence["index"].unique()) == 11
    recorded = record(folder)
    assert recorded["results"]["log_px"] == evidence["log_px"].mean()
    assert recorded["results"]["active_units"] == ours[-1]
    for said in ("2 of 3,280 passes, at a learning rate of 7.2e-04", "The paper has no DReG", "Scored are 11 of 23"):
        assert said in result.out
    # What was written is the program that was scored, on the test images as the seed binarises them.
    vae = pv.load(folder / "weights.safetensors")
    test = pv.data.load("mnist", root=root).dynamic_binarization(seed=0).test[evidence["index"]]
    again = pv.importance_sampling(vae.model, vae.guide, test, num_samples=30, seed=0)
    torch.testing.assert_close(again.log_px, evidence["log_px"])


def test_two_layers(reproduce: Reproduce, tmp_path: Path) -> None:
    result = reproduce("--layers", 2, "--k", 5, "--passes", 1)
    assert result.code == 0, result.err
    assert re.search(r"Burda.*-83\.89 +21\+5\n", result.out)
    assert re.search(r"this run, 1 pass in batches of 20 .* \d+\+\d+\n", result.out)
    assert isinstance(pv.load(tmp_path / "runs/iwae-2-5-iwae/weights.safetensors"), pv.HierarchicalVAE)


def test_a_larger_budget_goes_on(reproduce: Reproduce, tmp_path: Path) -> None:
    """Two passes and then one more are three, to the last bit, though the second call has more passes in view."""
    assert reproduce("--passes", 3, "--out", "three").code == 0
    assert reproduce("--passes", 2, "--out", "more").code == 0
    assert not same_tensors(tmp_path / "three/weights.safetensors", tmp_path / "more/weights.safetensors")
    assert reproduce("--passes", 3, "--out", "more").code == 0
    for name in ("weights", "evidence"):
        assert same_tensors(tmp_path / f"three/{name}.safetensors", tmp_path / f"more/{name}.safetensors")
    assert len(record(tmp_path / "more")["training"]["loss"]) == 3


def test_minutes_end_the_training(reproduce: Reproduce, tmp_path: Path) -> None:
    result = reproduce("--minutes", 1e-6)
    assert result.code == 0, result.err
    assert record(tmp_path / "runs/iwae-1-1-iwae")["training"]["stopped"] == "time limit"
    assert "1 of 3,280 passes" in result.out
    assert len(record(tmp_path / "runs/iwae-1-1-iwae")["training"]["loss"]) == 1
    assert reproduce("--minutes", 1e-6).code == 0  # the time is over: nothing is added
    assert len(record(tmp_path / "runs/iwae-1-1-iwae")["training"]["loss"]) == 1


def test_minutes_of_a_compressed_run_become_passes_once(
    reproduce: Reproduce, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = reproduce("--minutes", 0.02, "--compressed")
    assert result.code == 0, result.err
    passes = record(tmp_path / "runs/iwae-1-1-iwae")["compressed_passes"]
    assert passes >= 1
    assert f"a compressed one, {passes} passes in batches of 100" in result.out
    monkeypatch.setattr(reproduction, "_passes_in", lambda *_: pytest.fail("timed again"))
    assert reproduce("--minutes", 0.02, "--compressed").code == 0


def test_ctrl_c_says_how_to_go_on(reproduce: Reproduce, tmp_path: Path, monkeypatch: Any) -> None:
    fit = pv.fit

    def interrupted(*args: Any, **options: Any) -> pv.History:
        history = fit(*args, **options)
        history.stopped = "interrupted"
        return history

    with monkeypatch.context() as patch:
        patch.setattr("ppl_vae.training.fit", interrupted)
        result = reproduce("--passes", 2)
    assert result.code == 130
    assert "The same command goes on from runs/iwae-1-1-iwae" in result.err
    assert "results" not in record(tmp_path / "runs/iwae-1-1-iwae")
    assert reproduce("--passes", 2).code == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--passes", 0], "--passes must be positive; got 0"),
        (["--minutes", -1], "--minutes must be positive; got -1"),
        (["--passes", 3281], "The protocol has 3,280 passes; got --passes 3281"),
        (["--compressed"], "give either --passes or --minutes"),
        (["--compressed", "--passes", 2, "--minutes", 2], "give either --passes or --minutes"),
        (["--passes", 1, "--num-data", 24], "from 1 to 23 test images; got 24"),
        (["--passes", 1, "--num-samples", 0], "num_samples must be an integer of at least 1; got 0"),
        (["--passes", 1, "--root", "nowhere"], "train-images-idx3-ubyte"),
    ],
    ids=str,
)
def test_refused_before_any_work(reproduce: Reproduce, tmp_path: Path, options: Any, said: str) -> None:
    assert said in reproduce(*options).sentence()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_another_experiment_in_the_same_folder_is_refused(reproduce: Reproduce) -> None:
    assert reproduce("--passes", 1, "--out", "run").code == 0
    for options, said in (
        (["--k", 5], "k = 1; now it is 5"),
        (["--objective", "vae"], "objective = iwae; now it is vae"),
        (["--layers", 2], "layers = 1; now it is 2"),
        (["--seed", 1], "seed = 0; now it is 1"),
        (["--compressed"], "compressed to = None; now it is 1 passes"),
    ):
        assert said in reproduce("--passes", 1, "--out", "run", *options).sentence()
