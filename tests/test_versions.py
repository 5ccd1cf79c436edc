"""What the package says of itself: where a number was made, and what to type next."""

import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from mimir_fast import versions
from mimir_fast.versions import environment, install_command, python_command, version_of


def test_environment_names_what_made_a_number() -> None:
    where = environment()
    assert where["packages"]["torch"] == version_of("torch") == torch.__version__.partition("+")[0]
    assert where["packages"]["apex"] == version_of("apex")
    assert {"python", "platform", "cpu", "threads", "gpu", "commit"} <= where.keys()


def test_python_command_is_one_that_works_where_the_user_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(python.with_name("python3")))
    monkeypatch.chdir(tmp_path)
    assert python_command() == ".venv/bin/python"  # not activated: `python` is another one
    monkeypatch.chdir("/")
    assert python_command() == str(python).removeprefix("/")
    monkeypatch.setenv("PATH", f"{python.parent}{os.pathsep}{os.environ['PATH']}")
    assert python_command() == "python"


def test_advice_asks_no_index_for_a_package_of_our_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Anybody may register that name, and code of theirs would run."""
    root = Path(__file__).resolve().parents[1]
    assert shlex.split(install_command("train")) == ["pip", "install", "-e", f"{root}[train]"]
    monkeypatch.setattr(versions, "__file__", str(tmp_path / "site-packages/mimir_fast/versions.py"))
    wanted = [Requirement(text) for text in shlex.split(install_command("eval"))[2:]]
    assert {"timm", "tyro", "pyautoattack"} <= {requirement.name for requirement in wanted}
    assert not [r for r in wanted if r.name.replace("_", "-") == "mimir-fast" or r.marker]
    said = [p for p in (root / "mimir_fast").rglob("*.py") if re.search(r"install[^\n]*mimir[-_]fast\[", p.read_text())]
    assert not said
