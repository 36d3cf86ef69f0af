"""One row of a comparison: a trained program with all that is known of it, and the folder that keeps it."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppl_vae import files, likelihoods, storage
from ppl_vae.data import Data
from ppl_vae.diagnostics import Diagnostics
from ppl_vae.evidence import Evidence
from ppl_vae.training import History
from ppl_vae.vae import VAE

# Of a Pareto k above which log p(x) is too low by an unknown amount, and the share of the data that may have one.
LIMIT_K, MOST_BAD = 0.7, 0.05


@dataclass(frozen=True, eq=False)
class Row:
    """A likelihood, the program that was trained with it, and what came of it.

    Attributes:
        name: in the tables.
        vae: the trained program.
        data: what it was trained on and scored on, on the scale of its likelihood.
        evidence: log p(x) of the test data.
        diagnostics: the parts of the ELBO of the test data, and how the latents are used.
        transform: where the test data lie among draws of p(x given z), `(N, D)`; uniform if the model is right.
        history: of training.
        seconds: of training and scoring.
    """

    name: str
    vae: VAE
    data: Data
    evidence: Evidence
    diagnostics: Diagnostics
    transform: Tensor
    history: History
    seconds: float

    @property
    def without_bits(self) -> str | None:
        """Why this row has no bits per dimension; None if it has."""
        return likelihoods.without_bits(self.vae.likelihood, self.data.scale)

    @cached_property
    def bits(self) -> Tensor | None:
        """Bits per dimension of the test data's levels, `(N,)`; of a density an upper bound, in the mean."""
        if self.without_bits:
            return None
        x, likelihood = self.data.test, self.vae.likelihood
        return likelihoods.bits_per_dim(self.evidence.log_px, likelihood, x, scale=self.data.scale)

    @property
    def is_density(self) -> bool:
        """Whether its log p(x) is that of a density, whose bits are an upper bound."""
        measure = self.vae.likelihood.measure
        return measure.levels is None and measure != likelihoods.Poisson.measure

    @property
    def share_of_good_k(self) -> float:
        """The share of the test data whose Pareto k is below 0.7."""
        return (self.evidence.pareto_k < LIMIT_K).double().mean().item()

    @property
    def is_flagged(self) -> bool:
        """Whether log p(x) is too low by an unknown amount for more than 5 % of the test data."""
        return self.share_of_good_k < 1 - MOST_BAD


def configuration(vae: VAE, data: Data, **options: Any) -> dict[str, Any]:
    """All that a row depends on, as JSON: how the program is built and starts, the data, and how it is trained."""
    train = data.train if isinstance(data.train, Tensor) else data.train.tensors[0]
    written = {
        "program": storage.described(vae),
        "initial weights": _digest(*vae.state_dict().values()),
        "data": {
            "name": data.name,
            "scale": repr(data.scale),
            "binarization": data.binarization,
            "dequantization": data.dequantization,
            "train and test": _digest(train, data.test),
        },
        **options,
    }
    return json.loads(json.dumps(written))


def folder_of(name: str) -> str:
    """A name as that of a folder.

    Example:
        >>> folder_of("Gaussian, σ = 0.1")
        'gaussian-σ-0-1'
    """
    return re.sub(r"[\W_]+", "-", name.lower()).strip("-") or "row"


def write(row: Row, folder: Path, asked: dict[str, Any]) -> None:
    """Writes a row, its numbers last: a folder without them is not finished."""
    storage.save(row.vae, folder / "weights.safetensors")
    tensors, rest = {"transform": row.transform.float()}, {}
    for part in ("evidence", "diagnostics"):
        found, rest[part] = _packed(getattr(row, part))
        tensors |= {f"{part}/{name}": tensor for name, tensor in found.items()}
    files.write_tensors(folder / "row.safetensors", tensors)
    numbers = {"name": row.name, "configuration": asked, "history": asdict(row.history), "seconds": row.seconds}
    files.write_json(folder / "row.json", {**numbers, **rest})


def is_finished(folder: Path, asked: dict[str, Any]) -> bool:
    """Whether a row is there, after checking that it is of this configuration.

    Raises:
        ValueError: when it is of another; the sentence names what differs.
    """
    if not (folder / "row.json").exists():
        return False
    recorded: Any = files.read_json(folder / "row.json")
    made = recorded.get("configuration", {})
    if made == asked:
        return True
    different = [name for name in {**made, **asked} if made.get(name) != asked.get(name)]
    simple = {name for name in different if not isinstance(asked.get(name), dict) and name != "initial weights"}
    said = [f"{name} {made.get(name)!r}, now {asked.get(name)!r}" if name in simple else name for name in different]
    raise ValueError(
        f"{folder} holds a row of another configuration ({'; '.join(said)}). Name another folder, or delete that one, "
        "and the row will be trained anew."
    )


def read(name: str, folder: Path, vae: VAE, data: Data) -> Row:
    """The row that `write` wrote, its weights loaded into a program that was built alike."""
    recorded: Any = files.read_json(folder / "row.json")
    tensors, _ = files.read_tensors(folder / "row.safetensors")

    def part(cls: Any, name: str) -> Any:
        prefix = f"{name}/"
        found = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        return _unpacked(cls, found, recorded[name])

    return Row(
        name,
        storage.load(folder / "weights.safetensors", into=vae),
        data,
        part(Evidence, "evidence"),
        part(Diagnostics, "diagnostics"),
        tensors["transform"].double(),
        History(**recorded["history"]),
        recorded["seconds"],
    )


def _packed(record: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a record, those in a dictionary as "field/key", and its other fields."""
    tensors, rest = {}, {}
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            tensors[field.name] = value
        elif isinstance(value, dict):
            tensors |= {f"{field.name}/{key}": tensor for key, tensor in value.items()}
        else:
            rest[field.name] = value
    return tensors, rest


def _unpacked(cls: Any, tensors: dict[str, Tensor], rest: dict[str, Any]) -> Any:
    """The inverse of `_packed`."""
    values: dict[str, Any] = dict(rest)
    for name, tensor in tensors.items():
        field, _, key = name.partition("/")
        if key:
            values.setdefault(field, {})[key] = tensor
        else:
            values[field] = tensor
    return cls(**values)


def _digest(*tensors: Tensor) -> str:
    """The sha256 of values, with their types and shapes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
