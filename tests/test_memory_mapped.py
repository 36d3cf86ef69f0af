"""`MemoryMapped`: the values and the order of the file, in `fit`, in a `DataLoader` and in `importance_sampling`."""

from __future__ import annotations

import pickle
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

import ppl_vae as pv
from ppl_vae.batches import Batches
from ppl_vae.data import AsIs, Levels, MemoryMapped, Unit


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[np.ndarray], Path]:
    def save(array: np.ndarray) -> Path:
        np.save(tmp_path / "array.npy", array)
        return tmp_path / "array.npy"

    return save


def random_bytes(*shape: int, below: int = 256) -> np.ndarray:
    return np.random.default_rng(0).integers(below, size=shape, dtype=np.uint8)


ARRAYS = {
    "grey": random_bytes(11, 5, 7),
    "table of bytes": random_bytes(11, 7),
    "colours last": random_bytes(11, 5, 7, 3),
    "colours first": random_bytes(11, 3, 5, 7),
    "booleans": random_bytes(11, 7) > 100,
    "float64": np.random.default_rng(0).normal(size=(11, 5, 7)),
    "integers": np.arange(77).reshape(11, 7),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_rows_are_those_that_load_gives(name: str, saved: Callable[[np.ndarray], Path]) -> None:
    path = saved(ARRAYS[name])
    loaded, mapped = pv.data.load(path), MemoryMapped(path)
    whole = mapped[:][0]
    assert torch.equal(
        whole.flatten(1).sum(1).sort()[0], torch.cat([loaded.train, loaded.test]).flatten(1).sum(1).sort()[0]
    )
    assert mapped.scale == loaded.scale
    assert whole.dtype == torch.float32
    assert len(mapped) == len(whole) == 11
    for index in (3, -1, slice(2, 9, 3), torch.tensor([7, 0, 7])):
        (rows,) = mapped[index]
        assert torch.equal(rows, whole[index])
        assert rows.is_contiguous()


def test_values_by_hand(saved: Callable[[np.ndarray], Path]) -> None:
    path = saved(np.array([[0, 51], [255, 102], [1, 0]], dtype=np.uint8))
    assert torch.equal(MemoryMapped(path)[1:][0], torch.tensor([[255.0, 102.0], [1.0, 0.0]]) / 255)
    assert MemoryMapped(path).scale == Unit(256)
    path = saved(np.array([[0, 1], [1, 1]], dtype=np.uint8))
    bits = MemoryMapped(path, levels=2)
    assert bits.scale == Levels(2)
    assert bits[:][0].tolist() == [[0, 1], [1, 1]]
    assert MemoryMapped(saved(np.array([[0.5, -3.0]]))).scale == AsIs()


def test_every_row_once_and_in_order(saved: Callable[[np.ndarray], Path]) -> None:
    array = np.arange(23 * 3, dtype=np.float32).reshape(23, 3)
    mapped = MemoryMapped(saved(array), torch.arange(23))
    pairs = list(Batches((mapped,), batch_size=5).ordered())
    assert [len(x) for x, _ in pairs] == [5, 5, 5, 5, 3]
    assert torch.equal(torch.cat([x for x, _ in pairs]), torch.from_numpy(array))
    assert torch.cat([y for _, y in pairs]).tolist() == list(range(23))
    drawn = list(Batches((mapped,), batch_size=5))
    labels = torch.cat([y for _, y in drawn])
    assert labels.tolist() != list(range(23))
    assert labels.sort()[0].tolist() == list(range(23))
    assert torch.equal(torch.cat([x for x, _ in drawn]), torch.from_numpy(array)[labels])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_takes_it(num_workers: int, saved: Callable[[np.ndarray], Path]) -> None:
    mapped = MemoryMapped(saved(random_bytes(11, 5, 7)), torch.arange(11))
    loader = DataLoader(mapped, 4, num_workers=num_workers, multiprocessing_context="fork" if num_workers else None)
    assert torch.equal(torch.cat([x for x, _ in loader]), mapped[:][0])
    assert torch.cat([y for _, y in loader]).tolist() == list(range(11))


def test_a_copy_for_another_process_holds_no_rows(saved: Callable[[np.ndarray], Path]) -> None:
    mapped = MemoryMapped(saved(random_bytes(1009, 101)), levels=256)
    copied = pickle.dumps(mapped)
    assert len(copied) < 1009 * 101 / 10
    assert torch.equal(pickle.loads(copied)[:][0], mapped[:][0])


def test_a_data_set_is_asked_for_whole_batches(saved: Callable[[np.ndarray], Path]) -> None:
    asked: list[list[int]] = []

    class Counting(MemoryMapped):
        def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, ...]]:
            asked.append(indices)
            return super().__getitems__(indices)

        def __getitem__(self, index: Any) -> tuple[Tensor, ...]:
            assert not isinstance(index, int), "one by one"
            return super().__getitem__(index)

    counting = Counting(saved(random_bytes(11, 7)))
    assert len(list(Batches((counting,), 4).ordered())) == 3
    assert asked == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert [len(x) for (x,) in Batches((Subset(counting, range(5)),), 4)] == [4, 1]


