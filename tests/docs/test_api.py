"""The API reference: every public name is documented, and what the documentation says of parameters is true."""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from typing import Any

import pytest
from doc_blocks import ROOT

import mimir_fast

TARGET = re.compile(r"^::: (\S+)$", flags=re.M)
PAGES = sorted((ROOT / "docs/api").glob("*.md"))
TARGETS = [target for page in PAGES for target in TARGET.findall(page.read_text())]


def find(path: str) -> Any:
    """The object of a dotted path: the longest importable module, then attributes."""
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(path)


def public_members(module: Any) -> Iterator[tuple[str, Any]]:
    """Functions and classes defined in a module, and the classes' methods and properties."""
    for name, value in vars(module).items():
        ours = getattr(value, "__module__", None) == module.__name__
        if name.startswith("_") or not ours or not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        yield f"{module.__name__}.{name}", value
        for inner, member in vars(value).items() if inspect.isclass(value) else ():
            # A dataclass's field may hold a function; that is documented with the class.
            own = inspect.isfunction(member) and member.__name__ == inner
            if not inner.startswith("_") and (own or isinstance(member, property)):
                # getattr, so that the docstring of what it overrides counts.
                yield f"{module.__name__}.{name}.{inner}", getattr(value, inner)


def modules() -> list[str]:
    """Every public module of the package."""
    found = pkgutil.walk_packages(mimir_fast.__path__, "mimir_fast.")
    return [m.name for m in found if not any(part.startswith("_") for part in m.name.split("."))]


@pytest.mark.parametrize("name", [n for n in mimir_fast.__all__ if n != "__version__"])
def test_every_public_name_is_in_the_reference(name: str) -> None:
    value = getattr(mimir_fast, name)
    assert f"{value.__module__}.{value.__qualname__}" in TARGETS, f"add `::: …{name}` to a page of docs/api"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_the_reference_names_is_there(page: Any) -> None:
    for target in TARGET.findall(page.read_text()):
        assert inspect.getdoc(find(target)), f"{target} has no docstring"


def test_nothing_public_is_undocumented() -> None:
    bare = []
    for name in modules():
        module = importlib.import_module(name)
        bare += [name] if not module.__doc__ else []
        bare += [path for path, value in public_members(module) if not inspect.getdoc(value)]
    assert not bare, "give them docstrings"


ENTRY = re.compile(r"^ {4}(\*{0,2}\w+(?:, \*{0,2}\w+)*): ", flags=re.M)


@pytest.mark.parametrize("target", TARGETS)
def test_documented_parameters_exist(target: str) -> None:
    """mkdocstrings would check it, but for entries that describe several parameters at once."""
    value = find(target)
    members = [(target, value)] if not inspect.ismodule(value) else list(public_members(value))
    for path, member in members:
        text = inspect.getdoc(member) or ""
        if "Args:" not in text or isinstance(member, property):
            continue
        section = re.split(r"\n(?=\S)", text.split("Args:\n", 1)[1])[0]
        known = set(inspect.signature(member).parameters)
        for names in ENTRY.findall("\n" + section):
            unknown = {n.strip().lstrip("*") for n in names.split(",")} - known
            assert not unknown, f"{path} documents {', '.join(sorted(unknown))}, which it does not take"
