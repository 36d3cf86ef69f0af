"""The data sets that have a name, from where scikit-learn, Debian and torchvision keep them."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import numpy as np
from torch import Tensor

from ppl_vae.data.dataset import Data, image_tensor, label_tensor, split
from ppl_vae.data.reading import read_idx
from ppl_vae.data.scale import Unit

IDX_SETS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST"}  # torchvision's names
_TRAIN_FILES = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
_TEST_FILES = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
_DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of its package dataset-fashion-mnist


def load_digits(split_seed: int) -> Data:
    """See `ppl_vae.data.load`."""
    from sklearn import datasets

    digits = datasets.load_digits()
    images = image_tensor(digits.images, 17, "digits")
    return split("digits", images, label_tensor(digits.target, len(images), "digits"), 17, split_seed)


def load_idx_set(name: str, root: str | Path | None, download: bool) -> Data:
    """See `ppl_vae.data.load`."""
    folder = _root(root) / IDX_SETS[name] / "raw"
    if missing := _missing(folder):
        if name == "fashion-mnist" and root is None and not _missing(_DEBIAN_FASHION_MNIST):
            folder = _DEBIAN_FASHION_MNIST
        elif download:
            _download(IDX_SETS[name], _root(root))
        else:
            raise FileNotFoundError(
                f"Expected the four files of {name!r} in {folder.absolute()}, but there is no "
                f"{', '.join(missing)}. Either load with download=True on an open network, or put "
                f"{', '.join(_TRAIN_FILES + _TEST_FILES)} into that folder, gzipped (.gz) or not."
            )
    train, train_labels = _read_part(folder, *_TRAIN_FILES)
    test, test_labels = _read_part(folder, *_TEST_FILES)
    return Data(train, test, train_labels, test_labels, Unit(256), name)


def load_cifar10(root: str | Path | None, download: bool) -> Data:
    """See `ppl_vae.data.load`."""
    root = _root(root)
    folder = root / "cifar-10-batches-py"
    if download:
        _download("CIFAR10", root)
    elif not folder.is_dir():
        raise FileNotFoundError(
            f"Expected the folder {folder.absolute()}, but it is not there. Either load with download=True "
            f"on an open network, or put cifar-10-python.tar.gz into {root.absolute()} and unpack it there."
        )
    datasets = _torchvision_datasets()
    try:
        train, test = datasets.CIFAR10(root, train=True), datasets.CIFAR10(root, train=False)
    except RuntimeError as error:
        raise ValueError(
            f"Expected the seven unchanged files of CIFAR-10 in {folder.absolute()}, but one is missing or "
            f"damaged. Load with download=True, or unpack cifar-10-python.tar.gz in {root.absolute()} anew."
        ) from error
    source = str(folder)
    return Data(
        image_tensor(train.data, 256, source),
        image_tensor(test.data, 256, source),
        label_tensor(np.array(train.targets), len(train.data), source),
        label_tensor(np.array(test.targets), len(test.data), source),
        Unit(256),
        "cifar10",
    )


def _root(root: str | Path | None) -> Path:
    return Path(root or os.environ.get("PPL_VAE_DATA") or "~/.cache/ppl-vae").expanduser()


def _read_part(folder: Path, images_name: str, labels_name: str) -> tuple[Tensor, Tensor | None]:
    images_file, labels_file = (
        _plain_or_gzipped(folder / images_name),
        _plain_or_gzipped(folder / labels_name),
    )
    images, labels = read_idx(images_file), read_idx(labels_file)
    if images.ndim != 3:
        raise ValueError(
            f"Expected images (N, H, W) in {images_file}, whose IDX header then begins 00 00 08 03, got "
            f"shape {images.shape}. Check that it is not another of the four files."
        )
    return (
        image_tensor(images, 256, str(images_file)),
        label_tensor(labels, len(images), str(labels_file)),
    )


def _missing(folder: Path) -> list[str]:
    return [name for name in _TRAIN_FILES + _TEST_FILES if not _plain_or_gzipped(folder / name).is_file()]


def _plain_or_gzipped(path: Path) -> Path:
    return path if path.is_file() else path.with_name(f"{path.name}.gz")


def _download(dataset: str, root: Path) -> None:
    datasets = _torchvision_datasets()
    try:
        getattr(datasets, dataset)(root, download=True)
    except (RuntimeError, OSError) as error:
        cause = " ".join(str(error).split())  # torchvision's spans lines
        raise RuntimeError(
            f"torchvision could not download {dataset} to {root.absolute()} ({cause}). Check the network, "
            "or load with download=False, which says which files to put where."
        ) from error


def _torchvision_datasets() -> ModuleType:
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:  # RuntimeError: operator torchvision::nms does not exist
        raise RuntimeError(
            f"torchvision cannot be imported ({error}): it is missing, or torch and torchvision come from "
            "different builds. Install both at once: pip install torch torchvision --index-url "
            "https://download.pytorch.org/whl/cpu (CPU), or pip install --force-reinstall torch torchvision "
            "(CUDA)."
        ) from error
    return datasets
