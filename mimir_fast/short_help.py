"""The first screen of `--help`: the options that most command lines have; `--help_all` shows every one.

An option's words are the first sentence under its field, read from the source: a dataclass keeps no docstrings of
fields.
"""

import ast
import inspect
import itertools
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mimir_fast.validation import is_bare

_COLUMN = 26


def short_help(config: Any, common: Sequence[str], usage: str, description: str) -> str:
    """The text of --help.

    Args:
        config: a (nested) dataclass with the defaults.
        common: the options to show, as they are typed without --, as far as the configuration has them.
        usage: how the command is called.
    """
    known = {name: (owner, field) for name, owner, field in _options(config)}
    common = [name for name in common if name in known]
    width = min(120, shutil.get_terminal_size().columns)
    lines = [f"usage: {usage} [OPTIONS]", "", *textwrap.wrap(description, width), ""]
    for name in common:
        owner, field = known[name]
        said = f"{_words(type(owner), field)} ({_typed(getattr(owner, field))})".strip()
        indent = " " * _COLUMN
        text = textwrap.wrap(said, width, initial_indent=indent, subsequent_indent=indent)
        head = f"  --{name}"
        lines += [head.ljust(_COLUMN) + text[0][_COLUMN:], *text[1:]] if len(head) < _COLUMN - 1 else [head, *text]
    rest = len(known) - len(common)
    return "\n".join([*lines, "", *textwrap.wrap(
        f"In brackets: what they are now, by recipe and defaults. --help_all shows the other {rest} options.", width
    )])  # fmt: skip


def _options(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(name as typed, the dataclass it is of, its field there)."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from _options(value, prefix if is_bare(field) else f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", config, field.name


def _words(kind: type, field: str) -> str:
    """What comes first under the field, and the choices that are not in there."""
    words = next(filter(None, (_docstrings(base).get(field) for base in kind.__mro__)), "")
    sentence = " ".join(words.split()).partition(". ")[0].rstrip(".")
    choices = _choices(kind, field)
    if all(name in sentence for name in choices):
        return sentence if choices else sentence.partition("; ")[0]
    return f"{sentence.partition('; ')[0]}: {', '.join(choices)}"


@cache
def _docstrings(kind: type) -> dict[str, str]:
    """Field → the string under it."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError):  # made at run time, of classes that have a source
        return {}
    body = next((node.body for node in tree.body if isinstance(node, ast.ClassDef)), [])
    return {
        node.target.id: after.value.value
        for node, after in itertools.pairwise(body)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
    }  # fmt: skip


def _choices(kind: type, field: str) -> list[str]:
    hint = get_type_hints(kind, include_extras=True)[field]
    named = next((note.choices for note in getattr(hint, "__metadata__", ()) if hasattr(note, "choices")), ())
    return [str(name) for name in named or (get_args(hint) if get_origin(hint) is Literal else ()) if name]


def _typed(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return "not given" if value in (None, "") else str(value)
