"""Arrays that are larger than memory, left in their file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ppl_vae.data.dataset import unit_scale
from ppl_vae.data.scale import Scale


class MemoryMapped(Dataset[tuple[Tensor, ...]]):
    """The rows of an .npy file, read from it when they are asked for, and never all at once.

    The file may be larger than memory. `fit` and `importance_sampling` take it in the place of a tensor, and so does a
    `DataLoader`, with as many workers as one likes. `dataset[index]` is a tuple, of the rows first, for an integer, a
    slice or a whole tensor of indices. As from `data.load`, rows are float32 with channels first, and levels are scaled
    to [0, 1] as level / (L − 1); on the disk they stay bytes. `fit` reads a batch while the step before it runs.

    Args:
        path: of an array `(N, H, W)`, `(N, H, W, 3)`, `(N, 3, H, W)` or `(N, P)`, as `numpy.save` writes it.
        *further: tensors with one row per datum, such as labels, which follow the rows in each tuple.
        levels: L, how many values a data dimension can take; by default 256 for uint8 and 2 for booleans. Say 2 of
            zeros and ones that are stored as bytes: the file is not searched for it. None are known of other types.
        device: where rows are put; copied from pinned memory to a CUDA device, without waiting for it.

    Attributes:
        scale: what the values are, for `bits_per_dim`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: for a file that is damaged, empty or no array of numbers; for further tensors of another length;
            and, when they are read, for rows with numbers that are not finite or beyond the levels.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "images.npy")
        ...     np.save(path, np.array([[0, 255], [51, 102], [255, 0]], dtype=np.uint8))
        ...     images = MemoryMapped(path)
        ...     len(images), images[torch.tensor([2, 1])]
        (3, (tensor([[1.0000, 0.0000],
                [0.2000, 0.4000]]),))
    """

    def __init__(
        self,
        path: str | Path,
        *further: Tensor,
        levels: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.path, self.further, self.device = Path(path).expanduser().absolute(), further, torch.device(device)
        self.rows = _mapped(self.path)
        known = {"uint8": 256, "bool": 2}.get(self.rows.dtype.name)
        if levels is not None and (known is None or not 2 <= levels <= 256):
            raise ValueError(
                f"levels are 2 to 256, of bytes; got levels={levels!r} for the {self.rows.dtype.name} of {self.path}. "
                "Leave levels out, or save the array as uint8."
            )
        self.levels = levels or known
        for tensor in further:
            if len(tensor) != len(self):
                raise ValueError(
                    f"Every tensor must have one row per datum; got {len(tensor)} rows for the {len(self)} of {path}."
                )

    @property
    def scale(self) -> Scale:
        return unit_scale(self.levels)

    def __repr__(self) -> str:
        return f"MemoryMapped({str(self.path)!r}: {self.rows.dtype.name} {self.rows.shape}, {self.scale})"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | slice | Tensor) -> tuple[Tensor, ...]:
        places = np.asarray(index) if isinstance(index, Tensor) else index
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite and is refused below
            found = torch.from_numpy(np.array(self.rows[places], self.rows.dtype if self.levels else np.float32))
        self._check(found, index)
        if self.rows.ndim == 4 and self.rows.shape[1] != 3:
            found = found.movedim(-1, -3)
        if self.device.type == "cuda":
            found = found.pin_memory().to(self.device, non_blocking=True)
        x = found.float().div_(self.levels - 1) if self.levels else found
        return x.contiguous(), *(tensor[index].to(self.device, non_blocking=True) for tensor in self.further)

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, ...]]:
        """All rows of a batch in one reading, for a `DataLoader`."""
        return list(zip(*self[torch.tensor(indices)], strict=True))

    def __getstate__(self) -> dict[str, Any]:
        """Without the rows: a worker process opens the file again."""
        return {**self.__dict__, "rows": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, rows=_mapped(state["path"]))

    def _check(self, found: Tensor, index: int | slice | Tensor) -> None:
        wrong = ~found.isfinite() if self.levels is None else found >= self.levels if self.levels < 256 else None
        if wrong is not None and wrong.any():
            bad = wrong if isinstance(index, int) else wrong.flatten(1).any(1)
            where = index if isinstance(index, int) else torch.arange(len(self))[index][bad][0].item()
            rule = "finite numbers that float32 holds" if self.levels is None else f"levels from 0 to {self.levels - 1}"
            raise ValueError(
                f"Expected {rule}; row {where} of {self.path} holds {found[wrong][0].item()}. Remove or replace it."
            )


def _mapped(path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}. Check the path.")
    try:
        rows = np.load(path, mmap_mode="r")
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(
            f"Expected {path} to be a NumPy file (.npy) of numbers, but it cannot be mapped ({error}). Save it anew "
            "with numpy.save."
        ) from error
    if not isinstance(rows, np.ndarray):
        rows.close()
        raise ValueError(f"Expected one array in {path}, but it is an archive. Save the array alone, with numpy.save.")
    if rows.dtype.kind not in "buif" or rows.size == 0:
        raise ValueError(f"Expected an array of numbers in {path}, got {rows.dtype} of shape {rows.shape}.")
    if not (rows.ndim in (2, 3) or (rows.ndim == 4 and 3 in (rows.shape[1], rows.shape[3]))):
        raise ValueError(
            f"Expected shape (N, H, W), (N, H, W, 3), (N, 3, H, W) or (N, P) in {path}, got {rows.shape}. Reshape it."
        )
    return rows
