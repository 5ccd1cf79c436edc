"""Every block of the documentation does what the page says: python is run, commands are run or parsed."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import doc_commands as known
import pytest
from commands import command_environment
from doc_blocks import PAGES, ROOT, Block, blocks_of, inline_commands, split_commands

from mimir_fast.data.sources import SOURCES
from mimir_fast.evaluation.topic import TOPICS
from mimir_fast.methods.registry import METHODS, PRESETS
from mimir_fast.models.families import FAMILIES

SHELL, PYTHON = ("sh", "bash", "console"), ("python", "py")
WITH_COMMANDS = [page for page in PAGES if any(b.language in SHELL for b in blocks_of(page)) or inline_commands(page)]
WITH_RUNS = [
    page
    for page in PAGES
    if any(b.marker == "run" or (b.language in PYTHON and b.marker != "parse") for b in blocks_of(page))
]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_has_a_language_and_a_known_marker(page: Path) -> None:
    for block in blocks_of(page):
        assert block.language in (*SHELL, *PYTHON, "text", "bibtex"), f"{block.place}: {block.language!r}"
        assert block.marker in ("", "run", "parse"), f"{block.place}: {block.marker}"


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name)
def test_every_command_is_accepted_by_its_parser(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with own_modules(tmp_path, monkeypatch):
        check_commands(page, tmp_path)


@contextmanager
def own_modules(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules can be imported from the folder; they and what they register are forgotten afterwards."""
    monkeypatch.syspath_prepend(folder)
    with ExitStack() as registries:
        for names in (*METHODS.values(), PRESETS, FAMILIES, SOURCES, TOPICS):
            registries.enter_context(names.restored())
        try:
            yield
        finally:
            for module in [n for n, m in sys.modules.items() if str(folder) in str(getattr(m, "__file__", ""))]:
                del sys.modules[module]


def check_commands(page: Path, folder: Path) -> None:
    for block in blocks_of(page):
        if block.title:
            (folder / block.title).write_text(block.text)  # a module that a command imports
        for words in block.commands if block.language in SHELL else ():
            try:
                known.check(words)
            except known.NotAccepted as error:
                pytest.fail(f"{block.place}: {error}")
    for command in inline_commands(page):
        for words in split_commands(command):
            try:
                known.check(words)
            except known.NotAccepted as error:
                pytest.fail(f"{name(page)}, `{command}`: {error}")


@pytest.mark.parametrize("page", WITH_RUNS, ids=name)
def test_the_page_runs_small(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the page's order, in one empty folder and one process."""
    namespace = dict[str, Any]({"__name__": "__main__"})
    monkeypatch.chdir(tmp_path)
    with own_modules(tmp_path, monkeypatch):
        for block in blocks_of(page):
            if block.language in PYTHON:
                run_python(block, namespace)
            elif block.marker == "run":
                for words in block.commands:
                    run_small(words, monkeypatch)


def run_python(block: Block, namespace: dict[str, Any]) -> None:
    """A block with a title is a file, another is run."""
    code = compile(block.text, block.place, "exec")
    if block.title:
        Path(block.title).write_text(block.text)
    elif block.marker != "parse":
        exec(code, namespace)


def run_small(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A command's main in this process, with flags that make it quick."""
    if words[0] == "make":
        words = known.make_command(words[1])
    found = known.module_of(words)
    if found is None:
        return
    module, args = found
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [module, *args, *known.SMALL.get(module, [])])
        try:
            import_module(module).main()
        except SystemExit as stop:
            assert not stop.code, f"{module} {' '.join(args)} ended with {stop.code}"


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in WITH_RUNS if any(b.marker == "run" for b in blocks_of(p))], ids=name)
def test_the_page_runs_as_typed(page: Path, tmp_path: Path) -> None:
    """Each command in a process of its own, at full size; minutes. `-rP` shows how long each took."""
    for block in blocks_of(page):
        if block.language in PYTHON and block.marker != "parse":
            target = tmp_path / (block.title or "block.py")
            target.write_text(block.text)
            if not block.title:
                subprocess.run([sys.executable, target], cwd=tmp_path, check=True, env=command_environment())
        for words in block.commands if block.marker == "run" else ():
            if words[0] == "make":
                words = known.make_command(words[1])
            if found := known.module_of(words):
                started = time.monotonic()
                line = [sys.executable, "-m", found[0], *found[1]]
                out = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, env=command_environment())
                assert out.returncode == 0, (
                    f"{block.place}: {' '.join(words)}\n{out.stdout[-2000:]}{out.stderr[-2000:]}"
                )
                print(f"{time.monotonic() - started:6.0f} s  {' '.join(words)}\n{out.stdout[-400:]}")
    if page.name == "tutorial.md":
        (results,) = (tmp_path / "runs/digits/pgd_vit_nano").glob("evaluation/*/results.json")
        robust = json.loads(results.read_text())["sections"]["accuracy"]["robust"]
        assert robust["interval"][0] > 0.2, "clearly above chance, which is 0.1"
