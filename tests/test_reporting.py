"""A page is one file: well-formed, escaped, and fetching nothing."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt

from ppl_vae import files, reporting

VOID = {"meta", "img"}


class Reader(HTMLParser):
    """Collects the tags, attributes and texts of a page, and fails where tags do not nest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1], data.strip()))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def text(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


@pytest.fixture
def page() -> Iterator[reporting.Page]:
    page = reporting.Page("Run <a> & co")
    page.text("All numbers are in nats per datum; smaller than 0 < 1.")
    page.heading("Evidence")
    page.table(
        [
            {"model": "VAE", "log p(x)": "−86.8 ± 0.2", "samples": 5000, "note": "first"},
            {"model": "IWAE", "log p(x)": "−85.1 ± 0.2", "samples": 5000},
        ],
        caption="Test set.",
    )
    fig, ax = plt.subplots(figsize=(4, 2))
    ax.imshow(np.zeros((2, 4)))
    page.figure(ax, 'A "black" picture.')
    page.figure(fig, "The same.")
    yield page
    plt.close("all")


def test_a_page_is_well_formed_and_in_order(page: reporting.Page) -> None:
    html = page.html()
    reader = Reader(html)
    assert html.startswith("<!DOCTYPE html>")
    assert reader.all("html") == [{"lang": "en"}]
    assert {"charset": "utf-8"} in reader.all("meta")
    assert reader.text("title") == reader.text("h1") == ["Run <a> & co"]
    assert [tag for tag, _ in reader.tags if tag in {"h1", "p", "h2", "table", "img"}] == [
        "h1",
        "p",
        "h2",
        "table",
        "img",
        "img",
    ]
    assert reader.text("figcaption") == ["Test set.", 'A "black" picture.', "The same."]


def test_a_page_refers_to_nothing_outside(page: reporting.Page) -> None:
    reader = Reader(page.html())
    for _, attributes in reader.tags:
        assert "href" not in attributes
        assert (attributes.get("src") or "data:").startswith("data:image/png;base64,") or "src" not in attributes
    assert not reader.all("link")
    assert not reader.all("script")
    (style,) = reader.text("style")
    assert "url(" not in style
    assert "@import" not in style


def test_tables_hold_every_cell_and_align_numbers(page: reporting.Page) -> None:
    reader = Reader(page.html())
    assert reader.text("th") == ["model", "log p(x)", "samples", "note"]
    assert reader.text("td") == ["VAE", "−86.8 ± 0.2", "5000", "first", "IWAE", "−85.1 ± 0.2", "5000"]
    assert [cell.get("class") for cell in reader.all("td")] == [None, "number", "number", None] * 2
    assert [cell.get("class") for cell in reader.all("th")] == [None, "number", "number", None]


@pytest.mark.parametrize(
    ("cells", "numbers"),
    [
        (["1", "−2.5", "+3e-05", "1,000", "12.5 %", "nan", "-inf", ""], True),
        (["< 0.01", "–"], True),
        (["−86.8 ± 0.2"], True),
        (["1", "two"], False),
        (["3 layers"], False),
        (["28 x 28"], False),
        (["2026-01-01"], False),
        (["", "–"], False),
    ],
)
def test_a_column_is_of_numbers_when_all_its_cells_are(cells: list[str], numbers: bool) -> None:
    page = reporting.Page("a")
    page.table([{"column": cell} for cell in cells], "A table.")
    assert all((cell.get("class") == "number") == numbers for cell in Reader(page.html()).all("td"))


@pytest.mark.parametrize("rows", [[], [{}]])
def test_an_empty_table_is_refused(rows: list[dict[str, object]]) -> None:
    with pytest.raises(ValueError, match="empty table"):
        reporting.Page("a").table(rows, "A table.")


def test_nothing_given_is_read_as_markup() -> None:
    attack = "<script>alert('x')</script>\" onload=\"alert(1)"
    page = reporting.Page(attack)
    page.heading(attack)
    page.text(attack)
    page.table([{attack: attack}], attack)
    fig = plt.figure()
    page.figure(fig, attack)
    plt.close(fig)
    reader = Reader(page.html())
    assert "<script" not in page.html()
    assert reader.all("img")[0].keys() == {"src", "alt"}
    for tag in ("title", "h1", "h2", "p", "th", "td", "figcaption"):
        assert reader.text(tag)[0] == attack
    assert reader.all("img")[0]["alt"] == attack


def test_figures_are_the_pictures_they_were(page: reporting.Page) -> None:
    sources = [str(image["src"]) for image in Reader(page.html()).all("img")]
    pixels = plt.imread(io.BytesIO(base64.b64decode(sources[0].removeprefix("data:image/png;base64,"), validate=True)))
    height, width = pixels.shape[:2]
    assert 300 < width < 800
    assert (pixels[0, 0] == 1.0).all()  # white around
    # imshow of zeros alone is the lowest colour of viridis
    np.testing.assert_allclose(pixels[height // 2, width // 2, :3], plt.get_cmap("viridis")(0)[:3], atol=0.01)
    assert sources[0] == sources[1]
    assert Reader(page.html()).all("img")[0]["alt"] == 'A "black" picture.'
    assert len(plt.get_fignums()) == 1


def test_axes_of_a_subfigure_stand_for_the_whole_figure() -> None:
    fig = plt.figure(figsize=(4, 2))
    left, right = fig.subfigures(1, 2)
    left.subplots()
    page = reporting.Page("a")
    page.figure(fig, "The figure.")
    page.figure(right.subplots(), "Its axes.")
    page.figure(fig, "The figure.")
    plt.close(fig)
    first, second, third = (image["src"] for image in Reader(page.html()).all("img"))
    assert first != second == third


def test_axes_without_a_figure_are_refused() -> None:
    ax = plt.subplots()[1]
    ax.remove()
    with pytest.raises(ValueError, match="removed"):
        reporting.Page("a").figure(ax, "Nothing.")
    plt.close("all")


def test_a_page_is_written_in_one_step(page: reporting.Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page.write(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page.html()
    written = []
    monkeypatch.setattr(files, "write_bytes_atomically", lambda path, data: written.append((path, data)))
    page.write(tmp_path / "b.html")
    assert written == [(tmp_path / "b.html", page.html().encode())]


def test_a_picture_is_written_in_the_format_of_its_suffix_and_closed(tmp_path: Path) -> None:
    for name, magic in (("a.png", b"\x89PNG"), ("b.pdf", b"%PDF"), ("c", b"\x89PNG")):
        figure, ax = plt.subplots()
        reporting.write_picture(ax, tmp_path / "new" / name)
        assert (tmp_path / "new" / name).read_bytes().startswith(magic)
        assert figure.number not in plt.get_fignums()
    _, ax = plt.subplots()
    with pytest.raises(ValueError, match="Format 'nonsense'"):
        reporting.write_picture(ax, tmp_path / "d.nonsense")
    ax.remove()
    with pytest.raises(ValueError, match="removed from theirs"):
        reporting.write_picture(ax, tmp_path / "e.png")
    plt.close("all")
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["a.png", "b.pdf"]


def test_a_table_is_aligned_as_text() -> None:
    rows: list[dict[str, object]] = [{"name": "a", "bits": "≤ 2.345 ± 0.012"}, {"name": "longer", "bits": 7}]
    assert reporting.text_table(rows).splitlines() == [
        "name               bits",
        "a       ≤ 2.345 ± 0.012",
        "longer                7",
    ]
    with pytest.raises(ValueError, match="at least one row"):
        reporting.text_table([])
