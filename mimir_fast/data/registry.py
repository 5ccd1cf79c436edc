"""The data sources by name: each file of `sources/` registers itself, this one finds them; so may modules from outside.

Imports nothing of ours before a name is asked for, so that a configuration can be checked by whoever makes one.
"""

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

from mimir_fast.validation import nearest

if TYPE_CHECKING:
    from mimir_fast.data.config import DataConfig
    from mimir_fast.data.sources.base import ImageSource

Builder = Callable[["DataConfig", str], "ImageSource"]
"""(configuration, "train" or "test") → the images of that split."""

_SOURCES: dict[str, Builder] = {}


def register(name: str, build: Builder) -> None:
    """Add a source, for `--data.source NAME`; the name is unique.

    Raises:
        ValueError: it is taken.
    """
    if name in _SOURCES:
        raise ValueError(f"data source {name} is registered twice")
    _SOURCES[name] = build


def all_sources() -> dict[str, Builder]:
    """Every source by name."""
    _import_all()
    return dict(sorted(_SOURCES.items()))


def find_source(name: str) -> Builder:
    """The builder of that source.

    Raises:
        ValueError: there is none; the message suggests the nearest.
    """
    known = all_sources()
    if name not in known:
        raise ValueError(
            f"unknown source {name!r}{nearest(name, known)} Known: {', '.join(known)}; --import brings others"
        )
    return known[name]


@cache
def _import_all() -> None:
    package = f"{__name__.rpartition('.')[0]}.sources"
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")
