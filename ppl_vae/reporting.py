"""Figures and tables in; out come lines of text, picture files, and one self-contained HTML page.

The page needs no network, and is readable on a phone and in print.
"""

from __future__ import annotations

import base64
import html
import io
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ppl_vae import files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLE = """
:root { color-scheme: light; }
body { max-width: 46rem; margin: 2.5rem auto; padding: 0 1.1rem; color: #1c1c1c; background: #fff;
       font: 1.05rem/1.55 Charter, "Bitstream Charter", "Sitka Text", Cambria, "DejaVu Serif", serif; }
h1, h2 { line-height: 1.2; font-weight: 600; text-wrap: balance; }
h1 { font-size: 1.9rem; margin: 0 0 1.4rem; }
h2 { font-size: 1.3rem; margin: 2.4rem 0 0.7rem; break-after: avoid; }
p { margin: 0 0 1rem; overflow-wrap: break-word; }
figure { margin: 1.8rem 0; break-inside: avoid; }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { margin: 0.6rem 0; color: #555; font-size: 0.92rem; line-height: 1.4; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; min-width: 100%; font-size: 0.95rem;
        font-variant-numeric: tabular-nums lining-nums;
        border-top: 2px solid #1c1c1c; border-bottom: 2px solid #1c1c1c; }
th, td { padding: 0.35rem 0.7rem; text-align: left; vertical-align: top; }
th { font-weight: 600; border-bottom: 1px solid #1c1c1c; vertical-align: bottom; }
tr + tr td { border-top: 1px solid #e4e4e4; }
tr { break-inside: avoid; }
.number { text-align: right; }
td.number { white-space: nowrap; }
@media print { body { max-width: none; margin: 0; font-size: 10.5pt; } .scroll { overflow: visible; } }
"""
# A number with its sign, error, per cent and thousands; or a place where there is none.
_NUMBER = re.compile(r"[-+−±~≈<>≤≥]?\s*(\d[\d.,'\s]*(e[-+]?\d+)?|inf|nan|∞)\s*%?(\s*±\s*\S+)?|[-–—]?", re.IGNORECASE)


class Page:
    """A page that grows from top to bottom, and is written as one file that needs no other.

    Every text is shown as it is given: no markup is read from it.

    Args:
        title: the heading of the page and of its window.

    Example:
        >>> page = Page("Run a")
        >>> page.heading("Evidence")
        >>> page.table([{"model": "VAE", "log p(x)": "−86.8 ± 0.2"}], caption="Test set, nats per datum.")
        >>> "<td class=\\"number\\">−86.8 ± 0.2</td>" in page.html()
        True
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = []

    def heading(self, text: str) -> None:
        """Begins a section."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, paragraph: str) -> None:
        """Adds a paragraph."""
        self._parts.append(f"<p>{html.escape(paragraph)}</p>")

    def table(self, rows: Sequence[Mapping[str, object]], caption: str) -> None:
        """Adds a table with a column per key, in the order in which the keys first appear.

        Args:
            rows: one mapping per row; values are shown by `str`, a missing one stays blank. A column of
                numbers ("−86.8", "12.5 %", "−86.8 ± 0.2") is aligned to the right.
            caption: below the table; say the units.

        Raises:
            ValueError: there is no row, or no column.
        """
        columns = list(dict.fromkeys(key for row in rows for key in row))
        if not columns:
            raise ValueError("Expected at least one row with at least one column, got an empty table.")
        cells = [[str(row.get(column, "")) for column in columns] for row in rows]
        kinds = [_kind(column) for column in zip(*cells, strict=True)]
        head = _row("th", columns, [f'{kind} scope="col"' for kind in kinds])
        body = "\n".join(_row("td", row, kinds) for row in cells)
        self._add_figure(
            f'<div class="scroll"><table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table></div>',
            caption,
        )

    def figure(self, figure: Figure | Axes, caption: str) -> None:
        """Adds a matplotlib figure as it looks now, as a PNG inside the page.

        Args:
            figure: a figure, or an axes, which stands for its whole figure. It stays open.
            caption: below the picture, and read aloud in its place.

        Raises:
            ValueError: the axes were removed from their figure.
        """
        data = base64.b64encode(_rendered(_whole(figure), "png")).decode()
        self._add_figure(f'<img src="data:image/png;base64,{data}" alt="{html.escape(caption)}">', caption)

    def html(self) -> str:
        """Returns the whole page."""
        title = html.escape(self.title)
        content = "\n".join(self._parts)
        # A browser holds the page to its promise that nothing is fetched.
        policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
        return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{content}
</main>
</body>
</html>
"""

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the page to `path` in one step.

        Raises:
            OSError: as for `ppl_vae.files.write_bytes_atomically`.
        """
        files.write_bytes_atomically(path, self.html().encode())

    def _add_figure(self, content: str, caption: str) -> None:
        self._parts.append(f"<figure>\n{content}\n<figcaption>{html.escape(caption)}</figcaption>\n</figure>")


def text_table(rows: Sequence[Mapping[str, object]]) -> str:
    """A table as lines of text: the first column to the left, all others to the right.

    Args:
        rows: one mapping per row, all with the same keys, which become the head.

    Raises:
        ValueError: there is no row.

    Example:
        >>> print(text_table([{"model": "VAE", "bits": 2.25}, {"model": "AE", "bits": "–"}]))
        model  bits
        VAE    2.25
        AE        –
    """
    if not rows:
        raise ValueError("Expected at least one row, got an empty table.")
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    )


def write_picture(figure: Figure | Axes, path: str | os.PathLike[str]) -> None:
    """Writes a figure, or the one that axes are on, to a file in one step, in the format of its suffix, and closes it.

    Raises:
        ValueError: the suffix names no format of pictures; the axes were removed from their figure.
        OSError: as for `ppl_vae.files.write_bytes_atomically`.
    """
    from matplotlib import pyplot  # here, because it would slow the start of every program

    whole = _whole(figure)
    data = _rendered(whole, os.path.splitext(path)[1].removeprefix(".") or "png")
    pyplot.close(whole)
    files.write_bytes_atomically(path, data)


def _whole(figure: Figure | Axes) -> Figure:
    whole = figure.get_figure(root=True)  # a figure returns itself
    if whole is None:
        raise ValueError("Expected axes on a figure, got axes that were removed from theirs. Pass the figure.")
    return whole


def _rendered(figure: Figure, kind: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=160, bbox_inches="tight", facecolor="white")
    return buffer.getvalue()


def _kind(cells: Sequence[str]) -> str:
    """The attribute of a column: one of numbers has nothing else in it, and at least one digit."""
    numbers = all(_NUMBER.fullmatch(cell.strip()) for cell in cells) and re.search(r"\d|inf|nan|∞", "".join(cells))
    return ' class="number"' if numbers else ""


def _row(tag: str, cells: Sequence[str], attributes: Sequence[str]) -> str:
    filled = zip(cells, attributes, strict=True)
    return "<tr>" + "".join(f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for cell, kind in filled) + "</tr>"
