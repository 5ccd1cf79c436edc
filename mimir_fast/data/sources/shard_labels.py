"""The label that a .cls or .json member of a shard holds: a number from 0 on, or the class's name."""

import json

LABEL_BYTES = 2**20  # of a .cls or .json member; more is no label
_KEYS = ("label", "cls", "class", "target", "label_name", "class_name")


def parse_cls(content: bytes, where: str) -> int | str:
    """A number or a name of one line.

    Raises:
        ValueError: it is neither.
    """
    return _label(content, content, where)


def parse_json(content: bytes, where: str) -> int | str:
    """The first of `label`, `cls`, `class`, `target`, `label_name`, `class_name` that is there; -1 without.

    Raises:
        ValueError: no JSON object, or that entry is no label.
    """
    try:
        entries = json.loads(content)
        found = next((entries[key] for key in _KEYS if entries.get(key) is not None), -1)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{where} holds no class number: {content[:40]!r}") from error
    found = int(found) if isinstance(found, float) and found.is_integer() else found
    return _label(str(found).encode() if isinstance(found, (int, str)) else b"", content, where)


def _label(text: bytes, content: bytes, where: str) -> int | str:
    try:
        label = text.decode().strip()
    except UnicodeDecodeError:
        label = ""
    if not label or not label.isprintable() or len(label) > 200:
        raise ValueError(f"{where} holds no class number or name: {content[:40]!r}")
    try:
        return max(int(label), -1)
    except ValueError:
        return label
