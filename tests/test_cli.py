"""The command line: what it writes is whole and agrees with what it says; what it refuses, it refuses in a sentence."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ppl_vae as pv
from ppl_vae import cli, files


@dataclass
class Result:
    code: int
    out: str
    err: str

    def sentence(self) -> str:
        """What `ppl-vae: ...` says, after checking that nothing but that is said and the exit code is 2."""
        assert self.code == 2, self
        assert self.err.startswith("ppl-vae: "), self.err
        assert self.err.count("\n") == 1, self.err
        assert "Traceback" not in self.err
        return self.err


Runner = Callable[..., Result]


@pytest.fixture
def ppl_vae(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Runner]:
    """Runs `main` in an empty folder, as the installed script does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PPL_VAE_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # typer sets it
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tests share the machine, and small networks gain nothing from more

    def run(*args: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["ppl-vae", *map(str, args)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capsys.readouterr()
        return Result(int(exit_.value.code or 0), captured.out, captured.err)

    yield run
    torch.set_num_threads(threads)


STATIC = ["--binarization", "static"]


def tiny(*args: object) -> list[object]:
    return [*STATIC, "--epochs", 2, "--latent-dim", 2, "--hidden-dims", "16", *args]


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs on the digits with two and three latent dimensions, for tests to copy."""
    folders = {}
    for latent_dim in (2, 3):
        folders[latent_dim] = tmp_path_factory.mktemp("trained") / "run"
        options = tiny("--latent-dim", latent_dim, "--out", folders[latent_dim])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["ppl-vae", "train", "digits", *map(str, options)])
            patch.setattr(sys, "excepthook", sys.excepthook)
            with pytest.raises(SystemExit) as exit_:
                cli.main()
        assert not exit_.value.code
    return folders


@pytest.fixture
def run(trained_once: dict[int, Path], tmp_path: Path) -> Path:
    """A run with a latent plane, as `train digits --out run` leaves it."""
    return shutil.copytree(trained_once[2], tmp_path / "run")


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# Without torch


COMMANDS = ["demo", "train", "evaluate", "compare", "sample", "reproduce", "coin", "data"]


@pytest.mark.parametrize("command", [[], *([command] for command in COMMANDS)])
def test_help_imports_nothing_heavy(command: list[str]) -> None:
    code = f"""
import sys
from ppl_vae.cli import app
try:
    app({[*command, "--help"]!r})
except SystemExit as exit:
    heavy = {{"torch", "pyro", "numpy", "matplotlib", "sklearn", "arviz"}} & set(sys.modules)
    sys.exit(f"imported {{heavy}}" if heavy else exit.code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


def test_the_installed_script_lists_its_commands() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("ppl-vae"), "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    for command in COMMANDS:
        assert command in done.stdout


# Comparing

FEW_DIGITS = ["--epochs", 1, "--hidden-dims", "11", "--latent-dim", 2, "--num-samples", 20, "--num-data", 30]


def test_likelihoods_are_compared_in_tables_of_their_measure(
    ppl_vae: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["compare", "digits", "--likelihoods", "bernoulli, gaussian", *FEW_DIGITS]
    first = ppl_vae(*command)
    assert first.code == 0, first.err
    folder = tmp_path / "runs/compare-digits"
    rows = {row["name"]: row for row in json.loads((folder / "comparison.json").read_text())["rows"]}
    assert list(rows) == ["bernoulli", "gaussian"]
    titles = "Probability on {0, 1}: ", "Density on the line: 17 levels dequantised"
    for title, row in zip(titles, rows.values(), strict=True):
        table = first.out[first.out.index(title) :].split("\n\n")[0]
        assert table.count("\n") == 2
        assert f"{row['bits_per_dim']:.3f} ± {row['bits_per_dim_standard_error']:.3f}" in table
        assert f"{row['log_px']:.2f} ± {row['log_px_standard_error']:.2f}" in table
    assert [row["bits_are_an_upper_bound"] for row in rows.values()] == [False, True]
    assert {f"figures/{name}.png" for name in ("samples", "reconstructions", "calibration")} <= contents(folder)
    assert pv.load(folder / "rows/gaussian/weights.safetensors").latent_dim == 2

    def fit(*args: Any, **options: Any) -> None:
        raise AssertionError("something was trained")

    monkeypatch.setattr("ppl_vae.comparing.running.fit", fit)
    assert ppl_vae(*command).out == first.out
    said = ppl_vae(*command, "--epochs", 2).sentence()
    assert "a row of another configuration (epochs 1, now 2)" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--likelihoods", "bernouli"], "There is no likelihood 'bernouli' for digits, whose levels are 17. There are"),
        (["--num-data", 1], "from 2 to 359 test data; got 1"),
        (["--hidden-dims", "a"], "such as 400,400"),
    ],
)
def test_compare_refuses_before_any_work(ppl_vae: Runner, tmp_path: Path, options: list[object], said: str) -> None:
    assert said in ppl_vae("compare", "digits", *options).sentence()
    assert not (tmp_path / "runs").exists()


# The demonstration


class Report(HTMLParser):
    """The cells of the tables, the images, and every address a browser might fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.addresses: list[str] = []
        self.images = 0
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_cell = tag in ("td", "th")
        self.images += tag == "img"
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]

    def handle_data(self, text: str) -> None:
        if self._in_cell:
            self.cells.append(text)
            self._in_cell = False


def test_demo_writes_a_report_that_agrees_with_its_runs(ppl_vae: Runner, tmp_path: Path) -> None:
    result = ppl_vae("demo", "--epochs", 2, "--samples", 30)
    assert result.code == 0, result.err
    figures = {f"figures/{n}.png" for n in ("loss", "samples", "reconstructions", "latents", "log_px", "pareto_k")}
    run_files = {"weights.safetensors", "run.json", *figures}
    expected = {"report.html", *(f"{run}/{name}" for run in ("bernoulli", "gaussian") for name in run_files)}
    assert contents(tmp_path / "runs") == {f"demo/{name}" for name in expected}
    demo = tmp_path / "runs/demo"

    report = Report((demo / "report.html").read_text())
    assert report.images == 12
    assert all(address.startswith("data:image/png;base64,") for address in report.addresses)
    for name, title in (("bernoulli", "Bernoulli (0/1)"), ("gaussian", "Gaussian (grey)")):
        results = json.loads((demo / name / "run.json").read_text())["results"]
        start = report.cells.index(title)
        log_px, elbo, bits, share, seconds = report.cells[start + 1 : start + 6]
        assert log_px == f"{results['log_px']:.2f} ± {results['mean_standard_error']:.2f}"
        assert float(elbo) == pytest.approx(results["elbo"], abs=0.005)
        assert share == f"{100 * results['share_pareto_k_below_0.7']:.0f} %"
        assert float(seconds) == pytest.approx(results["seconds"], abs=0.5)
        if name == "bernoulli":
            assert float(bits) == pytest.approx(-results["log_px"] / (64 * np.log(2)), abs=0.0005)
        else:
            assert bits == "–"
            assert results["bits_per_dim"] is None
        line = next(line for line in result.out.splitlines() if line.startswith(title))
        assert line.split() == " ".join(report.cells[start : start + 6]).split()
        for warning in results["warnings"]:
            assert warning in result.out
        assert results["warnings"], "30 samples are too few, and the demo must say so"
    assert "must not be compared" in result.out
    assert "runs/demo/report.html" in result.out

    assert ppl_vae("evaluate", demo / "bernoulli", "--num-samples", 30).code == 0
    results = json.loads((demo / "bernoulli/run.json").read_text())["results"]
    again = json.loads((demo / "bernoulli/evidence.json").read_text())
    assert again["log_px"] == pytest.approx(results["log_px"], abs=1e-5)


def test_demo_replaces_a_demo_and_nothing_else(ppl_vae: Runner, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("mine")
    assert "precious" in ppl_vae("demo", "--out", precious, "--epochs", 1, "--samples", 10).sentence()
    assert contents(tmp_path) == {"precious/thesis.txt"}
    old = tmp_path / "runs/demo"
    (old / "bernoulli").mkdir(parents=True)
    (old / "bernoulli/run.json").write_text("{}")
    (old / "stale.html").write_text("")
    torch.set_num_threads(2)
    assert ppl_vae("demo", "--epochs", 1, "--samples", 10).code == 0
    assert torch.get_num_threads() == 2
    assert "stale.html" not in contents(old)
    assert [path.name for path in old.parent.iterdir()] == ["demo"], "temporary folders were left"


# Train, evaluate, sample


def test_a_run_on_digits_is_trained_evaluated_and_sampled(ppl_vae: Runner, tmp_path: Path) -> None:
    trained = ppl_vae("train", "digits", *tiny("--validation", 100, "--patience", 5, "--seed", 3))
    assert trained.code == 0, trained.err
    run = tmp_path / "runs/digits"
    assert "ppl-vae evaluate runs/digits" in trained.out
    recorded = json.loads((run / "run.json").read_text())
    assert recorded["configuration"]["binarization"] == "static"
    assert len(recorded["training"]["loss"]) == len(recorded["training"]["validation"]) == 2
    assert "figures/manifold.png" in contents(run)

    evaluated = ppl_vae("evaluate", run, "--num-samples", 50)
    assert evaluated.code == 0, evaluated.err
    results = json.loads((run / "evidence.json").read_text())
    per_datum, _ = files.read_tensors(run / "evidence.safetensors")
    assert f"{results['log_px']:.3f}" in evaluated.out
    assert "bits/dim" in evaluated.out
    assert per_datum["log_px"].mean().item() == pytest.approx(results["log_px"])
    assert results["num_data"] == len(per_datum["log_px"]) == 359

    # The file's numbers are those of the library on the same data.
    vae, test = pv.load(run / "weights.safetensors"), pv.data.load("digits").static_binarization(seed=3).test
    found = pv.diagnose(vae.model, vae.guide, test)
    assert f"{found.mean['mutual_information']:.4f}" in evaluated.out
    assert results["diagnostics"]["mean"] == pytest.approx(found.mean, abs=1e-4)
    assert results["diagnostics"]["active_units"] == found.num_active
    kl = [latent["kl"] for latent in results["diagnostics"]["latents"].values()]
    assert kl == pytest.approx(per_datum["kl_per_dimension"].mean(0).tolist())
    assert torch.allclose(per_datum["kl_to_prior"], per_datum["kl_per_dimension"].sum(1))
    assert "figures/kl_per_dimension.png" in contents(run)
    again = pv.importance_sampling(vae.model, vae.guide, test, num_samples=50, seed=0, max_rows=4096)
    assert torch.allclose(again.log_px, per_datum["log_px"], atol=1e-4)

    assert ppl_vae("sample", run, "--num-samples", 6).code == 0
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_seed_gives_the_same_weights(ppl_vae: Runner, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert ppl_vae("train", "digits", *tiny("--out", name, "--seed", seed)).code == 0
    a, b, c = (files.read_tensors(tmp_path / name / "weights.safetensors")[0] for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


@pytest.mark.usefixtures("run")
def test_a_subset_of_the_data_is_seeded(ppl_vae: Runner, tmp_path: Path) -> None:
    index = []
    for seed in (0, 0, 1):
        assert ppl_vae("evaluate", "run", "--num-samples", 30, "--num-data", 20, "--seed", seed).code == 0
        index.append(files.read_tensors(tmp_path / "run/evidence.safetensors")[0]["index"])
    assert len(index[0].unique()) == 20
    vae, data = pv.load(tmp_path / "run/weights.safetensors"), pv.data.load("digits").static_binarization()
    scored = files.read_tensors(tmp_path / "run/evidence.safetensors")[0]["log_px"]
    again = pv.importance_sampling(vae.model, vae.guide, data.test[index[2]], num_samples=30, seed=1)
    assert torch.allclose(again.log_px, scored, atol=1e-4)
    assert torch.equal(index[0], index[1])
    assert not torch.equal(index[0], index[2])
    assert "from 1 to 359" in ppl_vae("evaluate", "run", "--num-data", 0).sentence()


# Methods, and bounds

FEW = ["--num-samples", 20, "--num-chains", 4, "--num-temperatures", 6]


@pytest.fixture
def plane(run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run, and chains from the prior that are short."""
    monkeypatch.setattr("ppl_vae.evidence.bounding.mode_check", partial(pv.mode_check, num_temperatures=20))
    return run


def evidence_of(run: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return json.loads((run / "evidence.json").read_text()), files.read_tensors(run / "evidence.safetensors")[0]


def pair_and_data(run: Path, index: torch.Tensor) -> tuple[object, object, torch.Tensor]:
    vae = pv.load(run / "weights.safetensors")
    return vae.model, vae.guide, pv.data.load("digits").static_binarization().test[index]


def test_annealing_is_asked_for_with_its_options(ppl_vae: Runner, plane: Path) -> None:
    result = ppl_vae("evaluate", "run", "--method", "annealed", "--num-data", 5, *FEW[2:], "--seed", 3)
    assert result.code == 0, result.err
    results, per_datum = evidence_of(plane)
    again = pv.annealed_importance_sampling(
        *pair_and_data(plane, per_datum["index"]), num_chains=4, num_temperatures=6, seed=3
    )
    assert torch.equal(per_datum["log_px"], again.log_px)
    assert torch.equal(per_datum["acceptance"], again.acceptance)
    assert (results["num_chains"], results["num_temperatures"], results["num_data"]) == (4, 6, 5)
    assert results["method"] == again.method == result.out.split(":")[0]
    assert results["kind"]["log_px"] == "lower bound in expectation and in probability: log mean weight, any data"
    assert results["bits_per_dim"] == pytest.approx(-results["log_px"] / (64 * np.log(2)))
    assert "num_samples" not in results
    assert "figures/pareto_k.png" not in contents(plane), "a few chains have no Pareto k"


def test_a_grid_is_exact(ppl_vae: Runner, plane: Path) -> None:
    result = ppl_vae("evaluate", "run", "--method", "grid", "--num-data", 5)
    assert result.code == 0, result.err
    results, per_datum = evidence_of(plane)
    sampled = pv.importance_sampling(*pair_and_data(plane, per_datum["index"]), num_samples=5000)
    assert ((per_datum["log_px"] - sampled.log_px).abs() < 5 * sampled.standard_error + 1e-3).all()
    assert per_datum["accepted"].all()
    assert torch.allclose(per_datum["kl"], per_datum["log_px"] - per_datum["elbo"])
    assert results["log_px"] == pytest.approx(per_datum["log_px"].mean().item())
    assert results["share_accepted"] == 1.0
    assert results["kind"]["log_px"].startswith("exact up to the error")
    assert "bits/dim" in result.out


@pytest.mark.parametrize("method", ["importance", "annealed", "grid"])
def test_bounds_are_printed_written_and_drawn(ppl_vae: Runner, plane: Path, method: str) -> None:
    result = ppl_vae("evaluate", "run", "--method", method, "--bounds", "--num-data", 5, *FEW)
    assert result.code == 0, result.err
    results, per_datum = evidence_of(plane)
    found, simulated, rungs = (results["bounds"][part] for part in ("test_data", "simulated_data", "ladder"))
    for part, sides in ((found, ("lower", "upper")), (simulated, ("lower", "upper", "reverse"))):
        assert part["num_data"] == 5
        for side in sides:
            of_draws = part[side]["mc_standard_error"]  # unknown for a single reverse chain
            numbers = (f"{part[side]['value']:.3f}", "–" if of_draws is None else f"{of_draws:.4f}")
            said = " +".join(map(re.escape, (*numbers, f"{part[side]['mean_standard_error']:.4f}")))
            assert re.search(rf"{side} +{said}  {re.escape(part[side]['kind'])}", result.out)
        assert part["method"] in result.out
    assert found["upper"]["kind"].startswith("upper bound in expectation: tangent")
    assert simulated["upper"]["kind"].endswith("simulated data")
    assert (per_datum["lower"] <= per_datum["upper"]).all()
    assert found["lower"]["value"] == pytest.approx(per_datum["lower"].mean().item())
    assert "figures/ladder.png" in contents(plane)

    sampler = [] if method == "importance" else ["annealed"]
    assert [rung["name"] for rung in rungs] == ["ELBO", "IWAE 10", "IWAE 20", *sampler, "upper bound"]
    by_name = {rung["name"]: rung["value"] for rung in rungs}
    data = pair_and_data(plane, per_datum["index"])
    assert by_name["IWAE 10"] == pytest.approx(pv.importance_sampling(*data, num_samples=10).mean, abs=1e-4)
    assert by_name["IWAE 20"] == pytest.approx(pv.importance_sampling(*data, num_samples=20).mean, abs=1e-4)
    assert by_name["upper bound"] == found["upper"]["value"]
    assert by_name.get("annealed", found["lower"]["value"]) == found["lower"]["value"]
    assert all(rung["kind"].startswith(("lower bound in", "upper bound in")) for rung in rungs)


def test_what_is_evaluated_anew_leaves_nothing_of_before(ppl_vae: Runner, plane: Path) -> None:
    options = ["--num-data", 2]
    assert ppl_vae("evaluate", "run", "--bounds", *options, *FEW).code == 0
    assert {"figures/pareto_k.png", "figures/ladder.png"} <= contents(plane)
    assert ppl_vae("evaluate", "run", "--method", "annealed", *options, *FEW[2:]).code == 0
    assert not {"figures/pareto_k.png", "figures/ladder.png"} & contents(plane)
    results, per_datum = evidence_of(plane)
    assert "bounds" not in results
    assert "lower" not in per_datum


def test_the_evidence_is_kept_when_its_bounds_fail(
    ppl_vae: Runner, plane: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*args: object, **options: object) -> None:
        raise ValueError("There are no bounds today.")

    monkeypatch.setattr("ppl_vae.evidence.bounds", failing)
    assert "no bounds today" in ppl_vae("evaluate", "run", "--bounds", "--num-data", 3, *FEW).sentence()
    assert len(evidence_of(plane)[1]["log_px"]) == 3


def test_the_evidence_serves_as_the_first_of_the_runs_that_bounds_need(
    ppl_vae: Runner, plane: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def counted(*args: Any, **options: Any) -> pv.Evidence:
        asked.append(options["num_samples"])
        return sampled(*args, **options)

    sampled = pv.importance_sampling
    monkeypatch.setattr("ppl_vae.evidence.importance_sampling", counted)
    assert ppl_vae("evaluate", "run", "--bounds", "--num-data", 3, *FEW).code == 0
    assert sorted(asked) == [10, 20, 20]


def test_means_of_minus_infinity_have_no_place_on_the_ladder() -> None:
    from ppl_vae.cli import evaluation

    lg = pv.LinearGaussian(torch.tensor([[1.0], [2.0]]), mean=0.0, noise=0.7)
    evidence = pv.importance_sampling(lg.model, lg.guide, lg.model(num_data=2), num_samples=3)
    kind = evaluation.MEAN_LOG_WEIGHT
    impossible, possible = (evaluation.Rung(str(v), v, 0.1, kind) for v in (-np.inf, -1.0))
    assert evaluation.ladder([impossible], evidence) == {}
    ax, _ = evaluation.ladder([impossible, possible], evidence)["ladder"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["-1.0"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--num-chains", 4], "--num-chains changes nothing with --method importance alone"),
        (["--num-temperatures", 4], "ask for --method annealed or for --bounds"),
        (["--method", "annealed", "--num-samples", 9], "--num-samples changes nothing with --method annealed alone"),
        (["--method", "grid", "--num-samples", 9], "ask for --method importance or for --bounds"),
        (["--method", "grid", "--num-chains", 9], "--num-chains changes nothing with --method grid alone"),
        (["--method", "grid", "--compile"], "--compile changes nothing with --method grid alone"),
        (["--num-samples", 0], "num_samples must be an integer of at least 1; got 0"),
        (["--bounds", "--num-chains", 0], "num_chains must be an integer of at least 1; got 0"),
        (["--bounds", "--num-temperatures", -1], "num_temperatures must be an integer of at least 1; got -1"),
        (["--bounds", "--num-data", 400], "from 1 to 359"),
        (["--method", "grid"], "A grid over z goes up to 2 dimensions, and this run has a latent_dim of 3"),
        (["--method", "grid", "--bounds"], "Use --method annealed"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_evaluate_refuses_before_any_work(
    ppl_vae: Runner, tmp_path: Path, trained_once: dict[int, Path], options: list[object], said: str
) -> None:
    shutil.copytree(trained_once[3], tmp_path / "run")
    assert said in ppl_vae("evaluate", "run", *options).sentence()
    assert not [name for name in contents(tmp_path / "run") if "evidence" in name]


def test_evaluate_refuses_unknown_methods(ppl_vae: Runner) -> None:
    assert ppl_vae("evaluate", "run", "--method", "magic").code == 2


@pytest.mark.parametrize(
    "options",
    [
        ["--likelihood", "gaussian"],
        ["--likelihood", "gaussian-per-pixel"],
        ["--likelihood", "continuous-bernoulli"],
        ["--binarization", "dynamic", "--validation", 5],
        ["--binarization", "threshold"],
        ["--network", "conv"],
    ],
)
def test_options_reach_the_program(ppl_vae: Runner, tmp_path: Path, options: list[object]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 6, 5), dtype=np.uint8)
    np.savez(tmp_path / "mine.npz", images=images, labels=np.arange(40) % 3)
    width = [] if "conv" in options else ["--hidden-dims", "16"]
    result = ppl_vae(
        "train", "mine.npz", "--binarization", "static", "--epochs", 2, "--latent-dim", 3, *width, *options
    )
    assert result.code == 0, result.err
    evaluated = ppl_vae("evaluate", "runs/mine", "--num-samples", 30)
    assert evaluated.code == 0, evaluated.err
    (bits,) = (line for line in evaluated.out.splitlines() if line.startswith("bits/dim"))
    if "--likelihood" in options:
        assert re.match(r"bits/dim +none  \w+ gives a density on .*between levels the density can hide", bits)
    else:
        assert re.match(r"bits/dim +\d\.\d{4}  probability on \{0, 1\}$", bits)
    recorded = json.loads((tmp_path / "runs/mine/run.json").read_text())["configuration"]
    for name, value in zip(options[::2], options[1::2], strict=True):
        assert recorded[str(name)[2:]] == value
    vae = pv.load(tmp_path / "runs/mine/weights.safetensors")
    assert isinstance(vae.encoder, pv.networks.ConvEncoder if "conv" in options else pv.networks.MLP)
    asked = str(options[1]) if "--likelihood" in options else "bernoulli"
    assert type(vae.likelihood).__name__ == asked.removesuffix("-per-pixel").title().replace("-", "")
    assert vae.likelihood.num_parameters == (2 if "gaussian-per-pixel" in options else 1)
    assert recorded["data"] == str(tmp_path / "mine.npz")


def test_what_is_asked_of_fit_is_what_fit_gets(
    ppl_vae: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def fit(model: object, guide: object, x: torch.Tensor, **options: object) -> pv.History:
        seen.update(options, x=x)
        return pv.History(loss=[1.0])

    monkeypatch.setattr("ppl_vae.training.fit", fit)
    np.save(tmp_path / "rows.npy", np.arange(100.0)[:, None])
    asked = ["--epochs", 7, "--batch-size", 3, "--patience", 2, "--seed", 5, "--validation", 30, "--compile"]
    rates = ["--learning-rate", 1e-2, "--final-learning-rate", 1e-4]
    result = ppl_vae("train", "rows.npy", "--likelihood", "gaussian", *asked, *rates)
    assert result.code == 0, result.err
    assert (seen["epochs"], seen["batch_size"], seen["patience"], seen["seed"]) == (7, 3, 2, 5)
    assert seen["compile"] is True
    assert [seen["learning_rate"](t) for t in (0.0, 0.5, 1.0)] == pytest.approx([1e-2, 1e-3, 1e-4])
    x, validation, data = seen["x"], seen["validation"], pv.data.load(tmp_path / "rows.npy")
    assert len(validation) == 30
    assert torch.equal(torch.cat([x, validation]).sort(0).values, torch.as_tensor(data.train).sort(0).values)


def test_tables_train_without_pictures_of_images(ppl_vae: Runner, tmp_path: Path) -> None:
    np.save(tmp_path / "table.npy", np.random.default_rng(0).normal(size=(50, 4)))
    assert (
        ppl_vae("train", "table.npy", *tiny("--likelihood", "gaussian", "--binarization", "none", "--out", "run")).code
        == 0
    )
    assert {name for name in contents(tmp_path / "run") if "figures" in name} == {
        "figures/loss.png",
        "figures/latents.png",
    }
    assert ppl_vae("evaluate", "run", "--num-samples", 30).code == 0
    assert "images" in ppl_vae("sample", "run").sentence()


def test_an_earlier_run_is_replaced_only_when_asked(ppl_vae: Runner, tmp_path: Path, run: Path) -> None:
    shutil.copytree(run, tmp_path / "runs/digits")
    before = (tmp_path / "runs/digits/run.json").read_bytes()
    assert "--overwrite" in ppl_vae("train", "digits", *tiny()).sentence()
    assert (tmp_path / "runs/digits/run.json").read_bytes() == before
    assert ppl_vae("train", "digits", *tiny("--overwrite", "--likelihood", "gaussian")).code == 0
    assert json.loads((tmp_path / "runs/digits/run.json").read_text())["configuration"]["likelihood"] == "gaussian"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    assert "something else" in ppl_vae("train", "digits", *tiny("--out", "mine", "--overwrite")).sentence()
    assert (tmp_path / "mine/notes.txt").read_text() == "mine"


def test_a_failed_replacement_keeps_the_earlier_run(ppl_vae: Runner, tmp_path: Path, run: Path) -> None:
    shutil.copytree(run, tmp_path / "runs/digits")
    before = {name: (tmp_path / "runs" / name).read_bytes() for name in contents(tmp_path / "runs")}
    ppl_vae("train", "digits", *tiny("--overwrite", "--binarization", "none")).sentence()
    assert {name: (tmp_path / "runs" / name).read_bytes() for name in contents(tmp_path / "runs")} == before


# What is refused


def idx_files(raw: Path) -> None:
    """A tiny MNIST whose last file breaks off."""
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        images = bytes([0, 0, 8, 3, 0, 0, 0, 4, 0, 0, 0, 3, 0, 0, 0, 3]) + bytes(range(36))
        labels = bytes([0, 0, 8, 1, 0, 0, 0, 4, 0, 1, 2, 3])
        (raw / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images[: 52 if part == "train" else 40]))
        (raw / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))


def arrays(path: Path) -> None:
    images = np.zeros((20, 4, 4), np.uint8)
    nan = np.zeros((20, 4, 4))
    nan[3, 1, 1] = np.nan
    np.savez(path / "labels.npz", images=images, labels=np.arange(19))
    np.save(path / "nan.npy", nan)
    np.save(path / "empty.npy", images[:0])
    np.save(path / "grey.npy", images + 0.5)
    (path / "damaged.npz").write_bytes(b"PK\x03\x04 no more")
    idx_files(path / "root/MNIST/raw")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["no-such-set"], "The data sets are digits"),
        (["missing/file.npy"], "There is no file or folder"),
        (["mnist"], "train-images-idx3-ubyte"),
        (["mnist", "--root", "root"], "t10k-images-idx3-ubyte.gz"),
        (["labels.npz"], "20 labels"),
        (["nan.npy"], "index 3"),
        (["empty.npy"], "empty"),
        (["damaged.npz"], "cannot be read"),
        (["digits", *STATIC, "--latent-dim", "0"], "latent_dim"),
        (["digits", *STATIC, "--hidden-dims", "wide"], "400,400"),
        (["digits", *STATIC, "--network", "conv", "--hidden-dims", "9"], "mlp"),
        (["digits"], "17 grey levels. Say how they become 0 or 1 with --binarization static"),
        (["digits"], "--likelihood continuous-bernoulli (ContinuousBernoulli) or gaussian. The cross-entropy"),
        (["digits"], "no log p(x); in Python it is `likelihoods.bce_score`"),
        (["grey.npy", "--hidden-dims", "9"], "Bernoulli likelihood scores data in {0, 1}; got values from"),
        (["digits", *STATIC, "--epochs", "0"], "epochs must be an integer of at least 1"),
        (["digits", *STATIC, "--batch-size", "0"], "batch_size"),
        (["digits", *STATIC, "--learning-rate", "-1"], "-1"),
        (["digits", *STATIC, "--final-learning-rate", "0"], "positive"),
        (["digits", *STATIC, "--patience", "3"], "validation"),
        (["digits", *STATIC, "--validation", "1438"], "from 1 to 1437"),
        (["digits", *STATIC, "--out", "empty.npy"], "is a file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_train_refuses_in_a_sentence_and_leaves_nothing(
    ppl_vae: Runner, tmp_path: Path, args: list[str], said: str
) -> None:
    arrays(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert said in ppl_vae("train", *args).sentence()
    assert sorted(tmp_path.rglob("*")) == before


def test_unknown_options_and_words_are_refused(ppl_vae: Runner) -> None:
    assert ppl_vae("train", "digits", "--likelihood", "poisson").code == 2
    assert ppl_vae("train", "digits", "--epoch", 3).code == 2
    assert ppl_vae("fly").code == 2


def test_only_runs_are_ever_replaced(ppl_vae: Runner, tmp_path: Path) -> None:
    """Not a pipe, nor a link; what a link points to is written to."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for command in (("train", "digits", *tiny("--out", "pipe", "--overwrite")), ("demo", "--out", "pipe")):
        assert "is a file or a device" in ppl_vae(*command).sentence()
    assert pipe.is_fifo()
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert ppl_vae("train", "digits", *tiny("--out", "link")).code == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real/weights.safetensors").is_file()
    assert "is a device or a pipe" in ppl_vae("sample", "real", "--out", "pipe").sentence()
    assert pipe.is_fifo()


def test_a_folder_of_runs_says_which(ppl_vae: Runner, tmp_path: Path, run: Path) -> None:
    shutil.copytree(run, tmp_path / "both/one")
    for command in ("evaluate", "sample"):
        assert "holds the runs one" in ppl_vae(command, "both").sentence()


def test_data_that_are_no_pictures_are_still_learned(ppl_vae: Runner, tmp_path: Path) -> None:
    np.save(tmp_path / "levels.npy", np.random.default_rng(0).integers(0, 255, (40, 4, 4)).astype(np.float32))
    result = ppl_vae(
        "train", "levels.npy", "--likelihood", "gaussian", "--epochs", 2, "--hidden-dims", 9, "--out", "run"
    )
    assert result.code == 0
    assert "Without pictures" in result.err
    assert (tmp_path / "run/weights.safetensors").is_file()


def test_evaluate_and_sample_refuse_what_is_no_run(
    ppl_vae: Runner, tmp_path: Path, trained_once: dict[int, Path]
) -> None:
    for command in ("evaluate", "sample"):
        assert "There is no run folder" in ppl_vae(command, "nowhere").sentence()
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert "empty" in ppl_vae(command, "empty").sentence()
    shutil.copytree(trained_once[2], tmp_path / "run")
    assert "at least one sample" in ppl_vae("sample", "run", "--num-samples", 0).sentence()
    assert "num_samples" in ppl_vae("evaluate", "run", "--num-samples", 0).sentence()
    assert ppl_vae("sample", "run", "--out", "samples.xyz").sentence()

    weights, record = tmp_path / "run/weights.safetensors", tmp_path / "run/run.json"
    whole = weights.read_bytes()
    for damaged in (whole[:-100], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        weights.write_bytes(damaged)
        for command in ("evaluate", "sample"):
            assert "weights.safetensors is corrupt" in ppl_vae(command, "run").sentence()
    weights.write_bytes(whole)
    for text in ("{", "[]", "{}", '{"configuration": {"data": "digits"}}'):
        record.write_text(text)
        assert "run.json" in ppl_vae("evaluate", "run").sentence()
    assert not (tmp_path / "run/evidence.json").exists()
    assert not (tmp_path / "samples.png").exists()


def test_data_that_changed_shape_since_training_are_refused(ppl_vae: Runner, tmp_path: Path) -> None:
    np.save(tmp_path / "mine.npy", np.ones((20, 4, 4), np.uint8))
    assert ppl_vae("train", "mine.npy", *tiny()).code == 0
    np.save(tmp_path / "mine.npy", np.ones((20, 5, 4), np.uint8))
    assert "(batch, 4, 4)" in ppl_vae("evaluate", "runs/mine").sentence()


# Ctrl-C


def test_interrupted_training_keeps_its_epochs_and_exits_with_130(
    ppl_vae: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = pv.fit

    def interrupted(*args: object, **options: object) -> pv.History:
        history = fit(*args, **options)  # type: ignore[arg-type]
        history.stopped = "interrupted"
        return history

    monkeypatch.setattr("ppl_vae.training.fit", interrupted)
    assert ppl_vae("train", "digits", *tiny()).code == 130
    assert json.loads((tmp_path / "runs/digits/run.json").read_text())["training"]["stopped"] == "interrupted"
    assert ppl_vae("demo", "--epochs", 1, "--samples", 10).code == 130
    assert not (tmp_path / "runs/demo").exists()


def test_interrupted_before_the_first_step_leaves_nothing(
    ppl_vae: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ppl_vae.training.fit", lambda *_, **options: pv.History(stopped="interrupted"))
    result = ppl_vae("train", "digits", *STATIC)
    assert (result.code, result.err) == (130, "")
    assert list(tmp_path.iterdir()) == []


# The coin, and data


def test_coin_agrees_with_the_closed_form(ppl_vae: Runner) -> None:
    result = ppl_vae("coin", "--heads", 400, "--tosses", 1000)
    assert result.code == 0
    assert [float(p) for p in re.findall(r"p\(heads\) = ([\d.]+)", result.out)] == pytest.approx(
        [0.4, 0.4, 401 / 1002], abs=1e-3
    )
    nats = [float(value) for value in re.findall(r"([-\d.]+) nats", result.out)]
    assert nats[0] == pytest.approx(400 * np.log(0.4) + 600 * np.log(0.6), abs=1e-3)
    binomial = sum(np.log((600 + k) / k) for k in range(1, 401))
    assert nats[1] == pytest.approx(-np.log(1001) - binomial, abs=1e-3)


@pytest.mark.parametrize(("heads", "tosses"), [(5, 3), (-1, 3), (0, 0)])
def test_coin_refuses_impossible_counts(ppl_vae: Runner, heads: int, tosses: int) -> None:
    assert "heads" in ppl_vae("coin", "--heads", heads, "--tosses", tosses).sentence()


def test_data_describes_or_says_how_to_get_it(ppl_vae: Runner, tmp_path: Path) -> None:
    result = ppl_vae("data", "digits")
    assert result.code == 0
    for text in ("1,438 and 359", "8 × 8", "17, scaled", "0 to 1", "10 classes, 0 to 9", "scikit-learn"):
        assert text in result.out
    assert "download" in ppl_vae("data", "mnist").sentence()
    np.save(tmp_path / "mine.npy", np.linspace(-1, 2, 40).reshape(10, 4))
    described = ppl_vae("data", "mine.npy").out
    assert "values as they are" in described
    assert "-1 to 2" in described
    assert str(tmp_path / "mine.npy") in described
