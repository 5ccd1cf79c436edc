"""Things by name: the files of one package register theirs, and modules from outside add to them (`--import`)."""

import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from mimir_fast.validation import nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """Names and what they stand for.

    Args:
        what: in messages: `method`, `data source`.
        package: its modules are imported before anything is looked up; each registers what it holds.
    """

    def __init__(self, what: str, package: str) -> None:
        self.what, self.package = what, package
        self._entries: dict[str, T] = {}
        self._complete = False

    def add(self, name: str, entry: T) -> None:
        """Register an entry.

        Raises:
            ValueError: the name is taken.
        """
        if name in self._entries:
            raise ValueError(f"{self.what} {name} is registered twice")
        self._entries[name] = entry

    def all(self) -> dict[str, T]:
        """Every entry by name, sorted."""
        if not self._complete:
            self._complete = True  # a module may ask while it is being imported
            for module in pkgutil.iter_modules(importlib.import_module(self.package).__path__):
                importlib.import_module(f"{self.package}.{module.name}")
        return dict(sorted(self._entries.items()))

    def find(self, name: str) -> T:
        """The entry of that name.

        Raises:
            ValueError: there is none; the message suggests the nearest.
        """
        known = self.all()
        if name not in known:
            raise ValueError(
                f"unknown {self.what} {name!r}{nearest(name, known)} There are {', '.join(known)}; --import MODULE "
                "brings others"
            )
        return known[name]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """What is registered inside is forgotten afterwards, for tests."""
        before = self.all()
        try:
            yield
        finally:
            self._entries = before
