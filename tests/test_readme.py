"""The README's Python runs, as a user would paste it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import ppl_vae

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert "nats per datum" in printed
    assert (tmp_path / "runs" / "digits.safetensors").exists()
    evidence, history = namespace["evidence"], namespace["history"]
    assert isinstance(evidence, ppl_vae.Evidence)
    assert isinstance(history, ppl_vae.History)
    assert evidence.mean > -history.validation[-1] > -25.5  # a trained model: the bound below log p(x)


def test_the_first_example_is_short() -> None:
    first = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    assert len([line for line in first.splitlines() if line.strip()]) <= 15


def test_the_picture_of_the_rooms_is_that_of_the_package() -> None:
    def rooms(text: str) -> list[str]:
        rows = [line.split() for line in text.splitlines() if re.match(r"\s*\d  ", line)]
        rows += [line.split() for line in text.splitlines() if "neither: " in line]
        return [word for row in rows for word in row]

    assert rooms(README) == rooms(ppl_vae.__doc__ or "")


def test_every_file_it_names_exists() -> None:
    for path in re.findall(r"`((?:notebooks|ppl_vae|tests)/[\w./]*)`", README):
        assert (Path(__file__).parent.parent / path).exists(), path
