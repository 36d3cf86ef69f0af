"""A file is the old one or the new one, and what was changed on the disk does not load."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppl_vae import files

DTYPES = [torch.float32, torch.float64, torch.int64, torch.bool, torch.uint8, torch.bfloat16]


def tensors_of(dtype: torch.dtype, shape: list[int], seed: int) -> torch.Tensor:
    """Random bits, so that NaN payloads, infinities and subnormals are among the floats."""
    size = torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(2, shape, generator=generator).bool()
    bits = torch.randint(256, (size * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return bits.view(dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    return tensor.dtype, tensor.shape, tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


tensors = st.builds(tensors_of, st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3), st.integers(0, 2**31))


@settings(deadline=None, max_examples=80)
@given(
    st.dictionaries(st.text().filter(lambda name: name != "__metadata__"), tensors, max_size=4),
    st.dictionaries(st.text().filter(lambda name: name != "sha256"), st.text(), max_size=4),
)
def test_what_is_written_is_read(content: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        files.write_tensors(path, content, metadata)
        read, read_metadata = files.read_tensors(path)
    assert {name: bits(tensor) for name, tensor in read.items()} == {name: bits(t) for name, t in content.items()}
    assert read_metadata == metadata


def test_tied_strided_and_trained_tensors_are_written_by_value(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    files.write_tensors(tmp_path / "a", {"a": weight, "b": weight, "row": weight[0], "transposed": weight.T})
    read, metadata = files.read_tensors(tmp_path / "a")
    assert metadata == {}
    assert torch.equal(read["a"], weight)
    assert torch.equal(read["row"], weight[0])
    assert torch.equal(read["transposed"], weight.T)
    assert not read["a"].requires_grad
    read["a"] += 1.0  # what is read can be trained on, and shares no memory
    assert torch.equal(read["b"], weight)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "weights.safetensors"
    tensors = {"encoder": torch.randn(3, 2), "flags": torch.tensor([True, False]), "step": torch.tensor(7)}
    files.write_tensors(path, tensors, {"configuration": '{"latent_dim": 2}', "version": "1"})
    return path


@pytest.mark.parametrize("flip", [0x01, 0x20, 0x80, 0xFF])
def test_a_change_of_any_byte_is_noticed(path: Path, flip: int) -> None:
    data = path.read_bytes()
    for i in range(len(data)):
        path.write_bytes(data[:i] + bytes([data[i] ^ flip]) + data[i + 1 :])
        with pytest.raises(ValueError, match=r"weights\.safetensors is corrupt"):
            files.read_tensors(path)


def test_a_cut_off_file_is_noticed(path: Path) -> None:
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="corrupt"):
            files.read_tensors(path)
    path.write_bytes(data + b"more")
    with pytest.raises(ValueError, match="corrupt"):
        files.read_tensors(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x00" * 100, b"\xff" * 100, b"PK\x03\x04" * 50])
def test_garbage_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match="corrupt or no safetensors file"):
        files.read_tensors(tmp_path / "a")


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="no safetensors file"):
        files.read_tensors(tmp_path / "a.pt")


def test_a_file_of_another_program_has_no_checksum(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "a", {"author": "someone"})
    with pytest.raises(ValueError, match=r"expected sha256 none, got [0-9a-f]{64}"):
        files.read_tensors(tmp_path / "a")


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"encoder": torch.tensor([1.0, 2.0])}, {"version": "2"}),
        ({"encoder": torch.tensor([1.0, 2.0])}, {}),
        ({"decoder": torch.tensor([1.0, 2.0])}, {"version": "1"}),
        ({"encoder": torch.tensor([[1.0, 2.0]])}, {"version": "1"}),
        ({"encoder": torch.tensor([1.0, 2.0]).view(torch.int32)}, {"version": "1"}),
        ({"encoder": torch.tensor([1.0, 2.0]), "more": torch.zeros(0)}, {"version": "1"}),
    ],
    ids=["metadata", "metadata missing", "name", "shape", "dtype", "another tensor"],
)
def test_the_checksum_covers_everything(tmp_path: Path, tensors: dict, metadata: dict[str, str]) -> None:
    files.write_tensors(tmp_path / "a", {"encoder": torch.tensor([1.0, 2.0])}, {"version": "1"})
    with safetensors.safe_open(tmp_path / "a", "pt") as file:
        checksum = file.metadata()["sha256"]
    safetensors.torch.save_file(tensors, tmp_path / "b", {**metadata, "sha256": checksum})
    with pytest.raises(ValueError, match=f"expected sha256 {checksum}, got"):
        files.read_tensors(tmp_path / "b")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for read in (files.read_tensors, files.read_json):
        with pytest.raises(FileNotFoundError, match=r"Expected a file at .*absent, found nothing there"):
            read(tmp_path / "absent")
        with pytest.raises(FileNotFoundError, match="found a folder there"):
            read(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "metadata", "error", "message"),
    [
        ({"a": [1.0]}, {}, TypeError, "Expected a tensor under 'a', got list"),
        ({"a": torch.ones(2)}, {"b": 1}, TypeError, "Expected a string as metadata 'b', got int"),
        ({"a": torch.ones(2)}, {"sha256": "0"}, ValueError, "another name"),
        ({"__metadata__": torch.ones(2)}, {}, ValueError, "another name"),
        ({"a": torch.ones(2).to_sparse()}, {}, ValueError, "dense tensor"),
        ({"a": torch.ones(2, device="meta")}, {}, ValueError, "with values"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, {}, ValueError, "complex128"),
    ],
)
def test_what_cannot_be_written_leaves_the_old_file(
    path: Path, tensors: dict, metadata: dict, error: type[Exception], message: str
) -> None:
    before = path.read_bytes()
    with pytest.raises(error, match=message):
        files.write_tensors(path, tensors, metadata)
    assert path.read_bytes() == before


def test_json_is_sorted_and_readable(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"b": [1, 2.5, None], "a": "μ"})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == (
        '{\n  "a": "μ",\n  "b": [\n    1,\n    2.5,\n    null\n  ]\n}\n'
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, max_examples=50)
@given(json_values)
def test_json_comes_back(value: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files.write_json(Path(folder) / "a.json", value)
        assert files.read_json(Path(folder) / "a.json") == value


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe", b"{'a': 1}"])
def test_corrupt_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json is not valid JSON"):
        files.read_json(tmp_path / "a.json")


def test_what_is_no_json_leaves_the_old_file(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", 1)
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "a.json", {"a": torch.ones(1)})
    assert json.loads((tmp_path / "a.json").read_text()) == 1


def test_folders_are_made_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a"
    files.write_bytes_atomically(path, b"old")
    files.write_bytes_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    files.write_json("~/a.json", 1)
    assert (tmp_path / "a.json").exists()
    assert files.read_json("~/a.json") == 1


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="Name a file inside it"):
        files.write_bytes_atomically(tmp_path, b"")


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: type[BaseException]
) -> None:
    def fail(*_: object) -> None:
        raise error("no space left")

    files.write_bytes_atomically(tmp_path / "a", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(error, match="no space left"):
            files.write_bytes_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_kill_in_the_middle_leaves_the_old_file(path: Path, step: str) -> None:
    before = files.read_tensors(path)
    # The child stops inside the write, tells so, and is killed there.
    code = f"""
import os, sys, time, torch
from ppl_vae import files

def stop(*_):
    print("inside", flush=True)
    time.sleep(60)

os.{step} = stop
files.write_tensors(sys.argv[1], {{"encoder": torch.zeros(1000)}})
"""
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "inside\n"
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    assert (path.parent / f".{path.name}.tmp-{child.pid}").exists()
    after = files.read_tensors(path)
    assert after[1] == before[1]
    assert all(torch.equal(after[0][name], tensor) for name, tensor in before[0].items())
