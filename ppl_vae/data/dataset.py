"""`Data`, and how arrays become one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ppl_vae.data.binarization import DynamicBinarization, binarize, draw, threshold


@dataclass(frozen=True, eq=False, repr=False)
class Data:
    """A data set in two parts. Grey images are `(N, H, W)`, colour images `(N, 3, H, W)`, tables `(N, P)`.

    Attributes:
        train: float32; a `DynamicBinarization` after `dynamic_binarization()`.
        test: float32, of the same shape but for N.
        train_labels: int64 `(N,)`, or None where there are none.
        test_labels: Likewise.
        levels: The number of levels the values lay on before they were scaled to [0, 1]; None for values
            taken as they are.
        name: The name or path that was loaded.
        binarization: How the values were made 0 or 1 here; "none" if they were not.

    Example:
        >>> from ppl_vae import data
        >>> digits = data.load("digits")
        >>> digits
        Data('digits': 1438 train and 359 test of shape (8, 8), levels 17, binarization 'none')
        >>> digits.thresholded().test.unique()
        tensor([0., 1.])
    """

    train: Tensor | DynamicBinarization
    test: Tensor
    train_labels: Tensor | None = None
    test_labels: Tensor | None = None
    levels: int | None = None
    name: str = ""
    binarization: str = "none"

    def __repr__(self) -> str:
        return (
            f"Data({self.name!r}: {len(self.train)} train and {len(self.test)} test of shape "
            f"{tuple(self.test.shape[1:])}, levels {self.levels}, binarization {self.binarization!r})"
        )

    def static_binarization(self, *, seed: int = 0) -> Data:
        """Both parts binarised once, as by `binarize`; `levels` becomes 2.

        Not the same bits as the fixed binarised MNIST of Larochelle and Murray (2011): for numbers to set
        beside published ones, load that file.

        Raises:
            ValueError: A value lies outside [0, 1], or the data are binarised already.

        Example:
            >>> from ppl_vae import data
            >>> data.load("digits").static_binarization(seed=1).binarization
            'static, seed 1'
        """
        grey, generator = self._grey_train(), torch.Generator().manual_seed(seed)
        test = draw(self.test, generator)  # first, so that dynamic_binarization draws the same
        train = draw(grey, generator)
        return replace(self, train=train, test=test, levels=2, binarization=f"static, seed {seed}")

    def dynamic_binarization(self, *, seed: int = 0) -> Data:
        """`train` drawn anew each time it is seen (`DynamicBinarization`), `test` once; `levels` becomes 2.

        The test bits are those of `static_binarization` with the same seed.

        Raises:
            ValueError: A value lies outside [0, 1], or the data are binarised already.

        Example:
            >>> from ppl_vae import data
            >>> digits = data.load("digits").dynamic_binarization()
            >>> (first,), (again,) = digits.train[:100], digits.train[:100]
            >>> torch.equal(first, again)
            False
        """
        train, test = DynamicBinarization(self._grey_train()), binarize(self.test, seed=seed)
        return replace(self, train=train, test=test, levels=2, binarization=f"dynamic, test seed {seed}")

    def thresholded(self, *, at: float = 0.5) -> Data:
        """Both parts set to 1 where they exceed `at`, else to 0; `levels` becomes 2.

        Raises:
            ValueError: A value lies outside [0, 1], `at` outside [0, 1), or the data are binarised already.

        Example:
            >>> from ppl_vae import data
            >>> data.load("digits").thresholded().binarization
            'threshold 0.5'
        """
        train, test = threshold(self._grey_train(), at=at), threshold(self.test, at=at)
        return replace(self, train=train, test=test, levels=2, binarization=f"threshold {at:g}")

    def _grey_train(self) -> Tensor:
        if isinstance(self.train, DynamicBinarization) or self.binarization != "none":
            raise ValueError(
                f"Expected data that are not binarised, but these are ({self.binarization}). Load them anew."
            )
        return self.train


def split(name: str, images: Tensor, labels: Tensor | None, levels: int | None, seed: int) -> Data:
    """80/20 by a seeded permutation, for sets without a split of their own."""
    if len(images) < 2:
        raise ValueError(f"Expected at least 2 data to split, but {name} has {len(images)}. Add some.")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    num_test = max(1, len(images) // 5)
    test, train = order[:num_test], order[num_test:]
    if labels is None:
        return Data(images[train], images[test], levels=levels, name=name)
    return Data(images[train], images[test], labels[train], labels[test], levels, name)


def image_tensor(array: np.ndarray, levels: int | None, source: str) -> Tensor:
    """float32, channels first, scaled to [0, 1] if on levels; refused by a sentence that names `source`."""
    if array.size == 0:
        raise ValueError(f"Expected some data, but {source} is empty: its shape is {array.shape}.")
    if array.ndim == 4 and array.shape[1] != 3 and array.shape[3] == 3:
        array = np.moveaxis(array, 3, 1)
    if not (array.ndim in (2, 3) or (array.ndim == 4 and array.shape[1] == 3)):
        raise ValueError(
            f"Expected shape (N, H, W), (N, H, W, 3), (N, 3, H, W) or (N, P) in {source}, got {array.shape}. "
            "Reshape it."
        )
    largest = np.float32(levels - 1 if levels else 1)
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite and is refused below
        images = torch.from_numpy(np.ascontiguousarray(array, np.float32) / largest)
    finite = images.isfinite().flatten(1).all(1)
    if not finite.all():
        raise ValueError(
            f"Expected finite values, but index {finite.tolist().index(False)} of {source} holds NaN, "
            "infinity or a number too large for float32. Remove or replace it."
        )
    return images


def label_tensor(labels: np.ndarray | None, num_data: int, source: str) -> Tensor | None:
    """int64; refused by a sentence that names `source`."""
    if labels is None:
        return None
    if labels.shape != (num_data,):
        raise ValueError(
            f"Expected {num_data} labels in {source}, one for each datum, got {labels.size} in shape "
            f"{labels.shape}. Check that the two belong together."
        )
    if labels.dtype.kind not in "bui":
        raise ValueError(f"Expected integers in {source}, got {labels.dtype}. Number the classes.")
    return torch.from_numpy(labels.astype(np.int64))
