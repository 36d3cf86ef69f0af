"""An epoch over a memory-mapped file beside the same over tensors, by turns.

    python tests/benchmarks/larger_than_memory.py [--rounds 5] [--rows 20480] [--threads 2]

Networks 784-400-400-50 and back, batches of 128 of random bytes, a Gaussian likelihood, Adam. The file has
just been written, so that the system still holds its pages. "read" is the reading alone, without training.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

import ppl_vae as pv
from ppl_vae.batches import Batches

BATCH = 128


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=20_480)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "images.npy")
        np.save(path, np.random.default_rng(0).integers(256, size=(options.rows, 784), dtype=np.uint8))
        mapped = pv.data.MemoryMapped(path)
        (images,) = mapped[:]
        sources: dict[str, Any] = {
            "tensors": images,
            "MemoryMapped": mapped,
            "DataLoader of it": DataLoader(mapped, BATCH, shuffle=True),
            "DataLoader of it, 2 workers": DataLoader(mapped, BATCH, shuffle=True, num_workers=2),
        }
        vae = pv.VAE((784,), 50, likelihood=pv.likelihoods.Gaussian(0.3))

        def train(source: Any) -> None:
            pv.fit(vae.model, vae.guide, source, epochs=1, batch_size=BATCH, progress=False)

        costs: dict[str, list[float]] = {f"{verb} {name}": [] for verb in ("train on", "read") for name in sources}
        for _ in range(options.rounds):
            for name, source in sources.items():
                costs[f"train on {name}"].append(seconds(lambda source=source: train(source)))
                costs[f"read {name}"].append(seconds(lambda source=source: list(Batches((source,), BATCH))))
    steps = -(-options.rows // BATCH)
    print(f"{'':40s}{'median':>8s}{'lowest':>8s}   ms per batch, {options.rounds} rounds")
    for name, values in costs.items():
        print(f"{name:40s}{statistics.median(values) / steps * 1e3:8.2f}{min(values) / steps * 1e3:8.2f}")


if __name__ == "__main__":
    main()
