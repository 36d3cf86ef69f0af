"""Two processes do what one does: the same gradient, the same evidence, one set of files, one message.

`many.py` holds what they do. Two of them run all of it once, joined by gloo; here it is looked at.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import many
import pytest
import torch
from torch import Tensor

from ppl_vae import cli, processes

TESTS = Path(__file__).parent
Found = dict[str, Any]


def free_ports(count: int) -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [str(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("many")


@pytest.fixture(scope="module")
def begun(folder: Path) -> tuple[dict[str, Tensor], list[float]]:
    """A run of one process that two will go on with."""
    return many.continued(folder / "one", 1)


@pytest.fixture(scope="module")
def found(folder: Path, begun: Any) -> list[Found]:
    """What each of the two processes found."""
    first, *others = free_ports(4)
    started = [
        subprocess.Popen(
            [sys.executable, TESTS / "many.py", folder, *others],
            env=environment(
                TORCHELASTIC_RUN_ID="tests",
                WORLD_SIZE="2",
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=first,
            ),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=400)[1] for process in started]
    assert [process.returncode for process in started] == [0, -signal.SIGKILL], said  # the second kills itself at last
    return [torch.load(folder / f"found by {rank}", weights_only=False) for rank in (0, 1)]


def same(one: Any, other: Any, tolerance: float = 0.0) -> bool:
    """Whether all numbers are, NaN among them."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name], tolerance) for name in one)
    if isinstance(one, Tensor):
        return torch.allclose(one.double(), other.double(), rtol=0, atol=tolerance, equal_nan=True)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b, tolerance) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state without the statistics of batches."""
    return {name: value for name, value in state.items() if "running" not in name and "batches" not in name}


# ---------------------------------------------------------------------------------------------------------------
# Training


def test_parameters_are_equal_after_training_and_not_without_the_sum(found: list[Found]) -> None:
    one, other = (f["training"] for f in found)
    assert same(one["sync"], other["sync"])  # of networks that began differently; the statistics of BatchNorm too
    assert same(one["sync history"], other["sync history"])
    assert len(one["sync history"][2]) == 3
    moved = {name for name, value in weights(one["no sync"]).items() if not torch.equal(value, other["no sync"][name])}
    assert moved == set(weights(one["no sync"]))


@pytest.mark.parametrize("case", ["one plate", "KL in closed form", "global, subsampled", "global"])
def test_the_gradient_is_that_of_one_process_on_the_joined_batch(case: str, found: list[Found], folder: Path) -> None:
    """Uneven shares, one of no data, and a latent that all data have in common."""
    alone = many.gradients(folder)[case]
    one, other = (f["gradients"][case] for f in found)
    assert same(one, other)
    assert same(one, alone, tolerance=1e-11)


@pytest.mark.parametrize("case", ["one plate", "global"])
def test_a_wrong_weight_would_be_seen(case: str, found: list[Found], folder: Path) -> None:
    assert not same(found[0]["gradients"][f"{case}, mutant"], many.gradients(folder)[case], tolerance=1e-3)


def test_fit_does_the_same_steps_whatever_the_number_of_processes(found: list[Found], folder: Path) -> None:
    """With the noise given: the same batches, clipping, history, validation, and end."""
    one, other = (f["fitting"] for f in found)
    assert same(one, other)
    assert same(one, many.fitting(folder), tolerance=1e-9)
    assert one["stopped early"]["stopped"] == "early stopping"
    validation = one["stopped early"]["history"][2]
    assert validation.argmin() == len(validation) - 3 > 0


def test_each_process_draws_noise_of_its_own(found: list[Found], folder: Path) -> None:
    one, other = (f["noise"]["noise"] for f in found)
    assert torch.equal(one, many.noise(folder)["noise"])
    assert not (one == other).any()


def test_lazy_rare_and_unused_parameters(found: list[Found]) -> None:
    one, other = (f["parameters"] for f in found)
    assert same(one["store"], other["store"])
    assert {"encoder$$$weight", "rare", "unused$$$weight"} <= one["store"].keys()
    assert one["store"]["rare"] != 1  # only one process has a gradient of it
    assert not one["moved"]
    (warning,) = one["said"]
    assert re.search("received no gradient.*unused.weight, unused.bias", warning)
    assert other["said"] == []


@pytest.mark.parametrize("source", ["tensors", "tensor dataset", "dataset", "file", "loader"])
def test_every_datum_is_in_one_share(source: str, found: list[Found], folder: Path) -> None:
    shares = [f["sources"][source] for f in found]
    for one, other in zip(*(share["epochs"] for share in shares), strict=True):
        assert sorted(chain(*one, *other)) == list(range(many.NUM_DATA))
        assert [(len(a), len(b)) for a, b in zip(one, other, strict=True)] == [(4, 3)] * 4 + [(1, 0)]
    alone = many.sources(folder)[source]
    if source != "loader":
        first = [[*a, *b] for a, b in zip(shares[0]["epochs"][1], shares[1]["epochs"][1], strict=True)]
        assert [set(batch) for batch in first] == [set(batch) for batch in alone["epochs"][1]]
        assert shares[0]["dealt"] | shares[1]["dealt"] == alone["dealt"]
    assert sorted(chain(*(rows for share in shares for rows in share["dealt"].values()))) == list(range(many.NUM_DATA))


def test_a_distributed_sampler_keeps_its_batches(found: list[Found]) -> None:
    shares = [f["sources"]["distributed"] for f in found]
    epochs = [[*chain(*one, *other)] for one, other in zip(*(share["epochs"] for share in shares), strict=True)]
    for epoch in epochs:
        assert set(epoch) == set(range(many.NUM_DATA))
        assert len(epoch) == many.NUM_DATA + 1  # it pads
    assert epochs[0] != epochs[1]
    assert {*shares[0]["dealt"], *shares[1]["dealt"]} == set(range(10))


def test_what_cannot_be_shared_is_refused_everywhere(found: list[Found]) -> None:
    said = {
        "recorded": "JitTrace_ELBO records the program for one size",
        "per datum": "2 batches, or shares of them",
        "plateless": "No plate of the model is over the data",
        "rigid": "The plate 'data' is 29 long for 14 data",
        "loader": "DataLoader with batch_size=None",
    }
    for f in found:
        for case, sentence in said.items():
            kind, message, _ = f["refusals"][case]
            assert kind == "ValueError", (case, message)
            assert sentence in message


# ---------------------------------------------------------------------------------------------------------------
# Scoring


def test_the_evidence_is_that_of_one_process_to_the_last_bit(found: list[Found], folder: Path) -> None:
    alone = many.evidence(folder)
    for f in found:
        for case, numbers in alone.items():
            if case != "unseeded":
                assert same(f["evidence"][case], numbers), case
    assert alone["importance 37 1"]["standard_error"].isnan().all()
    assert alone["importance 1 5"]["pareto_k"].isinf().all()
    assert same(found[0]["evidence"]["unseeded"], found[1]["evidence"]["unseeded"])


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints


def test_two_processes_go_on_where_one_stopped(
    found: list[Found], begun: tuple[dict[str, Tensor], list[float]]
) -> None:
    one, other = (f["checkpoints"] for f in found)
    assert same(one, other)
    state, losses = one["of one"]
    assert same(weights(state), weights(begun[0]))
    assert losses[:1] == begun[1]
    assert len(one["of one, on"][1]) == 3
    assert not same(weights(one["of one, on"][0]), weights(state))


def test_one_process_goes_on_where_two_stopped(found: list[Found], folder: Path) -> None:
    state, losses = many.continued(folder / "two", 2, learning_rate=0.0)
    two = found[0]["checkpoints"]["two"]
    assert same(weights(state), weights(two[0]))
    assert losses[:1] == two[1]


def test_two_processes_go_on_to_the_last_bit(found: list[Found]) -> None:
    assert same(found[0]["checkpoints"]["parts"], found[0]["checkpoints"]["whole"])


# ---------------------------------------------------------------------------------------------------------------
# Ends


@pytest.mark.parametrize(
    ("case", "kind", "message"),
    [
        ("NaN", "RuntimeError", "no longer finite in epoch 1, batch 2: site 'z' of the guide"),
        ("refusal", "ValueError", "In epoch 1, batch 1: this process does not like it"),
        ("evidence", "ValueError", "one of the data is not liked"),
    ],
)
def test_what_fails_in_the_second_process_ends_both(case: str, kind: str, message: str, found: list[Found]) -> None:
    one, other = (f["failures"][case] for f in found)
    assert other[0] == kind
    assert message in other[1]
    assert one[0] == "FailedElsewhere"
    assert max(one[2], other[2]) < 30


def test_both_go_back_to_the_same_weights(found: list[Found]) -> None:
    one, other = (f["failures"]["after NaN"] for f in found)
    assert all(value.isfinite().all() for value in one.values())
    assert same(one, other)


def test_the_first_process_alone_looks_at_the_checkpoint(found: list[Found]) -> None:
    one, other = (f["failures"]["checkpoint"] for f in found)
    assert (one[0], other[0]) == ("FileExistsError", "FailedElsewhere")


def test_one_of_two_speaks(found: list[Found]) -> None:
    """It fails alone; both fail alike; the other has been killed."""
    one, other = found
    assert one["failing_alone"][0] == "SystemExit"
    assert other["failing_alone"][:2] == ("ValueError", "the second process alone fails")
    assert {one["failing_alike"][0], other["failing_alike"][0]} == {"ValueError", "SystemExit"}
    kind, message, seconds = one["killed"]
    assert kind == "FailedElsewhere"
    assert message.startswith("Process 0 of 2 has lost the others")
    assert seconds < 30


def test_ctrl_c_and_a_time_limit_are_decided_together(found: list[Found]) -> None:
    one, other = (f["decisions"] for f in found)
    assert same(one["after"], other["after"])
    assert one["losses"] == other["losses"]
    for f in (one, other):
        assert f["stopped"] == "interrupted"
        assert f["limited"] == ("time limit", 1)


# ---------------------------------------------------------------------------------------------------------------
# Files, and the command line


def test_the_first_process_alone_writes_and_talks(found: list[Found]) -> None:
    one, other = (f["files_and_words"] for f in found)
    assert {"weights.safetensors", "run.json", "evidence.json", "checkpoint.safetensors"} <= set(one["written"])
    assert "Written: " in one["out"]
    assert "epoch" in one["err"]
    assert len(one["evidence"]) == 37
    assert (other["written"], other["left"], other["out"], other["err"]) == ([], [], "", "")


def test_the_readme_line_of_torchrun_trains(tmp_path: Path) -> None:
    readme = (TESTS.parent / "README.md").read_text()
    (line,) = re.findall(r"^torchrun (.* train .*)$", readme, re.MULTILINE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *line.split()]
    done = subprocess.run(
        command, env=environment(), cwd=tmp_path, capture_output=True, text=True, check=False, timeout=400
    )
    assert (done.returncode, done.stdout.count("nats per datum")) == (0, 1), done.stdout + done.stderr
    assert (tmp_path / "runs" / "two" / "weights.safetensors").exists()
    assert [path.name for path in tmp_path.rglob("*") if path.name.startswith(".")] == []


def test_nothing_keeps_the_group_that_was_left() -> None:
    """Else its threads go on while the interpreter ends, and may abort a process that has done all it should."""
    program = """if True:
        import weakref
        import torch.distributed as dist
        from ppl_vae import processes

        with processes.joined():
            group = weakref.ref(dist.group.WORLD)
            import torch._dynamo
        print(group() is None)
    """
    alone = {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(TORCHELASTIC_RUN_ID="tests", **alone),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "True\n", done.stderr


def test_commands_for_one_process_are_refused_to_many(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (port,) = free_ports(1)
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "tests")
    monkeypatch.setattr(sys, "argv", ["ppl-vae", "coin"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "coin is done by one. Start it without torchrun." in capsys.readouterr().err


def test_one_process_is_alone() -> None:
    assert (processes.rank(), processes.world_size(), processes.is_first()) == (0, 1, True)
    with processes.joined(), processes.interrupted_together(), processes.summing(2) as total:
        total += 3.0
    assert total.tolist() == [3.0, 3.0]
    before = torch.get_rng_state()
    processes.part_ways()
    assert torch.equal(before, torch.get_rng_state())
