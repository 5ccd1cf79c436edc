"""Lines of `bad_lines` in this process: each ends with 2, names what is wrong, and leaves nothing behind."""

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos.bad_input import cases
from chaos.bad_lines import LINES, bad_files, contents_of, run_here


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    path = tmp_path_factory.mktemp("bad")
    yield path, bad_files(path)


def check(line: str, wanted: str, folder: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    path, names = folder
    monkeypatch.chdir(path)
    before = contents_of(path)
    code, said = run_here(shlex.split(line.format(**names)))
    said = " ".join(said.split())
    assert code == 2 and "Traceback" not in said and wanted in said, f"ended with {code}: {said}"
    assert contents_of(path) == before


@pytest.mark.parametrize(("line", "wanted"), LINES[5::9])
def test_some(line: str, wanted: str, folder: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    check(line, wanted, folder, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(("line", "wanted"), LINES)
def test_all(line: str, wanted: str, folder: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    check(line, wanted, folder, monkeypatch)


def test_there_are_many_of_every_command() -> None:
    """By hand here; from types in `bad_input`."""
    assert {line.split()[0] for line, _ in LINES} >= {
        "pretrain", "finetune", "evaluate", "probe", "compare", "export", "hub", "reproduce", "recipes"
    }  # fmt: skip
    assert len(set(LINES)) == len(LINES) >= 190
    assert len({module for module, *_ in cases()}) >= 8
