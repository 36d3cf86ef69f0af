"""Data sets: what is loaded, on which scale, in which split; every way in which a file can be wrong."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import shutil
import sys
import zipfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from ppl_vae import data
from ppl_vae.data import named

SHARED = Path(__file__).parents[1] / "../shared/data"
IDX_NAMES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def needs(path: Path) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not path.exists(), reason=f"{path} is not on this machine")


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def digits() -> data.Data:
    return data.load("digits")


@pytest.fixture
def idx_arrays() -> dict[str, np.ndarray]:
    arrays = random_images(12, 4, 5), np.arange(12), random_images(3, 4, 5), np.arange(3)
    return dict(zip(IDX_NAMES, arrays, strict=True))


@pytest.fixture
def idx_folder(tmp_path: Path, idx_arrays: dict[str, np.ndarray]) -> Path:
    """A folder `root/MNIST/raw` with four gzipped files."""
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for name, array in idx_arrays.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(array), mtime=0))
    return folder


# --- the digits, and the split ------------------------------------------------------------------------------


@pytest.mark.usefixtures("rng_unchanged")
def test_digits(digits: data.Data) -> None:  # loaded before, as importing scikit-learn draws a random number
    digits = data.load("digits")
    assert digits.train.shape == (1438, 8, 8)
    assert digits.test.shape == (359, 8, 8)
    assert digits.train.dtype == digits.test.dtype == torch.float32
    assert digits.train_labels.dtype == digits.test_labels.dtype == torch.int64
    assert (digits.levels, digits.name, digits.binarization) == (17, "digits", "none")
    assert torch.equal((digits.train * 16).unique(), torch.arange(17.0))


def test_split_is_fixed_by_its_seed_and_loses_nothing(digits: data.Data) -> None:
    again, other = data.load("digits"), data.load("digits", split_seed=1)
    assert torch.equal(digits.train, again.train)
    assert torch.equal(digits.test_labels, again.test_labels)
    assert not torch.equal(digits.test, other.test)
    rows = [sorted(torch.cat([part.train, part.test]).flatten(1).tolist()) for part in (digits, other)]
    assert rows[0] == rows[1]


def test_split_is_disjoint_and_complete(tmp_path: Path) -> None:
    np.save(tmp_path / "numbered.npy", np.arange(101.0)[:, None])
    numbered = data.load(tmp_path / "numbered.npy")
    assert (len(numbered.train), len(numbered.test)) == (81, 20)
    assert torch.equal(torch.cat([numbered.train, numbered.test]).flatten().sort().values, torch.arange(101.0))


def test_labels_go_with_their_images(digits: data.Data) -> None:
    centroids = torch.stack([digits.train[digits.train_labels == digit].mean(0) for digit in range(10)])
    nearest = torch.cdist(digits.test.flatten(1), centroids.flatten(1)).argmin(1)
    assert (nearest == digits.test_labels).float().mean() > 0.8


# --- MNIST and its kin --------------------------------------------------------------------------------------


@needs(SHARED / "MNIST")
def test_mnist() -> None:
    mnist = data.load("mnist", root=SHARED)
    assert mnist.train.shape == (60_000, 28, 28)
    assert mnist.test.shape == (10_000, 28, 28)
    assert mnist.train_labels[:3].tolist() == [5, 0, 4]
    assert mnist.test_labels[:3].tolist() == [7, 2, 1]
    assert mnist.train.mean().item() == pytest.approx(0.1307, abs=1e-4)
    assert (mnist.levels, mnist.name) == (256, "mnist")


@needs(Path("/usr/share/datasets/fashion-mnist"))
def test_fashion_mnist_of_debian_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PPL_VAE_DATA", str(tmp_path))
    fashion = data.load("fashion-mnist")
    assert fashion.train.shape == (60_000, 28, 28)
    assert fashion.test_labels.bincount().tolist() == [1000] * 10
    assert fashion.train.mean().item() == pytest.approx(0.2860, abs=1e-4)


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_set(idx_folder: Path, idx_arrays: dict[str, np.ndarray], zipped: bool) -> None:
    if not zipped:
        for name, array in idx_arrays.items():
            (idx_folder / f"{name}.gz").unlink()
            (idx_folder / name).write_bytes(idx_bytes(array))
    small = data.load("mnist", root=idx_folder.parents[1])
    assert np.array_equal((small.train * 255).round(), idx_arrays["train-images-idx3-ubyte"])
    assert np.array_equal((small.test * 255).round(), idx_arrays["t10k-images-idx3-ubyte"])
    assert small.train_labels.tolist() == list(range(12))
    assert small.test_labels.tolist() == list(range(3))
    assert small.levels == 256


def test_default_root(monkeypatch: pytest.MonkeyPatch, idx_folder: Path) -> None:
    monkeypatch.setenv("PPL_VAE_DATA", str(idx_folder.parents[1]))
    assert len(data.load("mnist").train) == 12
    monkeypatch.delenv("PPL_VAE_DATA")
    monkeypatch.setenv("HOME", str(idx_folder))
    with pytest.raises(FileNotFoundError, match=r"\.cache/ppl-vae/KMNIST/raw"):
        data.load("kmnist")


def test_own_root_comes_before_debian(monkeypatch: pytest.MonkeyPatch, idx_folder: Path) -> None:
    debian = idx_folder
    monkeypatch.setattr(named, "_DEBIAN_FASHION_MNIST", debian)
    monkeypatch.setenv("PPL_VAE_DATA", str(debian / "elsewhere"))
    assert len(data.load("fashion-mnist").train) == 12
    with pytest.raises(FileNotFoundError, match=r"elsewhere"):
        data.load("fashion-mnist", root=debian / "elsewhere")


def test_missing_idx_files_are_named(idx_folder: Path) -> None:
    (idx_folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no t10k-labels-idx1-ubyte.*download=True.*put") as error:
        data.load("mnist", root=idx_folder.parents[1])
    assert str(idx_folder) in str(error.value)


WHOLE = idx_bytes(np.arange(60).reshape(3, 4, 5))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (WHOLE[:-1], r"Expected 60 bytes .* shape \(3, 4, 5\), but there are 59"),
        (WHOLE + b"\0", "but there are 61"),
        (WHOLE[:10], "header of 16 bytes, but .* ends after 10"),
        (WHOLE[:3], "header of 4 bytes, but .* ends after 3"),
        (b"\0\0\x0d" + WHOLE[3:], "begin with the bytes 00 00 08.* begins with 00 00 0d"),
        (b"<html>", "begins with 3c 68 74"),
        (b"", "is empty"),
        (gzip.compress(b"", mtime=0), "is empty"),
        (gzip.compress(WHOLE, mtime=0)[:-12], "whole gzip file, but it is damaged"),
        (gzip.compress(WHOLE, mtime=0)[:12] + b"\xff\xff\xff" + gzip.compress(WHOLE, mtime=0)[15:], "whole gzip file"),
        (gzip.compress(WHOLE, mtime=0)[:-8] + b"12345678", "whole gzip file"),
        (b"\x1f\x8b\0\0", "whole gzip file"),
    ],
)
def test_damaged_idx_file(idx_folder: Path, content: bytes, message: str) -> None:
    path = idx_folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        data.load("mnist", root=idx_folder.parents[1])
    assert str(path) in str(error.value)


def test_idx_files_that_do_not_belong_together(idx_folder: Path) -> None:
    images, labels = (idx_folder / f"train-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
    labels.write_bytes(idx_bytes(np.arange(11)))
    with pytest.raises(ValueError, match=r"Expected 12 labels in .*train-labels.* got 11"):
        data.load("mnist", root=idx_folder.parents[1])
    images.write_bytes(idx_bytes(np.arange(12)))
    with pytest.raises(ValueError, match=r"Expected images .*train-images.* got shape \(12,\)"):
        data.load("mnist", root=idx_folder.parents[1])
    images.write_bytes(idx_bytes(np.zeros((0, 4, 5))))
    with pytest.raises(ValueError, match=r"train-images.* is empty"):
        data.load("mnist", root=idx_folder.parents[1])


def test_read_idx(tmp_path: Path) -> None:
    path = tmp_path / "images"
    path.write_bytes(WHOLE)
    images = data.read_idx(path)
    assert np.array_equal(images, np.arange(60).reshape(3, 4, 5))
    images[0] = 0  # the caller's own
    with pytest.raises(FileNotFoundError, match=r"nowhere"):
        data.read_idx(tmp_path / "nowhere")


def test_download_through_torchvision(monkeypatch: pytest.MonkeyPatch, idx_folder: Path, tmp_path: Path) -> None:
    from torchvision.datasets import utils

    def download_url(url: str, root: str, filename: str, md5: str) -> None:
        """Stands for the network."""
        if not (idx_folder / filename).exists():
            raise URLError("no such host")
        shutil.copy(idx_folder / filename, root)

    monkeypatch.setattr(utils, "download_url", download_url)
    assert len(data.load("mnist", root=tmp_path / "new", download=True).train) == 12
    shutil.rmtree(idx_folder)
    assert len(data.load("mnist", root=tmp_path / "new", download=True).train) == 12  # from the files there
    with pytest.raises(RuntimeError, match=r"could not download MNIST to .*no such host.*download=False"):
        data.load("mnist", root=tmp_path / "other", download=True)


@pytest.mark.parametrize("failure", ["raise RuntimeError('operator torchvision::nms does not exist')", ""])
def test_torchvision_of_another_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failure: str) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, module)
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(failure)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match=r"different builds.*--index-url .*/cpu .*--force-reinstall"):
        data.load("mnist", root=tmp_path, download=True)
    sys.modules.pop("torchvision", None)


# --- CIFAR-10 -----------------------------------------------------------------------------------------------


@pytest.fixture
def cifar_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A tiny CIFAR-10: six batches of two images each, whose sums torchvision is told."""
    from torchvision.datasets import CIFAR10

    def write(name: str, content: object) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = random_images(2, 3 * 32 * 32)
    monkeypatch.setattr(
        CIFAR10,
        "train_list",
        [write(f"data_batch_{i}", {"data": pixels, "labels": [i, 9]}) for i in range(1, 6)],
    )
    monkeypatch.setattr(CIFAR10, "test_list", [write("test_batch", {"data": pixels, "labels": [0, 1]})])
    meta = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": meta[0], "md5": meta[1], "key": "label_names"})
    return tmp_path


