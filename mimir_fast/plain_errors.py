"""Errors of the commands as Python's: one line, options by their names in Python, no boxes of the parser.

`data.root does nothing while data.source is digits`, where the command line says `--data.root` and `--data.source`.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

_FRAME = "│╭╮╰╯─- "
_RULE = re.compile(r"[│╭╮╰╯─-]+")
# Of our commands: words joined by underscores and dots. `pip install --no-deps` is none.
_FLAG = re.compile(r"(?<![\w-])--([a-z]\w*(?:\.\w+)*)(?![\w-])")
# The parser lists the value of an unknown option like another option.
_VALUE = re.compile(r"(--[\w.]+), (?!--)")
# What the parser says behind the reason.
_BEHIND = ("For full helptext", "Argument helptext")
_SIMILAR = ("Perhaps you meant", "Arguments similar to")


def plain(words: str) -> str:
    """A message without the dashes of a command line; one with a command to type is left as it is."""
    return words if "-m mimir_fast" in words else _FLAG.sub(r"\1", words)


def reason_in_box(printed: str) -> str:
    """The reason in what the parser printed, a box with a title, the reason, similar options and where help is."""
    lines = [line.strip().strip("│").strip() for line in printed.splitlines()]
    rules = [number for number, line in enumerate(lines) if line and _RULE.fullmatch(line)]
    titled = next((number for number in rules if number and not lines[number].startswith(("╭", "╰"))), -1)
    rows = [line for line in lines[titled + 1 :] if line and not _RULE.fullmatch(line)]
    reason, similar, near = list[str](), list[str](), False
    for row in rows:
        if row.startswith(_BEHIND):
            near = False
            if not row.startswith(_BEHIND[1]):
                continue
            break
        if row.startswith(_SIMILAR):
            near = True
        elif near:
            similar += [row.split()[0].partition("=")[0]] * row.startswith("--")
        elif not row.startswith(("╭", "╰")):
            reason.append(row)
    said = " ".join(reason) or " ".join(row.strip(_FRAME) for row in rows)
    if said.startswith("Unrecognized"):
        said = _VALUE.sub(r"\1=", said)
    meant = f"; did you mean {' or '.join(dict.fromkeys(similar))}?" if similar else ""
    return plain(f"{said.rstrip('.')}{meant}")


@contextmanager
def in_python() -> Iterator[None]:
    """What is raised inside says `plain` words."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if len(error.args) == 1 and isinstance(error.args[0], str):
            error.args = (plain(error.args[0]),)
        raise
