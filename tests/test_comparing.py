"""The same networks under several likelihoods: each on its own scale and in its own table, none trained twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from math import log, sqrt
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from matplotlib import pyplot as plt
from torch import nn

import ppl_vae as pv
from ppl_vae import files
from ppl_vae import likelihoods as lh
from ppl_vae.comparing import families, pictures, prepared, rows, running
from ppl_vae.data import Data, DynamicBinarization, Levels
from ppl_vae.data.dequantization import DynamicDequantization
from ppl_vae.data.scale import Dequantized, Logit

FEW: dict[str, Any] = {"latent_dim": 3, "hidden_dims": (13, 11), "epochs": 2, "num_samples": 23, "progress": False}
FIVE = {
    "Bits": lh.Bernoulli(),
    "Trials": lh.Binomial(17),
    "Bins": lh.DiscretisedGaussian(17),
    "Line": lh.Gaussian(),
    "Counts": lh.Poisson(),
}


@pytest.fixture(scope="module")
def digits() -> Data:
    whole = pv.data.load("digits")
    train = torch.as_tensor(whole.train)[:97]
    return replace(whole, train=train, test=whole.test[:31], train_labels=None, test_labels=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compare") / "digits"


@pytest.fixture(scope="module")
def found(digits: Data, folder: Path) -> pv.Comparison:
    return pv.compare(digits, FIVE, folder=folder, **FEW)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves the time of drawing."""
    monkeypatch.setattr(pictures, "draw", lambda comparison, folder: None)


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch, no_pictures: None) -> None:
    """Fails what trains."""

    def fit(*args: Any, **options: Any) -> None:
        raise AssertionError("something was trained")

    monkeypatch.setattr(running, "fit", fit)


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    plt.close("all")


# ---------------------------------------------------------------------------------------------------------------
# The data of each likelihood


def test_each_likelihood_is_given_the_data_on_its_own_scale(found: pv.Comparison) -> None:
    scales = {row.name: row.data.scale for row in found.rows}
    assert scales == {
        "Bits": Levels(2),
        "Trials": Levels(17),
        "Bins": Levels(17),
        "Line": Dequantized(17),
        "Counts": Levels(17),
    }
    for row in found.rows:
        row.data.scale.check(row.data.test)
    # What is drawn is drawn anew in training, and once for the test data.
    assert isinstance(found["Bits"].data.train, DynamicBinarization)
    assert isinstance(found["Line"].data.train, DynamicDequantization)
    assert torch.equal(found["Trials"].data.test, found["Line"].data.scale.to_levels(found["Line"].data.test))


def test_data_that_are_prepared_stay_as_they_are(digits: Data) -> None:
    for data, likelihood in (
        (digits.static_binarization(), lh.Bernoulli()),
        (digits.as_levels(), lh.Binomial(17)),
        (digits.static_dequantization(), lh.Gaussian()),
        (digits.dynamic_dequantization().logit_transform(), lh.Gaussian()),
    ):
        assert prepared(data, likelihood) is data
    plain = Data(torch.randn(7, 2), torch.randn(5, 2))
    assert prepared(plain, lh.Gaussian()) is plain
    assert list(families(plain)) == ["gaussian", "gaussian-per-pixel", "laplace", "student-t"]


def test_every_family_has_a_place_and_scores_its_data(digits: Data) -> None:
    pairs = families(digits)
    kinds = {type(likelihood) for likelihood, _ in pairs.values()}
    # All that the room has but Logistic, of which there are the bins and the mixture.
    room = {value for value in vars(lh).values() if isinstance(value, type) and issubclass(value, lh.Likelihood)}
    assert room - kinds == {lh.Likelihood, lh.LocationScale, lh.Logistic}
    for name, (likelihood, data) in pairs.items():
        p = likelihood(torch.zeros(31, likelihood.num_parameters * 8, 8), event_dim=2)
        with pyro.validation_enabled(True):
            assert p.log_prob(data.test).isfinite().all(), name
    assert isinstance(pairs["gaussian-on-logits"][1].scale, Logit)
    assert "categorical" not in families(replace(digits, scale=type(digits.scale)(256)))


def test_a_pair_brings_its_own_data(digits: Data) -> None:
    logits = digits.dynamic_dequantization().logit_transform(margin=0.1)
    found = pv.compare(digits, {"Logits": (lh.Gaussian(), logits)}, **FEW)
    assert found.rows[0].data is logits
    assert found.rows[0].bits is not None


