"""Files of the user: IDX, NumPy arrays, folders of images."""

from __future__ import annotations

import gzip
import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ppl_vae.data.dataset import Data, image_tensor, label_tensor, split, unit_scale

if TYPE_CHECKING:
    from PIL import Image

_IMAGE_SUFFIXES = ".png", ".jpg", ".jpeg", ".bmp"


def read_idx(path: str | Path) -> np.ndarray:
    """Reads an IDX file of unsigned bytes, the format of MNIST, gzipped or not.

    The format: two zero bytes, 8 for "unsigned byte", the number of dimensions, each dimension as a
    big-endian 32-bit integer, then the bytes. Source: http://yann.lecun.com/exdb/mnist/.

    Returns:
        A uint8 array of the shape that the file states, values 0..255.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is empty, damaged, no IDX file of unsigned bytes, or longer or shorter than it
            states.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "labels")
        ...     _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 2, 1]))
        ...     read_idx(path)
        array([7, 2, 1], dtype=uint8)
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path.absolute()}. Check the path.")
    content = path.read_bytes()
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(
                f"Expected {path} to be a whole gzip file, but it is damaged ({error}). Get the file anew."
            ) from error
    if not content:
        raise ValueError(f"Expected an IDX file, but {path} is empty. Get the file anew.")
    if content[:3] != b"\0\0\x08":
        raise ValueError(
            f"Expected {path} to begin with the bytes 00 00 08, as an IDX file of unsigned bytes does, but "
            f"it begins with {content[:3].hex(' ')}. Get the file anew."
        )
    header = 4 + 4 * int.from_bytes(content[3:4], "big")
    if len(content) < header:
        raise ValueError(
            f"Expected an IDX header of {header} bytes, but {path} ends after {len(content)}. Get the file anew."
        )
    shape = tuple(int.from_bytes(content[start : start + 4], "big") for start in range(4, header, 4))
    if len(content) != header + math.prod(shape):
        raise ValueError(
            f"Expected {math.prod(shape)} bytes after the header of {path}, which states the shape {shape}, "
            f"but there are {len(content) - header}. Get the file anew."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy()  # uncopied it is read-only


def read_array_file(path: Path, split_seed: int) -> Data:
    """See `ppl_vae.data.load`."""
    arrays, name = _read_arrays(path), str(path)
    if "images" in arrays:
        images, levels = arrays["images"], _levels(arrays["images"])
        labels = label_tensor(arrays.get("labels"), len(images), f"labels in {path}")
        return split(name, image_tensor(images, levels, name), labels, levels, split_seed)
    train, test = arrays["train"], arrays["test"]
    if train.dtype != test.dtype or train.shape[1:] != test.shape[1:]:
        raise ValueError(
            f"Expected train and test in {path} to differ in their number only, but they are {train.dtype} "
            f"{train.shape} and {test.dtype} {test.shape}. Save them alike."
        )
    levels = _levels(train, test)
    return Data(
        image_tensor(train, levels, f"train in {path}"),
        image_tensor(test, levels, f"test in {path}"),
        label_tensor(arrays.get("train_labels"), len(train), f"train_labels in {path}"),
        label_tensor(arrays.get("test_labels"), len(test), f"test_labels in {path}"),
        unit_scale(levels),
        name,
    )


def read_image_folder(folder: Path, split_seed: int) -> Data:
    """See `ppl_vae.data.load`."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(
            f"Expected image files ({', '.join(_IMAGE_SUFFIXES)}) directly in {folder}, but there are none. "
            "Subfolders are not searched."
        )
    pictures = [_read_image(path) for path in paths]
    for path, picture in zip(paths, pictures, strict=True):
        if picture.size != pictures[0].size:
            raise ValueError(
                f"Expected images of one size, but {path} is {picture.size} (width, height) and {paths[0]} "
                f"is {pictures[0].size}. Resize or crop them."
            )
    mode = "L" if all(picture.mode in ("1", "L", "LA") for picture in pictures) else "RGB"
    levels = np.stack([np.asarray(picture.convert(mode)) for picture in pictures])
    return split(str(folder), image_tensor(levels, 256, str(folder)), None, 256, split_seed)


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays `images` and perhaps `labels`, or `train`, `test` and perhaps their labels."""
    try:
        with path.open("rb") as file:  # given a path, numpy leaves the file of a damaged archive open
            loaded = np.load(file)
            arrays = {"images": loaded} if isinstance(loaded, np.ndarray) else _wanted(loaded)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"Expected {path} to be a NumPy file (.npy or .npz) of numbers, but it cannot be read ({error}). "
            "Save it anew with numpy.save or numpy.savez."
        ) from error
    for key, array in arrays.items():
        if array.ndim == 0 or array.dtype.kind not in "buif":
            raise ValueError(
                f"Expected an array of numbers for {key} in {path}, got {array.dtype} of shape {array.shape}."
            )
    return arrays


def _wanted(archive: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    if len(archive) == 1:
        return {"images": np.asarray(next(iter(archive.values())))}
    if "train" in archive and "test" in archive:
        names = ["train", "test", "train_labels", "test_labels"]
    elif "images" in archive:
        names = ["images", "labels"]
    else:
        raise ValueError(f"it needs train and test, or images, but holds {', '.join(archive) or 'nothing'}")
    # asarray, because from a zip file that numpy did not write it gives plain bytes, which the caller refuses
    return {name: np.asarray(archive[name]) for name in names if name in archive}


def _levels(*arrays: np.ndarray) -> int | None:
    if any(array.dtype not in (np.uint8, np.bool_) for array in arrays):
        return None
    return 256 if any((array > 1).any() for array in arrays) else 2


def _read_image(path: Path) -> Image.Image:
    from PIL import Image

    try:
        picture = Image.open(path)
        with picture:
            picture.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"Expected an image in {path}, but it cannot be read ({error}). Replace or remove it."
        ) from error
    if picture.mode.startswith(("I", "F")):  # converting these to 8 bits would clip, not scale
        raise ValueError(f"Expected images of 8 bits, but {path} has PIL's mode {picture.mode}. Convert it.")
    return picture
