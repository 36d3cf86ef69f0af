"""Data sets as tensors: named sets, array files and image folders; explicit binarisation and dequantisation.

Every set comes as one `Data`: float32 tensors with the data along the first dimension. Images on levels
0 .. L - 1 are scaled to [0, 1] as level / (L - 1), and `scale` says so, that it need not be guessed later. Nothing is
done to the values unless asked for, and the record then says what:

    as_levels()                                         0 .. L - 1                  scale Levels(L)
    static_binarization(), dynamic_..., thresholded()   0 and 1                     scale Levels(2), binarization
    static_dequantization(), dynamic_dequantization()   v = (level + u) / L         scale Dequantized(L), dequantization
    ... and then logit_transform()                      logit(margin + (1 - 2 margin) v)    scale Logit(L, margin)

An array that is larger than memory stays in its file: `MemoryMapped`.
"""

from __future__ import annotations

from pathlib import Path

from ppl_vae.data.binarization import DynamicBinarization, binarize, threshold
from ppl_vae.data.dataset import Data
from ppl_vae.data.dequantization import DynamicDequantization
from ppl_vae.data.memory_mapped import MemoryMapped
from ppl_vae.data.named import IDX_SETS, load_cifar10, load_digits, load_idx_set
from ppl_vae.data.reading import read_array_file, read_idx, read_image_folder
from ppl_vae.data.scale import AsIs, Dequantized, Levels, Logit, Scale, Unit

__all__ = [
    "AsIs",
    "Data",
    "Dequantized",
    "DynamicBinarization",
    "DynamicDequantization",
    "Levels",
    "Logit",
    "MemoryMapped",
    "Scale",
    "Unit",
    "binarize",
    "load",
    "read_idx",
    "threshold",
]


def load(name: str | Path, *, root: str | Path | None = None, download: bool = False, split_seed: int = 0) -> Data:
    """Loads a data set by its name, or from a file of arrays or a folder of images.

    Names, all with their official split but for the digits:

    - "digits": scikit-learn's 1,797 digits of 8 x 8 pixels on 17 levels; always there.
    - "mnist", "fashion-mnist", "kmnist": 60,000 + 10,000 images of 28 x 28 pixels on 256 levels. The four IDX
      files, gzipped or not, are read from `root/MNIST/raw` (`FashionMNIST`, `KMNIST`), where torchvision too
      keeps them. Debian's package `dataset-fashion-mnist` is found by itself if no root is given.
    - "cifar10": 50,000 + 10,000 colour images of 32 x 32 pixels on 256 levels, through torchvision.

    Files: an array in an .npy file; or an .npz file with the arrays `train` and `test` (and `train_labels`,
    `test_labels`), or `images` (and `labels`), or one array of any name; further arrays are passed over.
    Arrays are `(N, H, W)`, `(N, H, W, 3)`, `(N, 3, H, W)` or `(N, P)`. Of type uint8 they are levels 0..255,
    or 0 and 1 if nothing else occurs (so are booleans); numbers of any other type are taken as they are.

    Folders: the .png, .jpg, .jpeg and .bmp files directly in it, in the order of their names, of one size and
    8 bits. They are grey if all are grey; transparency is dropped.

    All of it is read; a file that is larger than memory is left where it is by `MemoryMapped`.

    What has no split of its own is split 80/20 by a permutation seeded with `split_seed`.

    Args:
        name: One of the names above, or a path (a `Path` is never taken for a name).
        root: Where named sets lie and are downloaded to. Default: the environment variable PPL_VAE_DATA, else
            ~/.cache/ppl-vae.
        download: Lets torchvision download a named set that is not there.
        split_seed: The seed of the split, where there is no official one.

    Returns:
        A `Data`: grey images `(N, H, W)`, colour images `(N, 3, H, W)`, tables `(N, P)`.

    Raises:
        FileNotFoundError: The path, or the files of the named set, are not there.
        ValueError: The name is unknown, or a file is damaged, empty, or holds what cannot be used.
        RuntimeError: A download failed, or torchvision cannot be imported.

    Example:
        >>> digits = load("digits")
        >>> digits.train.shape, digits.train_labels.shape, digits.levels
        (torch.Size([1438, 8, 8]), torch.Size([1438]), 17)
    """
    if name == "digits":
        return load_digits(split_seed)
    if isinstance(name, str) and name in IDX_SETS:
        return load_idx_set(name, root, download)
    if name == "cifar10":
        return load_cifar10(root, download)
    path = Path(name).expanduser()
    if path.is_dir():
        return read_image_folder(path, split_seed)
    if path.is_file():
        return read_array_file(path, split_seed)
    if isinstance(name, Path) or len(path.parts) > 1 or path.suffix:
        raise FileNotFoundError(f"There is no file or folder {path.absolute()}. Check the path.")
    names = ", ".join(["digits", *IDX_SETS, "cifar10"])
    raise ValueError(f"{name!r} is no data set and no path that exists here. The data sets are {names}.")