def test_data_outside_the_support_of_a_likelihood_are_refused(digits: Data) -> None:
    with pytest.raises(ValueError, match=r"A Bernoulli likelihood scores data in \{0, 1\}"):
        pv.compare(digits, {"BCE": (lh.Bernoulli(), digits)}, **FEW)
    with pytest.raises(ValueError, match="Expected levels"):
        pv.compare(replace(digits, scale=Dequantized(17)), {"Trials": lh.Binomial(17)}, **FEW)


def test_a_tenth_is_held_out_the_same_for_all(digits: Data) -> None:
    grey = torch.as_tensor(digits.train)
    rest, held_out = running._split(grey, 3)
    assert len(held_out) == 10
    assert len(rest) == 87
    together = torch.cat([torch.as_tensor(rest), held_out])
    assert torch.equal(together.flatten(1).sum(1).sort().values, grey.flatten(1).sum(1).sort().values)
    dynamic = digits.dynamic_dequantization()
    some, drawn = running._split(dynamic.train, 3)
    assert isinstance(some, DynamicDequantization)
    assert torch.equal(some.tensors[0], torch.as_tensor(rest) * 16)
    assert torch.equal(dynamic.scale.to_levels(drawn), held_out * 16)
    assert torch.equal(drawn, running._split(dynamic.train, 3)[1])
    assert not torch.equal(running._split(grey, 4)[1], held_out)


# ---------------------------------------------------------------------------------------------------------------
# The same networks


def test_networks_start_alike_but_for_the_last_layer(digits: Data) -> None:
    plan = running._Plan(3, (13, 11), 1, 64, 1e-3, 1, 10, seed=5)
    one = running._built(lh.Bernoulli(), digits, plan)
    for likelihood in (lh.LogisticMixture(2, 17), lh.Gaussian(per_pixel=True)):
        other = running._built(likelihood, digits, plan)
        for (name, weight), again in zip(
            one.encoder.state_dict().items(), other.encoder.state_dict().values(), strict=True
        ):
            assert torch.equal(weight, again), name
        first, second = one.decoder.state_dict(), other.decoder.state_dict()
        assert [name for name in first if first[name].shape != second[name].shape] == [
            "layers.2.weight",
            "layers.2.bias",
        ]
        assert all(torch.equal(first[name], second[name]) for name in first if "layers.2" not in name)
    assert not torch.equal(
        one.encoder.layers[0].weight,
        running._built(lh.Bernoulli(), digits, replace(plan, seed=6)).encoder.layers[0].weight,
    )


def test_numbers_are_those_of_the_library(found: pv.Comparison, digits: Data) -> None:
    for row in found.rows:
        programs, x = (row.vae.model, row.vae.guide), row.data.test
        again = pv.importance_sampling(*programs, x, num_samples=23)
        torch.testing.assert_close(row.evidence.log_px, again.log_px, rtol=0, atol=1e-4)
        latents = pv.diagnose(*programs, x)
        assert row.diagnostics.mean == pytest.approx(latents.mean, abs=1e-4)
        assert row.transform.shape == (31, 64)
        assert len(row.history.loss) == len(row.history.validation) == 2
    dims = 64
    line = found["Line"]
    assert line.bits is not None
    torch.testing.assert_close(line.bits, -line.evidence.log_px / (dims * log(2)) + np.log2(17), rtol=0, atol=1e-6)
    trials = found["Trials"]
    assert trials.bits is not None
    torch.testing.assert_close(trials.bits, -trials.evidence.log_px / (dims * log(2)), rtol=0, atol=1e-6)
    assert found["Counts"].bits is None
    assert [row.is_density for row in found.rows] == [False, False, False, True, False]


def test_what_the_caller_holds_is_not_changed(found: pv.Comparison, rng_unchanged: None, digits: Data) -> None:
    likelihood = FIVE["Line"]
    assert likelihood.raw_scale.item() == lh.Gaussian().raw_scale.item()  # type: ignore[union-attr]
    assert found["Line"].vae.likelihood.raw_scale.item() != lh.Gaussian().raw_scale.item()
    pyro.param("mine", torch.ones(2))
    pv.compare(digits, {"Trials": lh.Binomial(17)}, **FEW)
    assert list(pyro.get_param_store().keys()) == ["mine"]


def test_the_seed_rules_everything(digits: Data) -> None:
    def log_px(seed: int) -> torch.Tensor:
        return pv.compare(digits, {"Line": lh.Gaussian()}, seed=seed, **FEW).rows[0].evidence.log_px

    one = log_px(1)
    assert torch.equal(one, log_px(1))
    assert not torch.equal(one, log_px(2))


