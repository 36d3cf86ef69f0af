"""Comparing likelihoods from a terminal: which of them, on which data, and where the tables go."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import typer

import ppl_vae as pv
from ppl_vae.cli import runs
from ppl_vae.comparing import families
from ppl_vae.data import Data


def compare(data: Data, names: str, out: Path, *, num_data: int | None, seed: int, **options: Any) -> None:
    """Trains, scores and prints; the folder keeps rows, tables and pictures."""
    data = replace(data, test=_some(data.test, num_data, seed), test_labels=None)
    found = families(data, seed=seed)
    asked = list(found) if names == "all" else [name.strip() for name in names.split(",")]
    for name in asked:
        if name not in found:
            raise ValueError(
                f"There is no likelihood '{name}' for {data.name}, whose levels are {data.levels}. There are "
                f"{', '.join(found)}; and 'all'."
            )
    with runs.one_thread():
        comparison = pv.compare(
            data,
            {name: found[name] for name in asked},
            folder=out,
            seed=seed,
            progress=sys.stderr.isatty(),
            **options,
        )
    typer.echo(f"{data}\n\n{comparison}\n\nWritten: {out / 'comparison.json'}, {out / 'figures'}, and the programs.")


def _some(x: torch.Tensor, count: int | None, seed: int) -> torch.Tensor:
    """So many of the data, chosen by the seed; all of them for None."""
    if count is None:
        return x
    if not 2 <= count <= len(x):
        raise ValueError(f"Expected to score from 2 to {len(x)} test data; got {count}.")
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:count].sort().values]