@pytest.mark.parametrize("download", [False, True])
def test_cifar10(cifar_root: Path, download: bool) -> None:
    cifar = data.load("cifar10", root=cifar_root, download=download)
    assert cifar.train.shape == (10, 3, 32, 32)
    assert cifar.train_labels.tolist() == [1, 9, 2, 9, 3, 9, 4, 9, 5, 9]
    assert np.array_equal((cifar.test * 255).round(), random_images(2, 3, 32, 32))
    assert (cifar.levels, cifar.name) == (256, "cifar10")


def test_cifar10_missing_or_damaged(monkeypatch: pytest.MonkeyPatch, cifar_root: Path, tmp_path: Path) -> None:
    from torchvision.datasets import CIFAR10

    with pytest.raises(FileNotFoundError, match=r"nowhere/cifar-10-batches-py.*download=True.*cifar-10-python.tar.gz"):
        data.load("cifar10", root=tmp_path / "nowhere")
    (cifar_root / "cifar-10-batches-py" / "test_batch").write_bytes(b"")
    with pytest.raises(ValueError, match=r"missing or damaged"):
        data.load("cifar10", root=cifar_root)
    monkeypatch.setattr(CIFAR10, "url", (tmp_path / "nowhere.tar.gz").as_uri())  # URLError, without a network
    with pytest.raises(RuntimeError, match=r"could not download CIFAR10"):
        data.load("cifar10", root=cifar_root, download=True)