# ---------------------------------------------------------------------------------------------------------------
# Tables


def test_there_is_a_table_for_each_measure(found: pv.Comparison) -> None:
    groups = {title: {row.name for row in group} for title, group in found.groups().items()}
    assert groups == {
        "Probability on {0, 1}: whole numbers from 0 to 1": {"Bits"},
        "Probability on {0, ..., 16}: whole numbers from 0 to 16": {"Trials", "Bins"},
        "Density on the line: 17 levels dequantised to (level + u) / 17, with u drawn for each number": {"Line"},
        "Probability on counts 0, 1, 2, ...: whole numbers from 0 to 16": {"Counts"},
    }
    for group in found.groups().values():
        assert len({(row.vae.likelihood.measure, row.data.scale) for row in group}) == 1
        values = [row.evidence.mean for row in group]
        assert values == sorted(values, reverse=True)
    text = str(found)
    for title, cells in found.tables().items():
        assert title in text
        for row in cells:
            assert all(cell in text for cell in row.values())


def test_cells_say_what_they_are(found: pv.Comparison) -> None:
    cells = {cell["likelihood"].removesuffix(" !"): cell for table in found.tables().values() for cell in table}
    line, trials, counts = (found[name] for name in ("Line", "Trials", "Counts"))
    assert line.bits is not None
    assert trials.bits is not None
    error = line.bits.std().item() / sqrt(31)
    assert cells["Line"]["bits/dim"] == f"≤ {line.bits.mean().item():.3f} ± {error:.3f}"
    assert cells["Trials"]["bits/dim"].startswith(f"{trials.bits.mean().item():.3f} ± ")
    assert cells["Counts"]["bits/dim"] == "–"
    mean, error = trials.evidence.mean, trials.evidence.mean_standard_error
    assert cells["Trials"]["log p(x)"] == f"{mean:.2f} ± {error:.2f}"
    assert cells["Trials"]["active units"] == f"{trials.diagnostics.num_active} of 3"
    notes = " ".join(found.notes())
    assert "31 test data" in notes
    assert "(2, 17 here)" in notes
    assert "upper bound" in notes
    assert f"Probability on counts 0, 1, 2, ... has no bits/dim. {counts.without_bits}" in notes
    assert "never compared between tables" not in " ".join(pv.Comparison([trials]).notes())


@pytest.mark.parametrize(("share", "flagged"), [(0.94, True), (0.96, False)])
def test_a_pareto_k_that_is_too_large_is_flagged(found: pv.Comparison, share: float, flagged: bool) -> None:
    k = torch.where(torch.arange(100) < round(100 * share), 0.3, 0.9)
    evidence = replace(found["Trials"].evidence, pareto_k=k.double())
    row = replace(found["Trials"], evidence=evidence)
    ((cells,),) = pv.Comparison([row]).tables().values()
    assert cells["likelihood"] == ("Trials !" if flagged else "Trials")
    assert cells["k < 0.7"] == f"{100 * share:.0f} %"
    assert any(note.startswith("!: Pareto k is above 0.7") for note in pv.Comparison([row]).notes()) == flagged


def test_rows_have_names(found: pv.Comparison) -> None:
    assert found["Bins"] is found.rows[2]
    with pytest.raises(KeyError, match="There is no row 'bins'; there are Bits, Trials, Bins, Line, Counts"):
        found["bins"]
    assert repr(found) == "Comparison(Bits, Trials, Bins, Line, Counts)"


# ---------------------------------------------------------------------------------------------------------------
# The folder


def test_a_finished_row_is_not_trained_again(
    found: pv.Comparison, folder: Path, digits: Data, no_training: None
) -> None:
    again = pv.compare(digits, FIVE, folder=folder, **FEW)
    assert str(again) == str(found)
    for one, other in zip(found.rows, again.rows, strict=True):
        assert torch.equal(one.evidence.log_px, other.evidence.log_px)
        assert one.evidence.warnings() == other.evidence.warnings()
        assert str(one.diagnostics) == str(other.diagnostics)
        assert one.history == other.history
        torch.testing.assert_close(one.transform, other.transform, rtol=0, atol=1e-6)
        for name, weight in one.vae.state_dict().items():
            assert torch.equal(weight, other.vae.state_dict()[name])
        assert torch.equal(one.vae.sample(3), other.vae.sample(3))
    fewer = pv.compare(digits, {"Trials": lh.Binomial(17)}, folder=folder, **FEW)
    assert torch.equal(fewer.rows[0].evidence.log_px, found["Trials"].evidence.log_px)


