"""What others register: modules from outside the package that bring methods, families, data sources or report topics.

A command imports them before it builds its parser, so that what they register stands in `--help`. Their names come from
`--import MODULE` and from the config.json of every run that the command line names, where training has saved them.
"""

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated

from mimir_fast._tyro import tyro

Imports = Annotated[tuple[str, ...], tyro.conf.arg(name="import", metavar="MODULE"), tyro.conf.UseAppendAction]
"""The type of the option `--import`, which may be given several times."""


class RegisteredName(tyro.constructors.PrimitiveConstructorSpec[str]):
    """For `Annotated[str, RegisteredName(names)]`: an option whose choices are looked up when a parser is built.

    Args:
        names: makes the choices.
    """

    names: Callable[[], Iterable[str]]

    def __init__(self, names: Callable[[], Iterable[str]]) -> None:
        plain = tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="",
            instance_from_str=lambda args: args[0],
            is_instance=lambda value: isinstance(value, str),
            str_from_instance=lambda value: [value],
        )
        vars(self).update(vars(plain) | {"names": names})

    @property
    def choices(self) -> tuple[str, ...]:
        """The names that are registered now."""
        return tuple(self.names())

    @property
    def metavar(self) -> str:
        """What --help shows of them."""
        return f"{{{','.join(self.choices)}}}"


def load_extensions(args: Sequence[str], *runs: str) -> tuple[str, ...]:
    """Import the modules that a command line asks for; their names, each once, those of saved runs first.

    Args:
        args: the command line; `--import NAME`, and words and values that are paths of runs or in runs.
        runs: further run folders, which need not exist.
    Raises:
        ValueError: no name of a module.
        ImportError: a module that is not there, or that fails; the message says who asks for it.
    """
    wanted: dict[str, str] = {}
    for path in dict.fromkeys([*runs, *(value for flag, value in _options(args) if flag != "--import")]):
        for name in saved_imports(path):
            wanted.setdefault(name, path)
    for flag, name in _options(args):
        if flag == "--import":
            wanted[name] = ""
    for name, run in wanted.items():
        import_extension(name, run)
    return tuple(wanted)


def import_extension(name: str, run: str = "") -> None:
    """Import a module from the working folder, PYTHONPATH or what is installed.

    Args:
        run: path of the run that asks for it. It may have come from a stranger, so a module that lies around it is not
            imported: opening a run runs no code that came with it.
    Raises:
        ValueError, ImportError: see `load_extensions`.
    """
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"--import {name}: wanted the name of a module, as in `import my_method`, without .py")
    folder = search_working_folder()
    if run and _lies_around(name.partition(".")[0], Path(run)):
        raise ImportError(f"{run} asks for module {name!r}, which came with it: --import {name} if you trust it")
    try:
        importlib.import_module(name)
    except ImportError as error:
        if run:
            raise ImportError(
                f"{run} was trained with module {name!r}, which cannot be imported ({error}): start the command in the "
                "module's folder, or put that folder into PYTHONPATH"
            ) from error
        raise ImportError(
            f"--import {name}: {error}; looked for in {folder}, PYTHONPATH and the installed packages"
        ) from error


def search_working_folder() -> str:
    """Let Python find modules in the working folder, after all others; its path.

    `python -m` does so by itself, a console script such as mimir-fast does not.
    """
    folder = os.getcwd()
    if folder not in sys.path and "" not in sys.path:
        sys.path.append(folder)
    return folder


def _lies_around(package: str, run: Path) -> bool:
    """True for a folder that Python would import as a package and that holds the run, or has no __init__.py."""
    spec = importlib.util.find_spec(package) if package not in sys.modules else None
    if spec is None or spec.submodule_search_locations is None:
        return False
    places = [Path(place).resolve() for place in spec.submodule_search_locations]
    return spec.origin is None or any(run.resolve().is_relative_to(place) for place in places)


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