# --- array files --------------------------------------------------------------------------------------------


@needs(SHARED / "cifar10")
def test_array_file_of_colour_images() -> None:
    path = SHARED / "cifar10" / "cifar10_train_first4000.npz"
    cifar = data.load(path)
    assert cifar.train.shape == (3200, 3, 32, 32)
    assert cifar.test_labels.shape == (800,)
    assert (cifar.levels, cifar.name) == (256, str(path))
    whole = torch.cat([cifar.train, cifar.test])
    with np.load(path) as arrays:
        means = arrays["images"].mean((0, 1, 2)) / 255
    assert np.allclose(whole.mean((0, 2, 3)), means, atol=1e-5)


@needs(SHARED / "binarized_mnist")
def test_array_file_of_bits() -> None:
    mnist = data.load(SHARED / "binarized_mnist" / "binarized_mnist.npz")
    assert mnist.train.shape == (50_000, 784)
    assert mnist.test_labels.shape == (10_000,)
    assert (mnist.levels, mnist.binarization) == (2, "none")
    assert mnist.test.unique().tolist() == [0, 1]


@pytest.mark.parametrize(
    ("array", "shape", "levels", "largest"),
    [
        (np.full((10, 4, 5), 255, np.uint8), (4, 5), 256, 1.0),
        (np.full((10, 4, 5), 51, np.uint8), (4, 5), 256, 0.2),
        (np.full((10, 4, 5), 1, np.uint8), (4, 5), 2, 1.0),
        (np.full((10, 4, 5), True), (4, 5), 2, 1.0),
        (np.full((10, 7), 3.5), (7,), None, 3.5),
        (np.full((10, 7), 3.5, ">f4"), (7,), None, 3.5),
        (np.full((10, 7), -300), (7,), None, -300.0),
        (np.full((10, 4, 5, 3), 255, np.uint8), (3, 4, 5), 256, 1.0),
        (np.full((10, 3, 4, 5), 255, np.uint8), (3, 4, 5), 256, 1.0),
        (np.full((10, 3, 4, 3), 255, np.uint8), (3, 4, 3), 256, 1.0),
    ],
)
def test_shape_and_scale_of_arrays(
    tmp_path: Path, array: np.ndarray, shape: tuple[int, ...], levels: int | None, largest: float
) -> None:
    np.save(tmp_path / "array.npy", array)
    loaded = data.load(str(tmp_path / "array.npy"))
    assert loaded.train.shape == (8, *shape)
    assert loaded.test.shape == (2, *shape)
    assert loaded.levels == levels
    assert loaded.train.dtype == torch.float32
    assert loaded.train.max().item() == pytest.approx(largest)
    assert loaded.train_labels is None


