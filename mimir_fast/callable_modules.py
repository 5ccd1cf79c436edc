"""Commands as functions: `mimir_fast.pretrain` is the module that `python -m` runs, and can be called."""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """A module that is called as the function of its name in `mimir_fast.api`."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return getattr(import_module("mimir_fast.api"), self.__name__.rpartition(".")[2])(*args, **options)


def make_callable(name: str) -> None:
    """Let a module, by its name, be called. Python allows exactly this change of a module's class."""
    sys.modules[name].__class__ = CallableModule
