"""--help is a screen of 25 options, --help_all has every one."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from mimir_fast import evaluate, finetune, pretrain
from mimir_fast.short_help import short_help

COMMANDS = [pretrain, finetune, evaluate]


def said(parse: Callable[[Sequence[str]], Any], capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as end:
        parse(words)
    assert not end.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS, ids=lambda module: module.__name__)
def test_first_screen(command: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    first, whole = said(command.config_from, capsys, "--help"), said(command.config_from, capsys, "--help_all")
    shown = re.findall(r"^  --(\S+)", first, re.M)
    assert shown == list(command.COMMON) and len(shown) == 25
    assert max(map(len, first.splitlines())) <= 80 and len(first.splitlines()) < 90
    every = set(re.findall(r"--([\w.]+)", whole))
    assert set(shown) < every and len(every) > 80
    assert re.search(r"--help_all\s+shows\s+the\s+other \d+\s+options", first)


def test_options_of_the_method_that_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    plain = said(pretrain.config_from, capsys, "--method", "mae", "--help")
    assert "--mask_ratio" in plain and "--attack.eps" not in plain
    small = said(pretrain.config_from, capsys, "--recipe", "cifar10/mimir_vit_base", "--help")
    assert re.search(r"--batch_size +Global batch.*?\(512\)", small, re.S)


@dataclass
class Options:
    kind: Literal["first", "second"] = "first"
    """Which of them; more words."""
    size: float = 8 / 255
    """Radius in units
    of images; more words. Another sentence."""
    names: tuple[str, ...] = ()
    """first: one; second: two."""
    plain: int | None = None


def test_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = short_help(Options(), ("kind", "size", "names", "plain", "not_there"), "program", "What it does.")
    assert text.splitlines()[:7] == [
        "usage: program [OPTIONS]",
        "",
        "What it does.",
        "",
        "  --kind                  Which of them: first, second (first)",
        "  --size                  Radius in units of images (0.0313725)",
        "  --names                 first: one (none)",
    ]
    assert "  --plain                 (not given)" in text and "not_there" not in text
