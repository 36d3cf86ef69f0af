"""`Data`, and how arrays become one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from ppl_vae.data.binarization import DynamicBinarization, binarize, draw, threshold
from ppl_vae.data.dequantization import DynamicDequantization
from ppl_vae.data.scale import AsIs, Dequantized, Levels, Logit, Scale, Unit


@dataclass(frozen=True, eq=False, repr=False)
class Data:
    """A data set in two parts. Grey images are `(N, H, W)`, colour images `(N, 3, H, W)`, tables `(N, P)`.

    Attributes:
        train: float32; a `DynamicBinarization` or `DynamicDequantization` after the methods of these names.
        test: float32, of the same shape but for N.
        train_labels: int64 `(N,)`, or None where there are none.
        test_labels: Likewise.
        scale: What the values are: levels as they are (`Levels`) or on [0, 1] (`Unit`), `Dequantized`, `Logit`, or
            `AsIs`, numbers of which no levels are known. `bits_per_dim` asks for it.
        name: The name or path that was loaded.
        binarization: How the values were made 0 or 1 here; "none" if they were not.
        dequantization: How noise was added here; "none" if it was not.

    Example:
        >>> from ppl_vae import data
        >>> digits = data.load("digits")
        >>> digits
        Data('digits': 1438 train and 359 test of shape (8, 8), Unit(levels=17), binarization 'none')
        >>> digits.thresholded().test.unique()
        tensor([0., 1.])
    """

    train: Tensor | DynamicBinarization | DynamicDequantization
    test: Tensor
    train_labels: Tensor | None = None
    test_labels: Tensor | None = None
    scale: Scale = field(default_factory=AsIs)
    name: str = ""
    binarization: str = "none"
    dequantization: str = "none"

    def __repr__(self) -> str:
        noise = "" if self.dequantization == "none" else f", dequantization {self.dequantization!r}"
        return (
            f"Data({self.name!r}: {len(self.train)} train and {len(self.test)} test of shape "
            f"{tuple(self.test.shape[1:])}, {self.scale}, binarization {self.binarization!r}{noise})"
        )

    @property
    def levels(self) -> int | None:
        """How many values a data dimension could take, when loaded or after binarising; None if that is not known."""
        return self.scale.levels

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
        return replace(self, train=train, test=test, scale=Levels(2), binarization=f"static, seed {seed}")

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
        return replace(self, train=train, test=test, scale=Levels(2), binarization=f"dynamic, test seed {seed}")

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
        return replace(self, train=train, test=test, scale=Levels(2), binarization=f"threshold {at:g}")

    def as_levels(self) -> Data:
        """Both parts as whole numbers from 0 to L − 1, which likelihoods of levels score.

        Raises:
            ValueError: No levels are known, or noise was added.

        Example:
            >>> from ppl_vae import data
            >>> digits = data.load("digits").as_levels()
            >>> digits.test.max(), digits.scale
            (tensor(16.), Levels(levels=17))
        """
        if isinstance(self.scale, Levels):
            return self
        train, test, scale = self._levels()
        return replace(self, train=train, test=test, scale=scale)

    def static_dequantization(self, *, seed: int = 0) -> Data:
        """Both parts as v = (level + u) / L, with u uniform on (0, 1) drawn once, which densities score.

        Training on noise that never changes can learn it by heart; see `dynamic_dequantization`.

        Source: Theis, van den Oord and Bethge (2016), https://arxiv.org/abs/1511.01844.

        Raises:
            ValueError: No levels are known, or noise was added already.

        Example:
            >>> from ppl_vae import data
            >>> data.load("digits").static_dequantization(seed=1).dequantization
            'static, seed 1'
        """
        train, test, levels = self._levels()
        scale, generator = Dequantized(levels.levels), torch.Generator().manual_seed(seed)
        test = scale.draw(test, generator)  # first, so that dynamic_dequantization draws the same
        train = scale.draw(train, generator)
        return replace(self, train=train, test=test, scale=scale, dequantization=f"static, seed {seed}")

    def dynamic_dequantization(self, *, seed: int = 0) -> Data:
        """`train` with noise drawn anew each time it is seen (`DynamicDequantization`), `test` once.

        The test data are those of `static_dequantization` with the same seed; another seed says how much of a result
        is noise.

        Raises:
            ValueError: No levels are known, or noise was added already.

        Example:
            >>> from ppl_vae import data
            >>> digits = data.load("digits").dynamic_dequantization()
            >>> (first,), (again,) = digits.train[:100], digits.train[:100]
            >>> torch.equal(first, again), torch.equal(digits.scale.to_levels(first), digits.scale.to_levels(again))
            (False, True)
        """
        train, test, levels = self._levels()
        scale = Dequantized(levels.levels)
        test = scale.draw(test, torch.Generator().manual_seed(seed))
        return replace(
            self,
            train=DynamicDequantization(train, scale),
            test=test,
            scale=scale,
            dequantization=f"dynamic, test seed {seed}",
        )

    def logit_transform(self, *, margin: float = 1e-6) -> Data:
        """Dequantised data v as logit(margin + (1 − 2 margin) v), on the line; see `Logit`.

        Raises:
            ValueError: The data are not dequantised, or are logits already; a margin outside (0, ½).

        Example:
            >>> from ppl_vae import data
            >>> data.load("digits").dynamic_dequantization().logit_transform().scale
            Logit(levels=17, margin=1e-06)
        """
        if type(self.scale) is not Dequantized:
            raise ValueError(
                f"Expected dequantised data to take the logit of, but these are {self.scale.rule}. Call "
                "dynamic_dequantization() before."
            )
        scale, train = Logit(self.scale.levels, margin), self.train
        if isinstance(train, DynamicDequantization):
            train = DynamicDequantization(train.tensors[0], scale)
        elif isinstance(train, Tensor):
            train = scale.from_unit(train)
        return replace(self, train=train, test=scale.from_unit(self.test), scale=scale)

    def _levels(self) -> tuple[Tensor, Tensor, Levels]:
        """Both parts as levels, and their scale."""
        scale = self.scale
        if isinstance(scale, Levels):
            return self._fixed_train(), self.test, scale
        if isinstance(scale, Unit):
            return scale.to_levels(self._fixed_train()), scale.to_levels(self.test), Levels(scale.levels)
        raise ValueError(
            f"Expected levels, or levels on [0, 1], but these data are {scale.rule}. Load data of type uint8 anew."
        )

    def _fixed_train(self) -> Tensor:
        if isinstance(self.train, Tensor):
            return self.train
        raise ValueError(
            f"Expected training data that stay the same, but these are a {type(self.train).__name__}. Load them anew."
        )

    def _grey_train(self) -> Tensor:
        if self.binarization != "none" or self.dequantization != "none":
            done = self.binarization if self.dequantization == "none" else f"dequantised: {self.dequantization}"
            raise ValueError(f"Expected data that are not binarised, but these are ({done}). Load them anew.")
        return self._fixed_train()


def unit_scale(levels: int | None) -> Scale:
    """That of data divided by the largest of so many levels: zeros and ones are levels still."""
    if levels is None:
        return AsIs()
    return Levels(2) if levels == 2 else Unit(levels)


def split(name: str, images: Tensor, labels: Tensor | None, levels: int | None, seed: int) -> Data:
    """80/20 by a seeded permutation, for sets without a split of their own."""
    if len(images) < 2:
        raise ValueError(f"Expected at least 2 data to split, but {name} has {len(images)}. Add some.")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    num_test = max(1, len(images) // 5)
    test, train = order[:num_test], order[num_test:]
    if labels is None:
        return Data(images[train], images[test], scale=unit_scale(levels), name=name)
    return Data(images[train], images[test], labels[train], labels[test], unit_scale(levels), name)


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