def test_training_and_scoring_are_those_of_tensors(saved: Callable[[np.ndarray], Path]) -> None:
    """To the last bit: the same batches in the same order, the same draws for the same data."""
    path = saved(random_bytes(150, 7, below=2))
    mapped = MemoryMapped(path, levels=2)
    results = []
    for data in (mapped, mapped[:][0], TensorDataset(mapped[:][0])):
        torch.manual_seed(0)
        vae = pv.VAE((7,), 2)
        history = pv.fit(vae.model, vae.guide, data, epochs=2, batch_size=31, validation=data, progress=False)
        evidence = pv.importance_sampling(vae.model, vae.guide, data, num_samples=11, max_rows=512)
        results.append((history.loss, history.validation, evidence.log_px))
    for losses, validation, log_px in results[1:]:
        assert (losses, validation) == results[0][:2]
        assert torch.equal(log_px, results[0][2])


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Of 4 GiB, most of them holes in the file, a few rows are read for training and for scoring."""
    path = tmp_path / "large.npy"
    file = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(2**22, 1024))
    file[:: 2**16, ::3] = 1
    del file
    before = peak_memory()
    mapped = MemoryMapped(path, levels=2)
    some = Subset(mapped, range(0, len(mapped), 2**16))
    vae = pv.VAE((1024,), 2)
    pv.fit(vae.model, vae.guide, some, epochs=1, batch_size=16, progress=False)
    evidence = pv.importance_sampling(vae.model, vae.guide, some, num_samples=2)
    assert len(evidence.log_px) == 64
    first = next(Batches((mapped,), 16).ordered())[0]
    assert first.shape == (16, 1024)
    assert peak_memory() - before < 2**30


def peak_memory() -> int:
    """Bytes that this process has held at most, pages of files among them."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize(
    ("array", "options", "match"),
    [
        (np.zeros((0, 3)), {}, r"array of numbers in .*array.npy, got float64 of shape \(0, 3\)"),
        (np.array([["a"]]), {}, "array of numbers in"),
        (np.zeros(3), {}, r"Expected shape \(N, H, W\)"),
        (np.zeros((2, 3)), {"levels": 2}, "levels are 2 to 256, of bytes; got levels=2 for the float64"),
        (random_bytes(2, 3), {"levels": 257}, "got levels=257 for the uint8"),
    ],
)
def test_unusable_files_are_refused(
    array: np.ndarray, options: dict[str, Any], match: str, saved: Callable[[np.ndarray], Path]
) -> None:
    with pytest.raises(ValueError, match=match):
        MemoryMapped(saved(array), **options)


def test_unreadable_files_are_refused(tmp_path: Path, saved: Callable[[np.ndarray], Path]) -> None:
    with pytest.raises(FileNotFoundError, match=r"There is no file .*nowhere\.npy"):
        MemoryMapped(tmp_path / "nowhere.npy")
    np.savez(tmp_path / "several.npz", a=np.zeros((2, 3)))
    with pytest.raises(ValueError, match="but it is an archive"):
        MemoryMapped(tmp_path / "several.npz")
    path = saved(random_bytes(11, 7))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cannot be mapped"):
        MemoryMapped(path)
    with pytest.raises(ValueError, match="got 2 rows for the 11 of"):
        MemoryMapped(saved(random_bytes(11, 7)), torch.zeros(2))


def test_bad_rows_are_refused_when_they_are_read(saved: Callable[[np.ndarray], Path]) -> None:
    array = np.zeros((101, 3))
    array[71, 1] = np.nan
    mapped = MemoryMapped(saved(array))
    for index in (71, slice(70, 101), torch.tensor([3, 71])):
        with pytest.raises(
            ValueError, match=r"finite numbers .*; row 71 of .*array.npy holds nan. Remove or replace it"
        ):
            _ = mapped[index]
    with pytest.raises(ValueError, match="row 71 of"):
        list(Batches((mapped,), 16))
    with pytest.raises(ValueError, match=r"row 1 of .* holds inf"):
        _ = MemoryMapped(saved(np.array([[0.0], [1e300]])))[:]
    mapped = MemoryMapped(saved(array))
    lg = pv.LinearGaussian(torch.zeros(3, 2), mean=0.0, noise=1.0)
    with pytest.raises(ValueError, match="row 71 of"):
        pv.importance_sampling(lg.model, lg.guide, mapped, num_samples=2)
    with pytest.raises(ValueError, match=r"levels from 0 to 1; row 1 of .*array.npy holds 2"):
        _ = MemoryMapped(saved(np.array([[0, 1], [2, 0]], dtype=np.uint8)), levels=2)[:]


def test_a_pair_that_needs_all_its_data_is_refused(saved: Callable[[np.ndarray], Path]) -> None:
    from pyro.infer.autoguide import AutoNormal

    lg = pv.LinearGaussian(torch.zeros(3, 2), mean=0.0, noise=1.0)
    mapped = MemoryMapped(saved(np.zeros((101, 3))))
    guide = AutoNormal(lg.model)
    guide(mapped[:][0])
    with pytest.raises(ValueError, match="only on the data it was trained on"):
        pv.importance_sampling(lg.model, guide, mapped, num_samples=2)
