"""Atomic, checksummed writing and reading: a file is the old one or the new one, never half of each.

Tensors go into safetensors files (no pickle: reading one never runs code) with the sha256 of their content
beside them, because a flipped byte in a weight loads silently otherwise.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

_CHECKSUM = "sha256"


def write_bytes_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file that appears under its name only when it is complete and on the disk.

    The bytes go to `.<name>.tmp-<pid>` in the same folder, which then takes the place of the old file in one
    step. A failure leaves the old file as it was; a kill may leave the temporary one beside it.

    Args:
        path: where to write; missing folders are created, `~` is expanded, links are followed.
        data: the whole content.

    Raises:
        IsADirectoryError: `path` is a folder.
        ValueError: `path` is a device or a pipe.
        OSError: the disk is full, the folder cannot be written to, ...

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_bytes_atomically(f"{folder}/new/a.txt", b"hello")
        ...     Path(f"{folder}/new/a.txt").read_bytes()
        b'hello'
    """
    path = Path(path).expanduser().resolve()
    if path.is_dir():
        raise IsADirectoryError(f"Expected a file name to write to, got the folder {path}. Name a file inside it.")
    if path.exists() and not path.is_file():
        raise ValueError(f"Expected a file name to write to, but {path} is a device or a pipe. Name a file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], obj: object) -> None:
    """Writes `obj` as JSON for people to read and diff: sorted keys, two spaces, UTF-8.

    Not-a-number and the infinities are written as Python writes them (`NaN`, `Infinity`), and come back.

    Raises:
        TypeError: `obj` holds something JSON has no form for; the old file stays.
        OSError: as for `write_bytes_atomically`.
    """
    text = json.dumps(obj, sort_keys=True, indent=2, ensure_ascii=False)
    write_bytes_atomically(path, f"{text}\n".encode())


def read_json(path: str | os.PathLike[str]) -> object:
    """Reads what `write_json` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not JSON in UTF-8; the message says where it breaks off.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_json(f"{folder}/a.json", {"latent_dim": 20})
        ...     read_json(f"{folder}/a.json")
        {'latent_dim': 20}
    """
    data = _read_bytes(path)
    try:
        return json.loads(data.decode())
    except ValueError as error:
        raise ValueError(f"The file {path} is not valid JSON: {error}. Copy it again or write it anew.") from error


def write_tensors(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Writes named tensors and named strings to one safetensors file, with the sha256 of both.

    Args:
        path: where to write; replaced in one step, see `write_bytes_atomically`.
        tensors: any shapes, devices and layouts; tensors that share memory are written once each.
        metadata: strings to keep beside them; any name but "sha256", which is the checksum's.

    Raises:
        TypeError: a tensor or a string is something else.
        ValueError: a name is taken by the format, or a dtype or layout has no form in it.
        OSError: as for `write_bytes_atomically`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_tensors(f"{folder}/a.safetensors", {"weight": torch.ones(2)}, {"version": "1"})
        ...     read_tensors(f"{folder}/a.safetensors")
        ({'weight': tensor([1., 1.])}, {'version': '1'})
    """
    metadata = dict(metadata or {})
    _check_entries(tensors, metadata)
    # safetensors refuses tensors that share memory; a contiguous copy of each shares none.
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    checksum = _checksum(copies, metadata)
    try:
        data = safetensors.torch.save(copies, {**metadata, _CHECKSUM: checksum})
    except (KeyError, SafetensorError) as error:
        dtypes = sorted({str(tensor.dtype) for tensor in copies.values()})
        raise ValueError(
            f"Safetensors has no form for one of the dtypes {dtypes}: {error}. Convert that tensor first."
        ) from error
    write_bytes_atomically(path, data)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads what `write_tensors` wrote, onto the CPU, and checks every name, dtype, shape, byte and string.

    Returns:
        The tensors and the metadata, as they were given to `write_tensors`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is cut off, was changed, or was not written by `write_tensors`.
    """
    data = _read_bytes(path)
    try:
        tensors = safetensors.torch.load(data)
        header_length = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + header_length]).get("__metadata__", {})
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"The file {path} is corrupt or no safetensors file: {error}. Copy it again or retrain."
        ) from error
    expected, got = metadata.pop(_CHECKSUM, "none"), _checksum(tensors, metadata)
    if expected != got:
        raise ValueError(
            f"The file {path} is corrupt or was changed after it was written: "
            f"expected {_CHECKSUM} {expected}, got {got}. Copy it again or retrain."
        )
    return tensors, metadata


def _read_bytes(path: str | os.PathLike[str]) -> bytes:
    path = Path(path).expanduser()
    if not path.is_file():
        what = "a folder" if path.is_dir() else "nothing"
        raise FileNotFoundError(f"Expected a file at {path}, found {what} there. Check the path.")
    return path.read_bytes()


def _check_entries(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"Expected a tensor under {name!r}, got {type(tensor).__name__}. Convert it first.")
        if tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(
                f"Expected a dense tensor with values under {name!r}, got {tensor.layout} on {tensor.device}."
            )
    for name, text in metadata.items():
        if not isinstance(text, str):
            raise TypeError(f"Expected a string as metadata {name!r}, got {type(text).__name__}. Use json.dumps.")
    if "__metadata__" in tensors or _CHECKSUM in metadata:
        raise ValueError(
            f'A tensor named "__metadata__" or metadata named "{_CHECKSUM}" would collide with the '
            "file's own. Give it another name."
        )


def _checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    """The sha256 of content, not of layout: the same whatever the order in which a file holds its entries."""
    names = sorted(tensors)
    header = [metadata, [(name, str(tensors[name].dtype), list(tensors[name].shape)) for name in names]]
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in names:
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