def test_the_folder_holds_what_was_said(found: pv.Comparison, digits: Data, folder: Path, no_training: None) -> None:
    found = pv.compare(digits, FIVE, folder=folder, **FEW)
    written: Any = files.read_json(folder / "comparison.json")
    assert [row["name"] for row in written["rows"]] == list(FIVE)
    for row, numbers in zip(found.rows, written["rows"], strict=True):
        assert numbers["log_px"] == pytest.approx(row.evidence.mean)
        assert numbers["measure"] == row.vae.likelihood.measure.name
        assert numbers["bits_are_an_upper_bound"] == (None if row.bits is None else row.is_density)
        assert numbers["diagnostics"]["mean"]["kl"] == pytest.approx(row.diagnostics.mean["kl"])
    for name in ("samples", "reconstructions", "calibration"):
        assert (folder / f"figures/{name}.png").read_bytes().startswith(b"\x89PNG")
    assert isinstance(pv.load(folder / "rows/line/weights.safetensors").likelihood, lh.Gaussian)


@pytest.mark.parametrize(
    ("options", "likelihood", "said"),
    [
        ({"epochs": 3}, lh.Binomial(17), "epochs 2, now 3"),
        ({"seed": 1}, lh.Binomial(17), "initial weights; seed 0, now 1"),
        ({"hidden_dims": (13,)}, lh.Binomial(17), "hidden_dims [13, 11], now [13]; initial weights; program"),
        ({}, lh.DiscretisedGaussian(17, floor=0.01), "program"),
    ],
    ids=["epochs", "seed", "widths", "likelihood"],
)
def test_another_configuration_is_refused_before_anything_is_trained(
    found: pv.Comparison,
    digits: Data,
    folder: Path,
    no_training: None,
    options: dict[str, Any],
    likelihood: lh.Likelihood,
    said: str,
) -> None:
    before = files.read_json(folder / "comparison.json")
    asked = {"New": lh.Gaussian(), "Trials": likelihood}
    with pytest.raises(ValueError, match="a row of another configuration") as error:
        pv.compare(digits, asked, folder=folder, **{**FEW, **options})
    assert said in str(error.value)
    assert files.read_json(folder / "comparison.json") == before


def test_other_data_are_another_configuration(
    found: pv.Comparison, digits: Data, folder: Path, no_training: None
) -> None:
    for other in (replace(digits, test=digits.test.flip(0)), replace(digits, name="others")):
        with pytest.raises(ValueError, match=r"another configuration \(data\)"):
            pv.compare(other, {"Trials": lh.Binomial(17)}, folder=folder, **FEW)


def test_weights_that_start_elsewhere_are_another_configuration(
    found: pv.Comparison, digits: Data, folder: Path, no_training: None
) -> None:
    trained = found["Line"].vae.likelihood
    with pytest.raises(ValueError, match=r"another configuration \(initial weights\)"):
        pv.compare(digits, {"Line": trained}, folder=folder, **FEW)


def test_an_interrupted_comparison_goes_on(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pictures: None
) -> None:
    two = {"Trials": lh.Binomial(17), "Line": lh.Gaussian()}
    right, trained = running.fit, []

    def fit(model: Any, *args: Any, **options: Any) -> Any:
        trained.append(type(model.likelihood).__name__)
        history = right(model, *args, **options)
        return replace(history, stopped="interrupted") if trained == ["Binomial", "Gaussian"] else history

    monkeypatch.setattr(running, "fit", fit)
    with pytest.raises(KeyboardInterrupt):
        pv.compare(digits, two, folder=tmp_path, **FEW)
    assert [path.name for path in (tmp_path / "rows").iterdir()] == ["trials"]
    assert not (tmp_path / "comparison.json").exists()
    found = pv.compare(digits, two, folder=tmp_path, **FEW)
    assert trained == ["Binomial", "Gaussian", "Gaussian"]
    assert [row.name for row in found.rows] == list(two)


