"""The data sources by name: each file of `sources/` registers itself, and so may modules from outside.

Imports nothing of ours before a name is asked for, so that a configuration can be checked by whoever makes one.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from mimir_fast.registry import Registry

if TYPE_CHECKING:
    from mimir_fast.data.config import DataConfig
    from mimir_fast.data.sources.base import ImageSource

Builder = Callable[["DataConfig", str], "ImageSource"]
"""(configuration, "train" or "test") → the images of that split."""

SOURCES: Registry[Builder] = Registry("data source", f"{__name__.rpartition('.')[0]}.sources")


def register(name: str, build: Builder) -> None:
    """Add a source, for `--data.source NAME`.

    Raises:
        ValueError: the name is taken.
    """
    SOURCES.add(name, build)
