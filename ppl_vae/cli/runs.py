"""A run: what was asked for, the program and the data that came of it, and the folder that keeps them."""

from __future__ import annotations

import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import ppl_vae as pv
from ppl_vae import files, plots
from ppl_vae.data import Data
from ppl_vae.data.named import IDX_SETS
from ppl_vae.likelihoods import Likelihood
from ppl_vae.reporting import write_picture
from ppl_vae.training import History

# The words of the command line, and what they stand for.
LIKELIHOODS: dict[str, Callable[[], Likelihood]] = {
    "bernoulli": pv.likelihoods.Bernoulli,
    "continuous-bernoulli": pv.likelihoods.ContinuousBernoulli,
    "gaussian": pv.likelihoods.Gaussian,
    "gaussian-per-pixel": partial(pv.likelihoods.Gaussian, per_pixel=True),
}
BINARIZATIONS: dict[str, Callable[[Data, int], Data]] = {
    "none": lambda data, seed: data,
    "static": lambda data, seed: data.static_binarization(seed=seed),
    "dynamic": lambda data, seed: data.dynamic_binarization(seed=seed),
    "threshold": lambda data, seed: data.thresholded(),
}
SOURCES = {
    "digits": "scikit-learn's copy of the UCI handwritten digits; always there",
    "cifar10": "https://www.cs.toronto.edu/~kriz/cifar.html, through torchvision",
    **{name: f"the four IDX files of {folder}, as torchvision keeps them" for name, folder in IDX_SETS.items()},
}


@dataclass(frozen=True)
class Configuration:
    """Everything that a run depends on, as `run.json` records it."""

    data: str
    likelihood: str
    binarization: str
    latent_dim: int
    epochs: int
    batch_size: int
    learning_rate: float
    seed: int
    root: str | None = None
    network: str = "mlp"
    hidden_dims: list[int] | None = None
    final_learning_rate: float | None = None
    patience: int | None = None
    validation: int = 0


@dataclass(frozen=True)
class Run:
    """A trained program with the data it was trained on, binarised as it saw them."""

    configuration: Configuration
    vae: pv.VAE
    data: Data
    history: History


def recorded_source(data: str) -> str:
    """A name as it is and a path made absolute, so that a run can be evaluated from another folder."""
    path = Path(data).expanduser()
    return str(path.absolute()) if data not in SOURCES and path.exists() else data


def widths(text: str) -> list[int] | None:
    """Numbers with commas between them; None for an empty text."""
    try:
        return [int(width) for width in text.split(",")] if text else None
    except ValueError:
        raise ValueError(f"Expected widths of hidden layers such as 400,400; got {text!r}.") from None


def train(configuration: Configuration, *, download: bool = False, compile: bool = False) -> Run:
    """Loads the data, builds the VAE and fits it. Interrupted before the first step, there is no run."""
    c = configuration
    if download and pv.processes.world_size() > 1:  # the first process alone downloads, and the others find it there
        pv.processes.from_first(lambda: pv.data.load(c.data, root=c.root, download=True).name)
    grey = pv.data.load(c.data, root=c.root, download=download)
    data = BINARIZATIONS[c.binarization](grey, c.seed)
    if c.likelihood == "bernoulli" and data.levels not in (None, 2):
        raise ValueError(
            f"A Bernoulli likelihood scores data in {{0, 1}}, and {c.data} has {data.levels} grey levels. Say how they "
            "become 0 or 1 with --binarization static, dynamic or threshold (static_binarization and "
            "dynamic_binarization of the data), or choose --likelihood continuous-bernoulli (ContinuousBernoulli) or "
            "gaussian. The cross-entropy of grey values is no log p(x); in Python it is `likelihoods.bce_score`."
        )
    fitted = BINARIZATIONS[c.binarization](_held_out(grey, c.validation, c.seed), c.seed) if c.validation else data
    with pv.isolation.seeded(c.seed):
        vae = _built(c, tuple(data.test.shape[1:]))
    history = pv.fit(
        vae.model,
        vae.guide,
        fitted.train,
        epochs=c.epochs,
        batch_size=c.batch_size,
        learning_rate=_learning_rate(c.learning_rate, c.final_learning_rate),
        validation=fitted.test if c.validation else None,
        patience=c.patience,
        seed=c.seed,
        compile=compile,
        progress=sys.stderr.isatty(),
    )
    if history.stopped == "interrupted" and not history.loss:
        raise KeyboardInterrupt
    return Run(c, vae, data, history)


def _held_out(data: Data, count: int, seed: int) -> Data:
    """The training data alone, with `count` of them in the place of the test data."""
    rows = torch.as_tensor(data.train)
    if not 0 < count < len(rows):
        raise ValueError(
            f"Expected to hold out from 1 to {len(rows) - 1} of the {len(rows)} training data; got {count}."
        )
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return replace(data, train=rows[order[count:]], test=rows[order[:count]], train_labels=None, test_labels=None)


