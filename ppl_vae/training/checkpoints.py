"""A run of `fit` between two epochs, on disk: enough to go on as if it had never stopped."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppl_vae import files, processes
from ppl_vae.batches import Batches
from ppl_vae.training.history import History
from ppl_vae.training.steps import Trained

SECONDS = 10.0  # between two writings at least: with short epochs the disk would take longer than the training


@dataclass
class Run:
    """All that `fit` changes as it goes.

    Attributes:
        trained: the pair, its parameters and buffers, and its optimiser's moments.
        history: of whole epochs.
        best: the values of parameters and buffers where validation was lowest.
        best_loss: on the validation data, there.
        waited: how many epochs ago that was.
    """

    trained: Trained
    history: History = field(default_factory=History)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_loss: float = inf
    waited: int = 0

    def no_better_for(self, patience: int) -> bool:
        """Whether the newest validation loss, and so many before it, are no better than the best; keeps the best."""
        self.waited += 1
        if self.history.validation[-1] < self.best_loss:
            self.best, self.best_loss, self.waited = self.trained.copy(), self.history.validation[-1], 0
        return self.waited == patience

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """What is kept of a run, by kind and name."""
        moments = {name: self.trained.optimizer.state.get(p, {}) for name, p in self.trained.parameters.items()}
        return {
            "parameter": self.trained.parameters,
            "buffer": self.trained.buffers(),
            "frozen parameter": self.trained.frozen(),
            "best": self.best,
            "moment": {f"{key} {name}": value for name, state in moments.items() for key, value in state.items()},
            "random state": _random_states(),
        }

    def restore(self, kept: dict[str, dict[str, Tensor]]) -> None:
        """Sets all of it."""
        with torch.no_grad():
            for kind in ("parameter", "buffer", "frozen parameter"):
                for name, tensor in self.tensors()[kind].items():
                    tensor.copy_(kept[kind][name])
        states: dict[int, dict[str, Tensor]] = defaultdict(dict)
        place = {name: index for index, name in enumerate(self.trained.parameters)}
        for key_and_name, value in kept["moment"].items():
            key, name = key_and_name.split(" ", 1)
            states[place[name]][key] = value
        self.trained.optimizer.load_state_dict({**self.trained.optimizer.state_dict(), "state": states})
        self.best = kept["best"]
        self.trained.last_good = self.trained.copy()
        for device, state in kept["random state"].items() if processes.is_first() else ():
            torch.set_rng_state(state) if device == "cpu" else torch.cuda.set_rng_state(state, device)


def _random_states() -> dict[str, Tensor]:
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), **{f"cuda:{i}": torch.cuda.get_rng_state(i) for i in devices}}


class Checkpoint:
    """The file of one run in a folder, or nothing at all for the folder None.

    Args:
        folder: where the file is.
        settings: what a run that goes on must share with the one that was stopped, by name.
        resume: whether a file that is there is meant.

    Attributes:
        found: the tensors of the file by kind and name, and its record; None where there is none.

    Raises:
        FileExistsError: for a file that is there without `resume`.
        ValueError: for `resume` without a folder; for a file that is corrupt, was not written by `fit`, or is of a run
            with other settings.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, settings: dict[str, Any], *, resume: bool) -> None:
        if folder is None and resume:
            raise ValueError("There is nothing to resume from: name the folder of the run, checkpoint='runs/a'.")
        self.path = None if folder is None else Path(folder).expanduser() / "checkpoint.safetensors"
        self.settings = settings
        self.found = self._read(self.path, resume) if self.path is not None and self.path.exists() else None
        self.written = time.monotonic()
        self.unwritten: tuple[dict[str, Tensor], dict[str, str]] | None = None

    @property
    def epochs(self) -> int:
        """How many are behind it."""
        return 0 if self.found is None else len(self.found[1]["history"]["loss"])

    def __str__(self) -> str:
        return f"The checkpoint {self.path}"

    def keep(self, run: Run) -> None:
        """Copies the run as it is after an epoch, and writes the copy unless another was written just now.

        Only the first of several processes does. The random numbers of the others start anew in each epoch.
        """
        if self.path is None or not processes.is_first():
            return
        record = {
            "settings": self.settings,
            "history": asdict(run.history),
            "best_loss": run.best_loss,
            "waited": run.waited,
        }
        copies = {f"{kind}: {name}": t.detach().clone() for kind, ts in run.tensors().items() for name, t in ts.items()}
        self.unwritten = copies, {"run": json.dumps(record, default=int)}
        if time.monotonic() - self.written >= SECONDS:
            self.write()

    def write(self) -> None:
        """Writes the newest copy, if it is not on the disk yet."""
        if self.path is not None and self.unwritten is not None:
            files.write_tensors(self.path, *self.unwritten)
            self.unwritten, self.written = None, time.monotonic()

    def restore(self, run: Run, batches: Batches) -> None:
        """Puts a run that has not begun where the one in the file was, if there is a file.

        Raises:
            ValueError: for a file of another pair.
        """
        if self.found is None:
            return
        kept, record = self.found
        for kind in ("parameter", "buffer", "frozen parameter"):
            self._check(kind, kept[kind], run.tensors()[kind])
        run.trained.warm_up(batches)
        run.restore(kept)
        run.history = History(**record["history"])
        run.best_loss, run.waited = record["best_loss"], record["waited"]

    def _read(self, path: Path, resume: bool) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        if not resume:
            raise FileExistsError(
                f"{self} is of an earlier run. Go on from it with resume=True, or name another folder for a new run."
            )
        tensors, metadata = files.read_tensors(path)
        if "run" not in metadata:
            raise ValueError(f"{self} was not written by fit. Name another folder.")
        record = json.loads(metadata["run"])
        for name, value in self.settings.items():
            if record["settings"][name] != value:
                raise ValueError(
                    f"{self} is of a run with {name} = {record['settings'][name]}; now it is {value}. Go on with the "
                    "same, or name another folder for a new run."
                )
        kept: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for kind_and_name, tensor in tensors.items():
            kind, name = kind_and_name.split(": ", 1)
            kept[kind][name] = tensor
        return kept, record

    def _check(self, kind: str, kept: dict[str, Tensor], present: dict[str, Tensor]) -> None:
        for name in sorted(kept.keys() | present.keys()):
            there, here = (_described(tensors[name]) if name in tensors else "missing" for tensors in (kept, present))
            if there != here:
                raise ValueError(
                    f"{self} is of another pair: the {kind} '{name}' is {there} there and {here} here. Build the pair "
                    "as it was built, or name another folder for a new run."
                )


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
