"""What the tests of several processes do, in one process or in two: `python many.py FOLDER` is one of two.

A check returns what it found. The tests compare what two processes found with each other, and with what one finds.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pairs import linear_gaussian, simulated
from pyro.infer import JitTrace_ELBO, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

import ppl_vae as pv
from ppl_vae import cli, files, processes
from ppl_vae.batches import Batches
from ppl_vae.training import sharing
from ppl_vae.training.steps import Trained

# 29 = 4 batches of 7 and one of 1: shares of 4 and 3, and of 1 and none.
NUM_DATA, BATCH, DATA_DIM, LATENT_DIM = 29, 7, 5, 3
Found = dict[str, Any]


class Fixed(dist.Normal):
    """A normal whose noise is given, so that one process and two draw the same."""

    def __init__(self, loc: Tensor, scale: Tensor, noise: Tensor) -> None:
        super().__init__(loc, scale, validate_args=False)
        self.noise = noise

    def expand(self, batch_shape: Any, _instance: Any = None) -> Fixed:
        return Fixed(*(t.expand(batch_shape) for t in (self.loc, self.scale, self.noise)))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return (self.loc + self.scale * self.noise).expand(self._extended_shape(sample_shape))


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def data() -> tuple[Tensor, Tensor]:
    """Data, and noise for each datum."""
    return drawn(NUM_DATA, DATA_DIM), drawn(NUM_DATA, LATENT_DIM + 1)[:, 1:].contiguous()


# Pairs of plain functions, with parameters that only Pyro's store knows.


def model(x: Tensor, noise: Tensor) -> None:
    w = pyro.param("w", lambda: torch.linspace(-1, 1, LATENT_DIM * DATA_DIM).double().reshape(LATENT_DIM, DATA_DIM))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(LATENT_DIM).double(), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(torch.sin(z) @ w, 0.7).to_event(1), obs=x)


def guide(x: Tensor, noise: Tensor) -> None:
    v = pyro.param("v", lambda: torch.linspace(1, -1, LATENT_DIM * DATA_DIM).double().reshape(DATA_DIM, LATENT_DIM))
    scale = pyro.param("scale", lambda: torch.tensor(0.4).double(), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        pyro.sample("z", Fixed(x @ v, scale.expand(len(x), LATENT_DIM), noise).to_event(1))


def with_global(subsampled: bool) -> tuple[Any, Any]:
    """A mean that all data have in common, with a prior: its KL counts once."""

    def plate(x: Tensor) -> Any:
        return pyro.plate("data", NUM_DATA, subsample_size=len(x)) if subsampled else pyro.plate("data", len(x))

    def model(x: Tensor, noise: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(torch.zeros(DATA_DIM).double(), 0.1).to_event(1))
        with plate(x):
            pyro.sample("x", dist.Normal(mean, 0.7).to_event(1), obs=x)

    def guide(x: Tensor, noise: Tensor) -> None:
        loc = pyro.param("loc", lambda: torch.linspace(1, 2, DATA_DIM).double())
        pyro.sample("mean", Fixed(loc, torch.full_like(loc, 0.3), torch.ones_like(loc)).to_event(1))

    return model, guide


def small_vae(seed: int) -> pv.VAE:
    torch.manual_seed(seed)
    decoder = nn.Sequential(nn.Linear(LATENT_DIM, 11), nn.BatchNorm1d(11), nn.ReLU(), nn.Linear(11, DATA_DIM))
    encoder = pv.networks.MLP(DATA_DIM, 2 * LATENT_DIM, hidden_dims=(13,))
    return pv.VAE(DATA_DIM, LATENT_DIM, encoder=encoder, decoder=decoder)


def bits() -> Tensor:
    """Binary data: all but two, because a BatchNorm cannot do with a share of one."""
    return (data()[0][:-2] > 0).float()


def stored() -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in pyro.get_param_store().items()}


# Checks


def training(folder: Path) -> Found:
    """Of networks that begin with other weights in each process, with and without the sum over processes."""
    found = {}
    for name, change in (("sync", contextlib.nullcontext()), ("no sync", mock.patch.object(processes, "_all_reduce"))):
        vae = small_vae(processes.rank())
        with change:
            history = pv.fit(
                vae.model, vae.guide, bits(), validation=bits(), epochs=3, batch_size=BATCH, progress=False
            )
        found[name] = vae.state_dict()
        found[f"{name} history"] = (history.loss, history.bound, history.validation)
    return found


def gradients(folder: Path) -> Found:
    """What plain gradient descent does to the parameters is the gradient.

    The mutants count what is global once for each process, and give every share the same weight.
    """
    cases = {
        "one plate": (model, guide, BATCH, Trace_ELBO()),
        "KL in closed form": (model, guide, BATCH, pv.AnalyticKL()),
        "global, subsampled": (*with_global(True), BATCH, Trace_ELBO()),
        "global": (*with_global(False), NUM_DATA, Trace_ELBO()),
        "global, mutant": (*with_global(False), NUM_DATA, Trace_ELBO()),
        "one plate, mutant": (model, guide, BATCH, Trace_ELBO()),
    }
    summed = sharing.summed
    mutants = {
        "global, mutant": mock.patch.object(sharing, "counted_once", return_value=contextlib.nullcontext()),
        "one plate, mutant": mock.patch.object(sharing, "summed", lambda *args: summed(*args[:2], min(args[2], 1))),
    }
    found = {}
    for name, (model_, guide_, batch_size, objective) in cases.items():
        pyro.clear_param_store()
        batches = Batches(data(), batch_size)
        with mutants.get(name, contextlib.nullcontext()):
            trained = Trained(model_, guide_, objective, batches, compile=False)
            trained.optimizer = torch.optim.SGD(trained.parameters.values(), lr=1e-2)  # which sees a gradient's scale
            pyro.set_rng_seed(1)
            terms = [trained.step(b, "a step") for _ in range(2) for b in batches]
        found[name] = {**stored(), "terms": torch.tensor(terms, dtype=torch.float64)}
    return found


def fitting(folder: Path) -> Found:
    """The noise being given, `fit` is the same whatever the number of processes.

    So are a clipped gradient, the epoch in which steps that are too long are stopped, and the best weights before it.
    """
    found = {}
    for name, options in {
        "clipped": {"epochs": 3, "clip_norm": 1.0},
        "stopped early": {"epochs": 40, "learning_rate": 0.2, "patience": 2},
    }.items():
        pyro.clear_param_store()
        history = pv.fit(model, guide, *data(), validation=data(), batch_size=BATCH, progress=False, **options)
        found[name] = {
            **stored(),
            "history": torch.tensor([history.loss, history.bound, history.validation]),
            "stopped": history.stopped,
        }
    return found


def noise(folder: Path) -> Found:
    torch.manual_seed(1)
    processes.part_ways()
    return {"noise": torch.rand(3)}


class ItemByItem(Dataset[Tensor]):
    """Data that cannot be had several at a time."""

    def __len__(self) -> int:
        return NUM_DATA

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(index)


def sources(folder: Path) -> Found:
    """Which data this process gets of two epochs, and of whole batches, from sources of every kind."""
    items = ItemByItem()
    path = folder / f"rows {os.getpid()}.npy"
    np.save(path, np.arange(NUM_DATA, dtype=np.float32)[:, None])
    rows: dict[str, Any] = {
        "tensors": torch.arange(NUM_DATA),
        "tensor dataset": TensorDataset(torch.arange(NUM_DATA)),
        "dataset": items,
        "file": pv.data.MemoryMapped(path),
        "loader": DataLoader(items, BATCH, shuffle=True),
    }
    if processes.world_size() > 1:
        rows["distributed"] = DataLoader(items, 3, sampler=DistributedSampler(items))
    found = {}
    for name, source in rows.items():
        batches = Batches((source,), BATCH)
        torch.manual_seed(processes.rank())
        epochs = [[x.flatten().tolist() for (x,) in batches] for _ in range(2)]
        found[name] = {"epochs": epochs, "dealt": {n: x.flatten().tolist() for n, (x,) in batches.dealt()}}
    return found


def evidence(folder: Path) -> Found:
    """Every number of every estimate: of three blocks, of one, of less data than processes; some NaN, some infinite."""
    lg = linear_gaussian()
    wrong = lg.perturbed_guide(spread=1.4)
    found: Found = {}
    for num_data, num_samples in ((37, 1000), (11, 20), (1, 5), (37, 1)):
        x = simulated(lg, num_data)
        estimate = pv.importance_sampling(lg.model, wrong, x, num_samples=num_samples, max_rows=512)
        found[f"importance {num_data} {num_samples}"] = vars(estimate)
    x = simulated(lg, 37)
    chains = {"num_chains": 64, "num_temperatures": 3, "num_leapfrog": 2}
    found["annealed"] = vars(pv.annealed_importance_sampling(lg.model, wrong, x, **chains))
    found["sandwich"] = vars(pv.sandwich(lg.model, wrong, num_data=37, **chains))
    vae = small_vae(1)
    trained = Trained(vae.model, vae.guide, Trace_ELBO(), Batches((bits(),), BATCH), compile=False)
    found["validation"] = {"loss": trained.evaluate(Batches((bits(),), BATCH))}
    torch.manual_seed(processes.rank())
    unseeded = pv.importance_sampling(lg.model, wrong, x, num_samples=20, max_rows=512, seed=None)
    return {**found, "unseeded": {"log_px": unseeded.log_px}}


def continued(path: Path, epochs: int, **options: Any) -> tuple[dict[str, Tensor], list[float]]:
    """Trains, or goes on to so many epochs, in a folder for the checkpoint."""
    vae = small_vae(processes.rank() + 7)
    history = pv.fit(
        vae.model,
        vae.guide,
        bits(),
        epochs=epochs,
        batch_size=BATCH,
        checkpoint=path,
        resume=True,
        progress=False,
        **options,
    )
    return {name: value.clone() for name, value in vae.state_dict().items()}, history.loss


def checkpoints(folder: Path) -> Found:
    """`one` was begun by one process, and `two` will be ended by one. A learning rate of 0 shows what was read."""
    found = {
        "of one": continued(folder / "one", 2, learning_rate=0.0),
        "of one, on": continued(folder / "one", 3),
        "two": continued(folder / "two", 1),
        "whole": continued(folder / "whole", 3),
    }
    continued(folder / "parts", 2)
    found["parts"] = continued(folder / "parts", 3)
    return found


def caught(action: Callable[[], Any]) -> tuple[str, str, float]:
    """The kind of error, what it says, and after how many seconds."""
    began = time.perf_counter()
    try:
        action()
    except (Exception, SystemExit) as error:
        return type(error).__name__, str(error), time.perf_counter() - began
    return "", "", 0.0


def failures(folder: Path) -> Found:
    """Something goes wrong in the second process alone, in its third step or wherever it is called."""
    steps = itertools.count()

    def nan_guide(x: Tensor, noise: Tensor) -> None:
        guide(x, noise if next(steps) < 3 or processes.is_first() else noise * torch.nan)

    def refusing(x: Tensor, noise: Tensor) -> None:
        if processes.rank() == 1 and torch.is_grad_enabled():
            raise ValueError("this process does not like it")
        guide(x, noise)

    def fit_with(guide_: Any) -> Callable[[], Any]:
        pyro.clear_param_store()
        return lambda: pv.fit(model, guide_, *data(), epochs=2, batch_size=BATCH, progress=False)

    found = {"NaN": caught(fit_with(nan_guide)), "after NaN": stored(), "refusal": caught(fit_with(refusing))}
    lg = linear_gaussian()
    x = simulated(lg, 37)

    def particular(batch: Tensor) -> None:
        if bool((batch == x[20]).all(-1).any()):  # in the second block, which is the second process's
            raise ValueError("one of the data is not liked")
        lg.guide(batch)

    found["evidence"] = caught(lambda: pv.importance_sampling(lg.model, particular, x, num_samples=1000))
    found["checkpoint"] = caught(lambda: pv.fit(model, guide, *data(), checkpoint=folder / "one", progress=False))
    return found


def parameters(folder: Path) -> Found:
    """Lazy ones, one that is used by some data only, and one that is not used at all."""
    pyro.clear_param_store()
    torch.manual_seed(processes.rank())
    encoder, unused = nn.LazyLinear(LATENT_DIM).double(), nn.Linear(2, 3).double()

    def model_(x: Tensor, noise: Tensor) -> None:
        pyro.module("unused", unused)
        rare = pyro.param("rare", lambda: torch.ones(()).double())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT_DIM).double(), 1.0).to_event(1))
            mean = z.sum(-1, keepdim=True)
            # Only the process that has the last datum has a gradient of this.
            mean = mean * rare if bool((x == data()[0][-1]).all(-1).any()) else mean
            pyro.sample("x", dist.Normal(mean, 1.0).expand([len(x), DATA_DIM]).to_event(1), obs=x)

    def guide_(x: Tensor, noise: Tensor) -> None:
        loc = encoder(x)
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", Fixed(loc, torch.full_like(loc, 0.3), noise).to_event(1))

    before = unused.weight.clone()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        pv.fit(model_, guide_, *data(), epochs=2, batch_size=NUM_DATA, progress=False)
    return {"store": stored(), "said": [str(w.message) for w in said], "moved": not torch.equal(unused.weight, before)}


def refusals(folder: Path) -> Found:
    """What cannot be trained in shares, in all processes alike."""

    def rigid(x: Tensor, noise: Tensor) -> None:
        with pyro.plate("data", NUM_DATA):
            pyro.sample("x", dist.Normal(pyro.param("m", torch.zeros(1).double()), 1.0).to_event(1), obs=x[:, :1])

    def plateless(x: Tensor, noise: Tensor) -> None:
        pyro.sample("x", dist.Normal(pyro.param("m", torch.zeros(())).double(), 1.0).expand(x.shape).to_event(2), obs=x)

    def nothing(x: Tensor, noise: Tensor) -> None:
        pass

    def fit_with(*pair: Any, **options: Any) -> tuple[str, str, float]:
        pyro.clear_param_store()
        return caught(lambda: pv.fit(*pair, *data(), batch_size=NUM_DATA, epochs=1, progress=False, **options))

    several = DataLoader(TensorDataset(bits()), batch_size=None)
    vae = small_vae(1)
    return {
        "recorded": fit_with(model, guide, objective=JitTrace_ELBO()),
        "per datum": fit_with(model, AutoNormal(model)),
        "plateless": fit_with(plateless, nothing),
        "rigid": fit_with(rigid, nothing),
        "loader": caught(lambda: pv.fit(vae.model, vae.guide, several, epochs=1, progress=False)),
    }


def decisions(folder: Path) -> Found:
    """Ctrl-C in the second process, and a time limit that only the clock of the first has reached."""
    steps = itertools.count()

    def pressing(x: Tensor, noise: Tensor) -> None:
        if next(steps) == 5 and processes.rank() == 1:
            os.kill(os.getpid(), signal.SIGINT)
        guide(x, noise)

    pyro.clear_param_store()
    interrupted = pv.fit(model, pressing, *data(), epochs=3, batch_size=BATCH, progress=False)
    found = {"stopped": interrupted.stopped, "losses": interrupted.loss, "after": stored()}
    limit = 1e-9 if processes.is_first() else 1e9
    limited = pv.fit(model, guide, *data(), epochs=9, batch_size=BATCH, time_limit=limit, progress=False)
    return {**found, "limited": (limited.stopped, len(limited.loss))}


def files_and_words(folder: Path) -> Found:
    """The command line, each process in a folder of its own; which files it writes, and what it says."""
    own = folder / f"process {processes.rank()}"
    own.mkdir()
    written: list[str] = []
    write = files.write_bytes_atomically

    def recorded(path: Any, content: bytes) -> None:
        written.append(Path(path).name)
        write(path, content)

    out, err = io.StringIO(), io.StringIO()
    run = folder / "run"
    tiny = ["--binarization", "static", "--epochs", "1", "--latent-dim", "2", "--hidden-dims", "16"]
    with (
        contextlib.chdir(own),
        mock.patch.object(files, "write_bytes_atomically", recorded),
        contextlib.redirect_stdout(out) if processes.is_first() else contextlib.nullcontext(),
        contextlib.redirect_stderr(err),
    ):
        cli.app(["train", "digits", *tiny, "--out", str(run)], standalone_mode=False)
        processes.from_first(lambda: None)  # the run is there when the first process comes here
        cli.app(["evaluate", str(run), "--num-samples", "50", "--num-data", "37"], standalone_mode=False)
        pv.fit(model, guide, *data(), epochs=1, checkpoint="checkpoint")
    return {
        "written": written,
        "left": sorted(str(p.relative_to(own)) for p in own.rglob("*")),
        "out": out.getvalue(),
        "err": err.getvalue(),
        "evidence": files.read_tensors(run / "evidence.safetensors")[0]["log_px"],
    }


CHECKS: list[Callable[[Path], Found]] = [
    training,
    gradients,
    fitting,
    noise,
    sources,
    evidence,
    checkpoints,
    failures,
    parameters,
    refusals,
    decisions,
    files_and_words,
]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found: Found = {}

    def keep(name: str, value: Any) -> None:
        found[name] = value
        torch.save(found, folder / f"found by {os.environ['RANK']}")

    with processes.joined():
        for check in CHECKS:
            pyro.clear_param_store()
            keep(check.__name__, check(folder))

    def failing_alone() -> None:
        with processes.joined():
            if processes.rank() == 1:
                raise ValueError("the second process alone fails")
            processes.from_first(lambda: 0)
            with processes.summing(1):
                pass

    def failing_alike() -> None:
        with processes.joined():
            raise ValueError("all fail alike")

    def killed() -> None:
        with processes.joined():
            if processes.rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            with processes.summing(1):
                pass

    for port, ending in zip(sys.argv[2:], (failing_alone, failing_alike, killed), strict=True):
        os.environ["MASTER_PORT"] = port
        keep(ending.__name__, caught(ending))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
