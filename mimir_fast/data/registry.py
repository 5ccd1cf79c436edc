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


_WITHOUT_ROOT: set[str] = set()


def register(name: str, build: Builder, *, root: bool = True) -> None:
    """Add a source, for `--data.source NAME`.

    Args:
        root: it reads files that lie under `--data.root`; that option is refused where it does nothing.
    Raises:
        ValueError: the name is taken.
    """
    SOURCES.add(name, build)
    if not root:
        _WITHOUT_ROOT.add(name)


def reads_root(name: str) -> bool:
    """True where the source of that name reads files under `--data.root`."""
    SOURCES.find(name)  # its file says so when it registers itself
    return name not in _WITHOUT_ROOT
