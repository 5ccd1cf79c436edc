"""What others register: modules from outside the package that bring methods, families, data sources or report topics.

A command imports them before it builds its parser, so that what they register stands in `--help`. Their names come from
`--import MODULE` and from the config.json of every run that the command line names, where training has saved them.
"""

import importlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import tyro

Imports = Annotated[tuple[str, ...], tyro.conf.arg(name="import", metavar="MODULE"), tyro.conf.UseAppendAction]
"""The type of the option `--import`, which may be given several times."""


def load_extensions(args: Sequence[str], *runs: str) -> tuple[str, ...]:
    """Import the modules that a command line asks for; their names, each once, those of saved runs first.

    Args:
        args: the command line; `--import NAME`, and words and values that are paths of runs or in runs.
        runs: further run folders, which need not exist.
    Raises:
        ValueError: no name of a module.
        ImportError: a module that is not there, or that fails; the message says who asks for it.
    """
    named = [value for flag, value in _options(args) if flag == "--import"]
    wanted: dict[str, str] = {}
    for path in dict.fromkeys([*runs, *(value for flag, value in _options(args) if flag != "--import")]):
        for name in saved_imports(path):
            wanted.setdefault(name, f"{path} was trained with it")
    for name in named:
        wanted[name] = "--import"
    for name, reason in wanted.items():
        import_extension(name, reason)
    return tuple(wanted)


def import_extension(name: str, reason: str = "--import") -> None:
    """Import a module from the working folder, PYTHONPATH or what is installed.

    Raises:
        ValueError, ImportError: see `load_extensions`.
    """
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"--import {name}: wanted the name of a module, as in `import my_method`, without .py")
    folder = os.getcwd()  # a console script has no working folder on its path, `python -m` has
    if folder not in sys.path and "" not in sys.path:
        sys.path.append(folder)
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"module {name!r} cannot be imported ({error}), and {reason}: start the command in the module's folder, or "
            "put that folder into PYTHONPATH"
            if reason != "--import"
            else f"--import {name}: {error}; looked for in {folder}, PYTHONPATH and the installed packages"
        ) from error


def saved_imports(path: str) -> tuple[str, ...]:
    """Modules that a run was trained with, by its folder or a path in it (a checkpoint); () for other paths."""
    place = Path(path)
    if not path or not place.exists():
        return ()
    for folder in (place, *place.parents[:2]):
        try:
            found = json.loads((folder / "config.json").read_text())
        except (OSError, ValueError):
            continue
        names = found.get("imports", []) if isinstance(found, dict) else []
        return tuple(name for name in names if isinstance(name, str)) if isinstance(names, list) else ()
    return ()


def _options(args: Sequence[str]) -> Iterable[tuple[str, str]]:
    """(flag, value) of `--flag value`, `--flag=value` and of words without a flag of their own."""
    flag = ""
    for arg in args:
        if arg.startswith("--"):
            flag, equals, value = arg.partition("=")
            if equals:
                yield flag, value
                flag = ""
        else:
            yield flag, arg
            # `--import` takes one name; other options may take several values.
            flag = "" if flag == "--import" else flag
