"""How long a user waits before anything happens: imports and `ppl-vae --help`, measured by turns in new processes.

    python tests/benchmarks/cold_start.py [--rounds 7]

Seconds until a process has ended, and of the processor; medians.
The limits: `import ppl_vae` adds less than 0.3 s to `import torch, pyro`, and `ppl-vae --help` takes less than 1 s.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

ROOMS = "ppl_vae.fit, ppl_vae.VAE, ppl_vae.importance_sampling, ppl_vae.data.load"
COMMANDS = {
    "python": ["-c", "pass"],
    "ppl-vae --help": ["-m", "ppl_vae.cli", "--help"],
    "import torch, pyro": ["-c", "import torch, pyro"],
    "  ... and ppl_vae": ["-c", "import torch, pyro, ppl_vae"],
    "  ... and what a first program asks of it": ["-c", f"import torch, pyro, ppl_vae; {ROOMS}"],
}


def run(arguments: list[str]) -> tuple[float, float]:
    """Seconds on the clock, and of the processor."""
    before, began = os.times(), time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    return time.perf_counter() - began, sum(after[2:4]) - sum(before[2:4])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    measured: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, arguments in COMMANDS.items():
            measured[name].append(run(arguments))
    print(f"{'':42s}{'clock':>8s}{'processor':>12s}   seconds, medians of {rounds}")
    for name, pairs in measured.items():
        clock, processor = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{name:42s}{clock:8.2f}{processor:12.2f}")


if __name__ == "__main__":
    main()
