"""The wall: a room imports from rooms below it on its own side and from those of neither side, nothing else."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import ppl_vae

PACKAGE = Path(ppl_vae.__file__).parent

# room: (side, level); as in the docstring of ppl_vae/__init__.py
PROGRAMS = [
    ["networks", "likelihoods", "distributions"],
    ["priors", "posteriors"],
    ["coin", "vae", "linear_gaussian", "hierarchical", "conditional"],
    ["autoencoder", "semi_supervised"],
    ["storage"],
]
INFERENCE = [
    ["scoring", "pareto", "compiling"],
    ["proposals", "parameters", "batches", "objectives"],
    ["evidence", "training"],
    ["gaps", "diagnostics"],
    [],
]
NEITHER = [["isolation", "precision", "cross_entropy", "processes", "data", "files", "plots"], ["reporting"]]
BOTH = [["comparing"], ["cli"], ["__init__"]]

PLACE = {
    room: (side, level)
    for side, levels in (("programs", PROGRAMS), ("inference", INFERENCE), ("neither", NEITHER), ("both", BOTH))
    for level, rooms in enumerate(levels)
    for room in rooms
}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(source: str, room: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "ppl_vae":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ppl_vae."):
            found.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("ppl_vae.")}
    return found - {room, "__version__"}


def allowed(importer: str, imported: str) -> bool:
    (side, level), (other_side, other_level) = PLACE[importer], PLACE[imported]
    if side == "both":
        return other_side != "both" or other_level < level
    if other_side == "neither":
        return side != "neither" or other_level < level
    return side == other_side and other_level < level


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_keep_to_the_wall_and_the_layers(path: Path) -> None:
    room = room_of(path)
    assert room in PLACE, f"{room} has no place in the picture of ppl_vae/__init__.py"
    wrong = {other for other in imported_rooms(path.read_text(), room) if not allowed(room, other)}
    assert not wrong, f"{room} ({PLACE[room]}) imports {wrong}"


def test_the_wall_can_be_hit() -> None:
    source = "from ppl_vae import scoring\nfrom ppl_vae.vae import VAE\nimport ppl_vae.cli\n"
    assert imported_rooms(source, "networks") == {"scoring", "vae", "cli"}
    assert not allowed("networks", "scoring")
    assert not allowed("networks", "vae")
    assert not allowed("vae", "coin")
    assert not allowed("scoring", "vae")
    assert not allowed("plots", "vae")
    assert not allowed("files", "reporting")
    assert allowed("storage", "vae")
    assert allowed("evidence", "scoring")
    assert allowed("cli", "training")
    assert allowed("cli", "comparing")
    assert not allowed("comparing", "cli")
    assert not allowed("comparing", "__init__")


def test_the_picture_in_the_docstring_is_this_table() -> None:
    picture = ppl_vae.__doc__ or ""
    rows = [re.split(r"\s{4,}", line.strip()) for line in picture.splitlines() if re.match(r"\s+\d\s", line)]
    for level, row in enumerate(rows):
        assert row[0].split()[1:] == PROGRAMS[level]
        assert (row[1].split() if len(row) > 1 else []) == INFERENCE[level]
    assert len(rows) == len(PROGRAMS)
    neither = re.search(r"neither: (.*)", picture)
    assert neither is not None
    assert neither.group(1).split() == [room for level in NEITHER for room in level]


def test_every_public_name_is_there() -> None:
    for name in ppl_vae.__all__:
        assert getattr(ppl_vae, name) is not None
    assert set(ppl_vae.__all__) <= set(dir(ppl_vae))
    with pytest.raises(AttributeError, match="ppl_vae has no 'nonsense'"):
        _ = ppl_vae.nonsense
