"""What the package says of itself: where a number was made, and what to type next."""

import os
import sys
from pathlib import Path

import pytest
import torch

from mimir_fast.versions import environment, python_command, version_of


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
