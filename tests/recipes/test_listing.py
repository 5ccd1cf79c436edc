"""The first screen of `recipes list`, and what it leads to."""

import re
import sys

import pytest

from mimir_fast.recipes import all_recipes
from mimir_fast.recipes.__main__ import main


def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["mimir-fast recipes", *words])
    monkeypatch.setenv("COLUMNS", "120")
    main(words)
    return capsys.readouterr().out.splitlines()


def test_one_line_for_a_data_set_and_family(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = printed(capsys, monkeypatch, "list")
    rows = [row for line in lines if (row := re.match(r"(\w+) +(\w+) +(\d+)  ", line))]
    groups = {(r.command, r.name.split("/")[0], r.build().model.family) for r in all_recipes()}
    assert len(rows) == len(groups) and len(lines) < 60 and max(map(len, lines)) <= 100
    assert sum(int(row[3]) for row in rows) == len(all_recipes())


def test_every_recipe_is_a_word_away(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {line.split()[0] for line in printed(capsys, monkeypatch, "list", "tiny_imagenet/") if line.strip()}
    assert {recipe.name for recipe in all_recipes() if recipe.name.startswith("tiny_imagenet/")} <= shown
