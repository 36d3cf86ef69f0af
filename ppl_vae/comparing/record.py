"""A comparison: its rows, and the tables and pictures of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import nan, sqrt
from typing import Any

from torch import Tensor

from ppl_vae.comparing.rows import LIMIT_K, MOST_BAD, Row
from ppl_vae.reporting import text_table


@dataclass(frozen=True, eq=False)
class Comparison:
    """The same networks under several likelihoods.

    Attributes:
        rows: one for each likelihood, in the order in which they were asked for.

    Print it for the tables: rows are in one table only if their numbers are of one measure, the best first. Bits per
    dimension, where there are any, may also be compared between tables of the same number of levels.
    """

    rows: list[Row]

    def __getitem__(self, name: str) -> Row:
        """The row of that name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"There is no row '{name}'; there are {', '.join(row.name for row in self.rows)}.")

    def groups(self) -> dict[str, list[Row]]:
        """Rows of one measure under its name and that of the data it is of, the best first."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(f"{row.vae.likelihood.measure.name.capitalize()}: {row.data.scale.rule}", []).append(row)
        return {title: sorted(rows, key=lambda row: -row.evidence.mean) for title, rows in found.items()}

    def tables(self) -> dict[str, list[dict[str, str]]]:
        """The cells of the tables, by their titles. Nats per datum but for the bits; ± is over data and draws."""
        return {title: [_cells(row) for row in rows] for title, rows in self.groups().items()}

    def numbers(self) -> list[dict[str, Any]]:
        """All rows as JSON, in nats per datum but for the bits."""
        return [_numbers(row) for row in self.rows]

    def notes(self) -> list[str]:
        """What must be known to read the tables, in sentences."""
        return list(self._notes())

    def __repr__(self) -> str:
        return f"Comparison({', '.join(row.name for row in self.rows)})"

    def __str__(self) -> str:
        parts = [f"{title}\n{text_table(cells)}" for title, cells in self.tables().items()]
        return "\n\n".join([*parts, "\n".join(self.notes())])

    def _notes(self) -> Iterator[str]:
        num_data, num_samples = len(self.rows[0].evidence.log_px), self.rows[0].evidence.num_samples
        yield (
            f"Means over {num_data} test data, in nats but for the bits; log p(x) by {num_samples} importance samples "
            "for each; ± is the standard error over data and samples. Reconstruction and KL are those of the ELBO."
        )
        levels = {row.data.levels for row in self.rows if row.bits is not None}
        if len(self.groups()) > 1:
            yield (
                "Nats are never compared between tables. Bits/dim are, for data of the same number of levels"
                + (f" ({', '.join(map(str, sorted(filter(None, levels))))} here)." if levels else ".")
            )
        if any(row.is_density and row.bits is not None for row in self.rows):
            yield "≤: the bits of a density of dequantised levels are an upper bound on those of the levels."
        for title, rows in self.groups().items():
            if reason := rows[0].without_bits:
                yield f"{title.split(':')[0]} has no bits/dim. {reason}"
        if any(row.is_flagged for row in self.rows):
            yield (
                f"!: Pareto k is above {LIMIT_K} for more than {100 * MOST_BAD:.0f} % of the data, and log p(x) is too "
                "low for them by an amount that the samples cannot tell. See row.evidence.summary(), and score "
                "row.vae on row.data.test with annealed_importance_sampling."
            )


def _error(values: Tensor) -> float:
    return (values.std() / sqrt(len(values))).item() if len(values) > 1 else nan


def _cells(row: Row) -> dict[str, str]:
    means, errors, flag = row.diagnostics.mean, row.diagnostics.mean_standard_error, " !" if row.is_flagged else ""
    bits = "–"
    if row.bits is not None:
        bits = f"{'≤ ' if row.is_density else ''}{row.bits.mean().item():.3f} ± {_error(row.bits):.3f}"
    return {
        "likelihood": row.name + flag,
        "bits/dim": bits,
        "log p(x)": f"{row.evidence.mean:.2f} ± {row.evidence.mean_standard_error:.2f}",
        "reconstruction": f"{means['reconstruction']:.2f} ± {errors['reconstruction']:.2f}",
        "KL": f"{means['kl']:.2f} ± {errors['kl']:.2f}",
        "active units": f"{row.diagnostics.num_active} of {len(row.diagnostics.dimensions)}",
        f"k < {LIMIT_K}": f"{100 * row.share_of_good_k:.0f} %",
        "seconds": f"{row.seconds:.0f}",
    }


def _numbers(row: Row) -> dict[str, Any]:
    bits, measure = row.bits, row.vae.likelihood.measure
    return {
        "name": row.name,
        "measure": measure.name,
        "levels": row.data.levels,
        "data": str(row.data),
        "bits_per_dim": None if bits is None else bits.mean().item(),
        "bits_per_dim_standard_error": None if bits is None else _error(bits),
        "bits_are_an_upper_bound": None if bits is None else row.is_density,
        "without_bits": row.without_bits,
        "log_px": row.evidence.mean,
        "log_px_standard_error": row.evidence.mean_standard_error,
        "log_px_mc_standard_error": row.evidence.mc_standard_error,
        "log_px_mc_bias": row.evidence.mc_bias,
        "diagnostics": {"mean": row.diagnostics.mean, "standard_error": row.diagnostics.mean_standard_error},
        "active_units": row.diagnostics.num_active,
        "share_pareto_k_below_0.7": row.share_of_good_k,
        "flagged": row.is_flagged,
        "epochs": len(row.history.loss),
        "seconds": row.seconds,
        "warnings": [*row.evidence.warnings(), *row.diagnostics.warnings()],
    }