def test_a_row_that_was_cut_off_while_written_is_trained_again(digits: Data, tmp_path: Path, no_pictures: None) -> None:
    one = {"Trials": lh.Binomial(17)}
    first = pv.compare(digits, one, folder=tmp_path, **FEW)
    (tmp_path / "rows/trials/row.json").unlink()
    (tmp_path / "rows/trials/row.safetensors").write_bytes(b"half")
    again = pv.compare(digits, one, folder=tmp_path, **FEW)
    assert torch.equal(first.rows[0].evidence.log_px, again.rows[0].evidence.log_px)
    with (tmp_path / "rows/trials/weights.safetensors").open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"\xff")
    with pytest.raises(ValueError, match="corrupt"):
        pv.compare(digits, one, folder=tmp_path, **FEW)


def test_a_likelihood_of_your_own_has_a_row(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_pictures: None
) -> None:
    class Mine(lh.Gaussian):
        pass

    first = pv.compare(digits, {"Mine": Mine()}, folder=tmp_path, **FEW)

    def fit(*args: Any, **options: Any) -> None:
        raise AssertionError("something was trained")

    monkeypatch.setattr(running, "fit", fit)
    again = pv.compare(digits, {"Mine": Mine()}, folder=tmp_path, **FEW)
    assert isinstance(again.rows[0].vae.likelihood, Mine)
    assert torch.equal(first.rows[0].evidence.log_px, again.rows[0].evidence.log_px)


def test_what_is_refused(digits: Data, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to compare"):
        pv.compare(digits, {}, **FEW)
    with pytest.raises(ValueError, match="a folder of its own"):
        pv.compare(digits, {"A b": lh.Gaussian(), "a-B": lh.Laplace()}, folder=tmp_path, **FEW)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["..", "/", "a/../../b", "Gaussian, σ = ½", ""])
def test_a_name_never_leaves_the_folder(name: str, tmp_path: Path) -> None:
    place = (tmp_path / rows.folder_of(name)).resolve()
    assert place.parent == tmp_path.resolve()


# ---------------------------------------------------------------------------------------------------------------
# Pictures


def test_pictures_have_a_panel_for_each_row(found: pv.Comparison) -> None:
    for picture in (pictures.samples, pictures.reconstructions, pictures.calibration):
        figure = picture(found)
        figure.canvas.draw()
        titles = [ax.get_title() for ax in figure.axes if ax.axison or ax.images]
        assert [title for title in titles if title] == list(FIVE)


def test_images_are_drawn_on_the_unit_scale(found: pv.Comparison, digits: Data) -> None:
    for row in found.rows:
        unit = pictures.on_unit(row, row.data.test)
        assert unit.min() >= 0
        assert unit.max() <= 1
        if row.name != "Bits":
            assert (unit - digits.test).abs().max() <= 1 / 16 + 1e-6
    logits = digits.dynamic_dequantization().logit_transform(margin=0.1)
    row: Any = SimpleNamespace(data=logits)
    assert (pictures.on_unit(row, logits.test) - digits.test).abs().max() <= 1 / 16 + 1e-6


def test_tables_are_compared_without_images(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    table = Data(torch.randn(60, 5, generator=g), torch.randn(41, 5, generator=g), name="table")
    two = {"Normal": lh.Gaussian(), "Laplace": lh.Laplace()}
    found = pv.compare(table, two, folder=tmp_path, **FEW)
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["calibration.png"]
    assert "Density on the line has no bits/dim." in str(found)
    assert json.loads((tmp_path / "comparison.json").read_text())["rows"][0]["bits_per_dim"] is None


def test_few_data_have_fewer_bars_and_one_datum_no_error(digits: Data, tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    small = Data(torch.randn(20, 3, generator=g), torch.randn(7, 3, generator=g), name="small")
    found = pv.compare(small, {"Normal": lh.Gaussian()}, folder=tmp_path, **FEW)
    (ax,) = pictures.calibration(found).axes
    assert len(ax.containers[0]) == 2
    smaller = Data(small.train, small.test[:2], name="smaller")
    pv.compare(smaller, {"Normal": lh.Gaussian()}, folder=tmp_path / "2", **FEW)
    assert not (tmp_path / "2/figures").exists()
    one = pv.compare(replace(digits, test=digits.test[:1]), {"Trials": lh.Binomial(17)}, **FEW)
    assert "± nan" in str(one)


def test_the_networks_of_a_row_are_the_packages_own(found: pv.Comparison) -> None:
    vae = found["Bins"].vae
    assert isinstance(vae.encoder, pv.networks.MLP)
    assert vae.encoder.hidden_dims == (13, 11)
    assert vae.decoder.hidden_dims == (11, 13)
    assert isinstance(vae, nn.Module)