def test_channels_are_moved_not_mixed(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", train=random_images(9, 4, 5, 3), test=random_images(2, 4, 5, 3))
    train = data.load(tmp_path / "a.npz").train
    assert np.array_equal((train * 255).round(), random_images(9, 4, 5, 3).transpose(0, 3, 1, 2))


def test_npz_keys(tmp_path: Path) -> None:
    images, labels = random_images(10, 4, 5), np.arange(10)
    np.savez(tmp_path / "official.npz", train=images, test=images[:2], test_labels=labels[:2], extra="passed over")
    official = data.load(tmp_path / "official.npz")
    assert np.array_equal((official.train * 255).round(), images)
    assert official.train_labels is None
    assert official.test_labels.tolist() == [0, 1]
    np.savez(tmp_path / "labelled.npz", images=np.repeat(labels[:, None], 4, 1), labels=labels)
    labelled = data.load(tmp_path / "labelled.npz")
    assert torch.equal(labelled.train[:, 0], labelled.train_labels.float())
    assert torch.equal(labelled.test[:, 0], labelled.test_labels.float())
    np.savez(tmp_path / "single.npz", whatever=images)
    assert data.load(tmp_path / "single.npz").train.shape == (8, 4, 5)


def test_levels_are_judged_over_both_parts(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", train=np.full((4, 2), 255, np.uint8), test=np.ones((4, 2), np.uint8))
    loaded = data.load(tmp_path / "a.npz")
    assert loaded.levels == 256
    assert loaded.test.max().item() == pytest.approx(1 / 255)


UNIT = np.ones((4, 2))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.ones((0, 2))}, r"is empty: its shape is \(0, 2\)"),
        ({"images": np.ones((1, 2))}, "at least 2 data .* has 1"),
        ({"images": np.array([[1.0], [2.0], [np.nan], [np.inf]])}, "index 2 of .* NaN"),
        ({"images": np.array([[1.0], [1e300]])}, "index 1 of .* too large"),
        ({"train": UNIT, "test": -np.inf * UNIT}, "index 0 of test in .* infinity"),
        ({"images": np.ones(4)}, r"Expected shape .* got \(4,\)"),
        ({"images": np.ones((4, 5, 5, 2))}, r"got \(4, 5, 5, 2\)"),
        ({"images": np.array(1.0)}, r"shape \(\)"),
        ({"images": np.array([["a"]])}, "array of numbers for images in .* <U1"),
        ({"images": 1j * UNIT}, "complex128"),
        ({"images": np.array([[{}]])}, "cannot be read .*pickle"),
        ({"train": UNIT, "test": np.ones((4, 3))}, r"\(4, 2\) and float64 \(4, 3\)"),
        ({"train": UNIT, "test": UNIT.astype(np.uint8)}, "float64 .* and uint8"),
        ({"train": UNIT, "valid": UNIT}, "needs train and test, or images, but holds train, valid"),
        ({}, "holds nothing"),
        ({"images": UNIT, "labels": np.arange(3)}, "Expected 4 labels in labels in .* got 3"),
        ({"images": UNIT, "labels": np.ones((4, 1))}, r"got 4 in shape \(4, 1\)"),
        ({"images": UNIT, "labels": np.ones(4)}, "Expected integers in labels in .* got float64"),
        (
            {"train": UNIT, "test": UNIT, "test_labels": np.arange(5)},
            "Expected 4 labels in test_labels .* got 5",
        ),
    ],
)
def test_arrays_that_cannot_be_used(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "arrays.npz", **arrays)
    with pytest.raises(ValueError, match=message) as error:
        data.load(tmp_path / "arrays.npz")
    assert str(tmp_path / "arrays.npz") in str(error.value)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_damaged_array_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"array.{suffix}"
    (np.save if suffix == "npy" else np.savez_compressed)(path, random_images(50, 9))
    whole = path.read_bytes()
    damaged = [b"", whole[:-20], whole[:5], b"1,2,3\n"]
    if suffix == "npz":  # an .npy file has no checksum by which a changed byte could be told
        damaged.append(whole[:300] + bytes([whole[300] ^ 0xFF]) + whole[301:])
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"Expected .*array.{suffix} to be a NumPy file .* cannot be read"):
            data.load(path)


