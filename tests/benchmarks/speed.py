"""How fast a pair is trained and scored beside Pyro, plain PyTorch and the peers: one table, measured by turns.

    python tests/benchmarks/speed.py [--rounds 3] [--threads 2] [--jax PYTHON] [--pythae PYTHON]

Networks 784-400-400-50 and back, batches of 128 of 20,480 random binary images, Adam, float32. A round is one epoch of
each contestant and one evaluation of each; medians of the rounds are printed, their range, and how many times as long
as the first of its group each took. An epoch of `fit` goes from the first step of its second epoch to its return; every
other contestant has had an epoch to warm up. The peers are scripts in ../shared beside the checkout, run once a round
by the interpreters that are given: `--jax` with jax, numpyro and optax, `--pythae` with torch and pythae. Nothing else
should run on the machine.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from contestants import (
    BATCH,
    DECODER_FLOPS,
    LATENT,
    PIXELS,
    annealers,
    gemm_rate,
    images,
    samplers,
    seconds,
    trainers,
)

import ppl_vae as pv

NUM_DATA, SCORED, ANNEALED = 20_480, 512, 128
PEERS = Path(__file__).resolve().parents[3] / "shared" / "peers"
TRAINING, SCORING = "training, data loading included: ms per step", "log p(x): microseconds per sample"
ANNEALING = "annealing: microseconds per gradient of log p(x, z)"
# Of images, of samples, of gradients: these, divided by the cost.
THOUSANDS_PER_SECOND = {TRAINING: BATCH, SCORING: 1000, ANNEALING: 1000}
MEMORY, START = "peak memory of a process: MiB", "start: seconds"
SETUPS = {
    "import torch, pyro": "import torch, pyro",
    "import torch, pyro, ppl_vae, and its fit": "import torch, pyro, ppl_vae; ppl_vae.fit",
    "ppl-vae --help": "import sys; sys.argv[1:] = ['--help']; from ppl_vae.cli import main; main()",
}


def peers(interpreters: dict[str, str | None]) -> Iterator[tuple[str, str, float]]:
    """Group, name and cost of each peer whose interpreter is given: the best of the lines that its script prints."""
    scripts = (
        ("NumPyro: epoch in one jit", "jax", "numpyro_train.py"),
        ("JAX: by hand, jit", "jax", "jax_importance_sampling.py"),
        ("pythae", "pythae", "pythae_train_and_nll.py"),
    )
    for name, needs, script in scripts:
        interpreter = interpreters[needs]
        if interpreter is None:
            continue
        done = subprocess.run(
            [interpreter, str(PEERS / script)], capture_output=True, text=True, cwd=tempfile.gettempdir()
        )
        if done.returncode:
            raise SystemExit(f"{script} failed under {interpreter}:\n{done.stderr}")
        if found := re.findall(r"(-?[\d.]+) ms/step", done.stdout):
            yield TRAINING, name, min(map(float, found))
        if found := re.findall(r"([\d.]+) k samples/s", done.stdout):
            yield SCORING, name, 1e3 / max(map(float, found))


def peak_memory(group: str, name: str, threads: int) -> float:
    """MiB that a process held at most which did nothing else, all imports included."""
    contestants = trainers(images(NUM_DATA)) if group == TRAINING else samplers(images(SCORED))
    torch.set_num_threads(threads)
    contestants[name]()
    (kib,) = re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    return int(kib) / 1024


def first_step(cache: str, threads: int) -> float:
    """Seconds until `fit(compile=True)` has done a compiled step, with what an earlier process left in a cache."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    torch.set_num_threads(threads)
    vae, x = pv.VAE(PIXELS, LATENT), images(2 * BATCH)  # the first step is eager
    return seconds(lambda: pv.fit(vae.model, vae.guide, x, epochs=1, compile=True, progress=False))


def in_new_process(work: Callable[..., float], *args: object) -> float:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


def table(costs: dict[str, dict[str, list[float]]]) -> Iterator[str]:
    """One line for each contestant, under the heading of each group, whose first contestant the others are held to."""
    for group, contestants in costs.items():
        per_second = THOUSANDS_PER_SECOND.get(group)
        last = f"{'thousands/s':>13}" if per_second else ""
        yield f"\n{group:<60}{'median':>9}{'lowest':>9}{'highest':>9}{'ratio':>7}{last}"
        ours = statistics.median(next(iter(contestants.values())))
        for name, values in contestants.items():
            median = statistics.median(values)
            rate = f"{per_second / median:>13.1f}" if per_second else ""
            yield f"{name:<60}{median:>9.2f}{min(values):>9.2f}{max(values):>9.2f}{median / ours:>7.2f}{rate}"


def turned(names: list[str], by: int) -> list[str]:
    """Each begins a round in its turn, so that none is always the one that comes after other processes."""
    by %= len(names)
    return names[by:] + names[:by]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--jax", metavar="PYTHON", help="an interpreter with jax, numpyro and optax")
    parser.add_argument("--pythae", metavar="PYTHON", help="an interpreter with torch and pythae")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    costs: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    steps, samples, annealing = trainers(images(NUM_DATA)), samplers(images(SCORED)), annealers(images(ANNEALED))
    groups = (TRAINING, steps, 1e3), (SCORING, samples, 1e6), (ANNEALING, annealing, 1e6)
    for group, contestants, _ in groups:
        for name, warm_up in contestants.items():
            costs[group][name] = []  # in this order
            warm_up()
    best = 0.0
    for number in range(options.rounds):
        for group, contestants, unit in groups:
            for name in turned(list(contestants), number):
                costs[group][name].append(contestants[name]() * unit)
        best = max(best, gemm_rate())
        for group, name, cost in peers({"jax": options.jax, "pythae": options.pythae}):
            costs[group][name].append(cost)
    for group, name in [(TRAINING, name) for name in steps] + [(SCORING, name) for name in samples]:
        costs[MEMORY][name].append(in_new_process(peak_memory, group, name, options.threads))
    for _ in range(options.rounds):
        for name, code in SETUPS.items():
            run = [sys.executable, "-c", code]
            costs[START][name].append(seconds(lambda run=run: subprocess.run(run, check=True, capture_output=True)))
        with tempfile.TemporaryDirectory() as cache:
            for name in ("fit(compile=True), to a compiled step", "fit(compile=True), the same, compiled before"):
                costs[START][name].append(in_new_process(first_step, cache, options.threads))

    print(*table(costs), sep="\n")
    rate = 1e6 * DECODER_FLOPS / statistics.median(costs[SCORING]["importance_sampling(compile=True)"])
    print(
        f"\nbest product of matrices {best / 1e9:.0f} GFLOP/s; importance_sampling(compile=True) {rate / 1e9:.0f}, "
        f"{rate / best:.0%} of it; {options.threads} threads, {options.rounds} rounds"
    )


if __name__ == "__main__":
    main()
