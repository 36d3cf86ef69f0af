"""How the cost of training and of log p(x) grows with the batch, the samples K, the data N and the size of the latent.

    python tests/benchmarks/scaling.py [--rounds 3] [--threads 2] [--figure runs/scaling.png]

The networks of speed.py; eager and compiled by turns, medians. A step is of `fit`, data loading included; log p(x) is
all of `importance_sampling`, looking at the pair included. The picture has one panel for each size, with log axes.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from contestants import images, seconds, step_of_fit, vae
from matplotlib import pyplot

import ppl_vae as pv

STEPS = 40


def step(*, batch_size: int = 128, latent_dim: int = 50) -> Callable[[bool], float]:
    """Milliseconds of a training step."""
    pair, x = vae(latent_dim), images(STEPS * batch_size)
    return lambda compiled: step_of_fit(pair, x, batch_size=batch_size, compile=compiled) * 1e3


def log_px(*, num_data: int = 64, num_samples: int = 100) -> Callable[[bool], float]:
    """Milliseconds of the evaluation of all data."""
    pair, x = vae(), images(num_data)

    def evaluation(compiled: bool) -> float:
        def run() -> None:
            pv.importance_sampling(pair.model, pair.guide, x, num_samples=num_samples, compile=compiled)

        return seconds(run) * 1e3

    return evaluation


PANELS: dict[str, tuple[str, Callable[[int], Callable[[bool], float]], tuple[int, ...]]] = {
    "batch": ("training: ms per step", lambda n: step(batch_size=n), (16, 64, 256, 1024)),
    "latent_dim": ("training: ms per step", lambda n: step(latent_dim=n), (2, 16, 128, 1024)),
    "K": ("log p(x) of 64 data: ms", lambda n: log_px(num_samples=n), (10, 100, 1000, 10_000)),
    "N": ("log p(x), K = 100: ms", lambda n: log_px(num_data=n), (8, 64, 512, 4096)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--figure", type=Path, default=Path("runs/scaling.png"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    figure, axes = pyplot.subplots(2, 2, figsize=(7.0, 5.4), layout="constrained")
    print(f"{'':<12}{'size':>8}{'eager':>12}{'compiled':>12}{'ratio':>8}")
    for ax, (size, (cost, prepare, values)) in zip(axes.flat, PANELS.items(), strict=True):
        medians: dict[bool, list[float]] = {False: [], True: []}
        for value in values:
            run = prepare(value)
            rounds = [(run(False), run(True)) for _ in range(options.rounds + 1)][1:]  # the first compiles
            for compiled, times in zip(medians, zip(*rounds, strict=True), strict=True):
                medians[compiled].append(statistics.median(times))
            eager, fast = medians[False][-1], medians[True][-1]
            print(f"{size:<12}{value:>8}{eager:>12.2f}{fast:>12.2f}{eager / fast:>8.2f}  {cost}", flush=True)
        for compiled, name, marker, colour in (
            (False, "eager", "o-", pv.plots.axes.COLOURS[0]),
            (True, "compiled", "s-", pv.plots.axes.COLOURS[6]),
        ):
            ax.loglog(values, medians[compiled], marker, color=colour, label=name)
        pv.plots.axes.label_axes(ax, size, cost)
        every = [*medians[False], *medians[True]]
        ax.set_ylim(10 ** math.floor(math.log10(min(every))), 10 ** math.ceil(math.log10(max(every))))
        ax.set_xticks(values, [f"{value:,}" for value in values])
        ax.minorticks_off()
    axes.flat[0].legend(frameon=False)
    options.figure.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.figure, dpi=110)
    print(f"{options.threads} threads, {options.rounds} rounds; the picture is {options.figure}")


if __name__ == "__main__":
    main()