def test_zip_file_of_something_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        archive.writestr("a.png", b"picture")
    with pytest.raises(ValueError, match=r"array of numbers for images in .*pictures.zip"):
        data.load(tmp_path / "pictures.zip")


# --- image folders ------------------------------------------------------------------------------------------


def test_image_folder(tmp_path: Path) -> None:
    images = random_images(10, 4, 5)
    for index, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{index}.{['png', 'bmp', 'PNG'][index % 3]}")
    (tmp_path / "readme.txt").write_text("not an image")
    folder = data.load(tmp_path)
    assert (folder.levels, folder.train_labels, folder.name) == (256, None, str(tmp_path))
    np.save(tmp_path / "same.npy", images)
    same = data.load(tmp_path / "same.npy")
    assert torch.equal(folder.train, same.train)
    assert torch.equal(folder.test, same.test)


def test_image_folder_in_colour(tmp_path: Path) -> None:
    Image.new("RGB", (5, 4), (255, 0, 51)).save(tmp_path / "a.png")
    Image.new("L", (5, 4), 51).save(tmp_path / "b.png")
    Image.new("RGBA", (5, 4), (255, 0, 51, 0)).save(tmp_path / "c.png")
    Image.new("RGB", (5, 4), (200, 200, 200)).save(tmp_path / "d.jpeg")
    folder = data.load(tmp_path)
    assert folder.train.shape == (3, 3, 4, 5)
    colours = sorted(torch.cat([folder.train, folder.test])[:, :, 0, 0].mul(255).round().tolist())
    assert colours == [[51, 51, 51], [200, 200, 200], [255, 0, 51], [255, 0, 51]]