def _built(c: Configuration, shape: tuple[int, ...]) -> pv.VAE:
    prior, posterior = pv.priors.StandardNormal(c.latent_dim), pv.posteriors.DiagonalNormal()
    likelihood, num_features = LIKELIHOODS[c.likelihood](), posterior.num_features(c.latent_dim)
    encoder: torch.nn.Module
    decoder: torch.nn.Module
    if c.network == "conv":
        if c.hidden_dims is not None:
            raise ValueError("Hidden widths are those of an mlp. Leave them out, or choose the network mlp.")
        encoder = pv.networks.ConvEncoder(shape, num_features)
        decoder = pv.networks.ConvDecoder(c.latent_dim, shape, num_parameters=likelihood.num_parameters)
    else:
        mlp = pv.networks.MLP if c.hidden_dims is None else partial(pv.networks.MLP, hidden_dims=c.hidden_dims)
        encoder = mlp(shape, num_features)
        decoder = mlp(c.latent_dim, (likelihood.num_parameters * shape[0], *shape[1:]))
    return pv.VAE(
        shape,
        c.latent_dim,
        likelihood=likelihood,
        prior=prior,
        posterior=posterior,
        encoder=encoder,
        decoder=decoder,
    )


def _learning_rate(first: float, last: float | None) -> float | Callable[[float], float]:
    if last is None:
        return first
    if not (first > 0 and last > 0):
        raise ValueError(f"A learning rate that decays must stay positive; got {first} and {last}.")
    return lambda t: first * (last / first) ** t


@contextmanager
def one_thread() -> Iterator[None]:
    """These networks are too small to share between threads, which would only wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def new_folder(path: Path, *, overwrite: bool, mark: str = "run.json") -> Iterator[Path]:
    """A folder to fill, which appears under its name only when it is complete; a failure leaves nothing behind.

    With `overwrite` it takes the place of an earlier one, told by the file `mark`: nothing else is ever deleted.
    """
    path = path.expanduser().resolve()  # what a link points to, not the link, is filled or replaced
    if path.exists() and not path.is_dir():
        raise ValueError(f"Expected a folder to write to, but {path} is a file or a device. Name another with --out.")
    if path.is_dir() and any(path.iterdir()):
        if not (path / mark).is_file():
            raise ValueError(f"The folder {path} holds something else than a run ({mark}). Name another with --out.")
        if not overwrite:
            raise ValueError(f"The folder {path} holds a run. Name another with --out, or replace it with --overwrite.")
    made = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as temporary:
            new, old = Path(temporary, "new"), Path(temporary, "old")
            new.mkdir()
            yield new
            if path.exists():
                path.rename(old)
            new.rename(path)
    except BaseException:
        with suppress(OSError):  # another program may have written there meanwhile
            for parent in made:
                parent.rmdir()
        raise


def write(run: Run, folder: Path, **more: object) -> None:
    """Writes weights and `run.json`."""
    pv.save(run.vae, folder / "weights.safetensors")
    versions = {name: version(name) for name in ("ppl-vae", "torch", "pyro-ppl", "numpy")}
    files.write_json(
        folder / "run.json",
        {
            "configuration": asdict(run.configuration),
            "versions": {"python": platform.python_version(), **versions},
            "training": asdict(run.history),
            **more,
        },
    )


def read(folder: Path) -> Run:
    """The run that `write` wrote, with its data loaded anew."""
    vae = _read_vae(folder)
    recorded: Any = files.read_json(folder / "run.json")
    try:
        configuration = Configuration(**recorded["configuration"])
        history, binarize = History(**recorded["training"]), BINARIZATIONS[configuration.binarization]
    except (KeyError, TypeError) as error:
        expected = ", ".join(field.name for field in fields(Configuration))
        raise ValueError(
            f"Expected the configuration ({expected}) and the training of a run in {folder / 'run.json'}, but it does "
            f"not hold them as this version writes them ({error}). Train the run anew."
        ) from error
    data = binarize(pv.data.load(configuration.data, root=configuration.root), configuration.seed)
    return Run(configuration, vae, data, history)


def _read_vae(folder: Path) -> pv.VAE:
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no run folder {folder.absolute()}. Make one with: ppl-vae train DATA")
    runs = sorted(path.parent.name for path in folder.glob("*/run.json"))
    if runs and not (folder / "run.json").exists():
        raise ValueError(f"{folder} holds the runs {' and '.join(runs)}. Name one of them, such as {folder / runs[0]}.")
    return pv.load(folder / "weights.safetensors")


def write_samples(folder: Path, out: Path, *, num_samples: int, seed: int) -> None:
    """Writes a picture of new images."""
    if num_samples < 1:
        raise ValueError(f"Expected at least one sample to draw; got {num_samples}.")
    vae = _read_vae(folder)
    write_picture(plots.image_grid(vae.sample(num_samples, seed=seed, mean=True)), out)


def description(name: str, root: Path | None, download: bool) -> list[str]:
    """What a data set holds, in lines."""
    data = pv.data.load(name, root=root, download=download)
    x = torch.cat([torch.as_tensor(data.train), data.test])
    labels = "none"
    if data.train_labels is not None and data.test_labels is not None:
        classes = torch.cat([data.train_labels, data.test_labels]).unique()
        labels = f"{len(classes)} classes, {classes.min()} to {classes.max()}"
    rows = {
        "data": data.name,
        "train, test": f"{len(data.train):,} and {len(data.test):,} data",
        "shape": " × ".join(map(str, data.test.shape[1:])),
        "levels": "none: values as they are" if data.levels is None else f"{data.levels}, scaled to [0, 1]",
        "values": f"{x.min():g} to {x.max():g}, mean {x.mean():.4f}",
        "labels": labels,
        "source": SOURCES.get(name, recorded_source(name)),
    }
    return [f"{key:<13}{value}" for key, value in rows.items()]