def test_image_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there are none"):
        data.load(tmp_path)
    Image.new("L", (5, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"at least 2"):
        data.load(tmp_path)
    Image.new("L", (4, 5)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"one size, but .*b.png is \(4, 5\) .*a.png is \(5, 4\)"):
        data.load(tmp_path)
    Image.fromarray(random_images(4, 5).astype(np.uint16)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"8 bits, but .*b.png has PIL's mode I"):
        data.load(tmp_path)
    whole = (tmp_path / "a.png").read_bytes()
    for content in (whole[:-20], whole[:30], b"", b"text"):
        (tmp_path / "b.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"b.png, but it cannot be read"):
            data.load(tmp_path)


# --- names and paths ----------------------------------------------------------------------------------------


def test_unknown_name_and_missing_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'mnits' .* digits, mnist, fashion-mnist, kmnist, cifar10"):
        data.load("mnits")
    for missing in ("nowhere.npz", "nowhere/images", Path("digits"), tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"no file or folder /.*(nowhere|digits)"):
            data.load(missing)


def test_a_path_object_is_never_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    np.save(tmp_path / "digits", np.ones((10, 2)))
    (tmp_path / "digits.npy").rename(tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    assert data.load(Path("digits")).train.shape == (8, 2)
    assert data.load("digits").train.shape == (1438, 8, 8)


# --- binarisation -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("rng_unchanged")
def test_static_binarization(digits: data.Data) -> None:
    bits, again, other = (digits.static_binarization(seed=seed) for seed in (3, 3, 4))
    assert torch.equal(bits.train, again.train)
    assert torch.equal(bits.test, again.test)
    assert not torch.equal(bits.train, other.train)
    assert (bits.levels, bits.binarization) == (2, "static, seed 3")
    assert bits.train.unique().tolist() == [0, 1]
    assert torch.equal(bits.train_labels, digits.train_labels)
    assert (digits.levels, digits.binarization) == (17, "none")
    assert torch.equal(bits.test, data.binarize(digits.test, seed=3))
    for grey, binary in ((digits.train, bits.train), (digits.test, bits.test)):
        assert_drawn_from(grey, binary[None])


@pytest.mark.usefixtures("rng_unchanged")
def test_the_parts_are_binarised_independently() -> None:
    half = torch.full((200, 50), 0.5)
    bits = data.Data(half, half).static_binarization()
    assert (bits.train == bits.test).float().mean().item() == pytest.approx(0.5, abs=4.5 * 0.5 / 100)


def test_dynamic_binarization(digits: data.Data) -> None:
    dynamic = digits.dynamic_binarization(seed=3)
    assert (dynamic.levels, dynamic.binarization) == (2, "dynamic, test seed 3")
    assert torch.equal(dynamic.test, digits.static_binarization(seed=3).test)
    assert torch.equal(dynamic.train.tensors[0], digits.train)
    index = torch.tensor([5, 3, 3, 1000])
    reads = torch.stack([dynamic.train[index][0] for _ in range(500)])
    assert not torch.equal(reads[0], reads[1])
    assert not torch.equal(reads[:, 1], reads[:, 2])  # one image seen twice is drawn twice
    assert_drawn_from(digits.train[index], reads)


def test_dynamic_binarization_is_ruled_by_the_global_seed() -> None:
    dynamic = data.DynamicBinarization(torch.full((10, 20), 0.5))
    torch.manual_seed(1)
    first = dynamic[:][0]
    torch.manual_seed(1)
    assert torch.equal(first, dynamic[:][0])


def test_dynamic_binarization_is_a_tensor_dataset() -> None:
    grey = (torch.arange(10)[:, None] % 2).float().expand(10, 6)  # 0 and 1 are kept by every draw
    dynamic = data.DynamicBinarization(grey)
    assert isinstance(dynamic, TensorDataset)
    assert len(dynamic) == 10
    for index in (3, slice(2, 5), torch.tensor([9, 0, 9]), torch.arange(10) > 4):
        (binary,) = dynamic[index]
        assert torch.equal(binary, grey[index])
    batches = [batch for (batch,) in DataLoader(dynamic, batch_size=4)]
    assert torch.equal(torch.cat(batches), grey)


def test_threshold(digits: data.Data) -> None:
    grey = torch.tensor([0.0, 0.3, 0.5, 0.6, 1.0], dtype=torch.float64)
    assert data.threshold(grey).tolist() == [0, 0, 0, 1, 1]
    assert data.threshold(grey, at=0.0).tolist() == [0, 1, 1, 1, 1]
    assert data.threshold(grey).dtype == torch.float64
    cut = digits.thresholded(at=0.25)
    assert (cut.levels, cut.binarization) == (2, "threshold 0.25")
    assert torch.equal(cut.train, (digits.train > 0.25).float())
    for at in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"threshold in \[0, 1\), got"):
            data.threshold(grey, at=at)


@pytest.mark.parametrize("binarise", [data.binarize, data.threshold, data.DynamicBinarization])
def test_binarising_needs_probabilities(binarise: type) -> None:
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"Expected values in \[0, 1\]"):
            binarise(torch.tensor([[0.5], [bad]]))
    with pytest.raises(TypeError, match=r"floating point .* got torch.uint8"):
        binarise(torch.ones(3, dtype=torch.uint8))


@pytest.mark.parametrize("method", ["static_binarization", "dynamic_binarization", "thresholded"])
def test_data_refuse_to_be_binarised(method: str) -> None:
    grey = torch.full((4, 2), 0.5)
    with pytest.raises(ValueError, match=r"from 0.5 to 2"):
        getattr(data.Data(grey, torch.tensor([[0.5, 2.0]])), method)()
    with pytest.raises(ValueError, match=r"from 1 to 1.5"):
        getattr(data.Data(grey + torch.tensor([0.5, 1.0]), grey), method)()
    for binarised in (
        data.Data(grey, grey).static_binarization(),
        data.Data(grey, grey).dynamic_binarization(),
    ):
        with pytest.raises(ValueError, match=r"not binarised, but these are \((static|dynamic, test) seed 0|static, "):
            getattr(binarised, method)()


@pytest.mark.usefixtures("rng_unchanged")
def test_bits_have_the_type_of_the_images_and_keep_certain_values() -> None:
    images = torch.tensor([0.0, 1.0], dtype=torch.float64).repeat(1000)
    assert torch.equal(data.binarize(images), images)
    assert torch.equal(data.DynamicBinarization(images)[0:0][0], images[:0])


def assert_drawn_from(grey: torch.Tensor, draws: torch.Tensor) -> None:
    """The mean over `draws`, `(num_draws, ...)`, is `grey` but for 4.5 standard errors."""
    variance = (grey * (1 - grey)).double() / len(draws)
    error = draws.double().mean(0) - grey
    assert error.mean().abs() < 4.5 * variance.sum().sqrt() / grey.numel()
    if len(draws) >= 500:  # enough for each pixel's own mean to be normal
        assert (error.abs() <= 4.5 * variance.sqrt() + 1e-6).all()
