"""Named recipes: the rows of the papers' tables, and small ones that run anywhere.

A recipe is a function that returns a configuration; it is registered under `DATA/METHOD_FAMILY_SIZE[_VARIANT]`. The
published rows (published/) name the recipes that have their conditions, so the numbers stand beside the recipes.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from mimir_fast.recipes.published import Row, rows_of
from mimir_fast.validation import nearest

T = TypeVar("T")

_MODULES = ("digits", "fashion_mnist", "cifar10", "tiny_imagenet", "imagenet", "imagenet_finetuning")


@dataclass(frozen=True)
class Recipe:
    """A named configuration.

    Attributes:
        build: makes the configuration (its type tells the entry point it belongs to).
        note: one line: what it is, where it comes from.
        caveat: what separates it from the published numbers, or that none were published for exactly this.
    """

    name: str
    config_type: type
    build: Callable[[], Any]
    note: str
    caveat: str = ""

    @property
    def command(self) -> str:
        """Of `python -m mimir_fast.COMMAND --recipe`: pretrain or finetune."""
        return self.config_type.__name__.removesuffix("Config").lower()

    @property
    def expected(self) -> tuple[Row, ...]:
        """What was published for it: numbers, adversary, table and conditions."""
        return rows_of(self.command, self.name)


_RECIPES: dict[tuple[type, str], Recipe] = {}


def register(name: str, config_type: type, build: Callable[[], Any], note: str, caveat: str = "") -> None:
    """Add a recipe; the name is unique among those of its configuration type."""
    key = (config_type, name)
    if key in _RECIPES:
        raise ValueError(f"recipe {name} is registered twice")
    _RECIPES[key] = Recipe(name, config_type, build, note, caveat)


def all_recipes() -> list[Recipe]:
    """Every registered recipe of pre-training and fine-tuning, sorted by name."""
    for module in _MODULES:
        importlib.import_module(f"mimir_fast.recipes.{module}")
    return sorted(_RECIPES.values(), key=lambda recipe: recipe.name)


def find_recipe(config_type: type[T], name: str) -> T:
    """The configuration of a recipe, with its name written into it.

    Raises:
        ValueError: there is no such recipe; the message suggests the nearest.
    """
    known = {recipe.name: recipe for recipe in all_recipes() if recipe.config_type is config_type}
    if name not in known:
        raise ValueError(f"unknown recipe {name!r}{nearest(name, known)} `python -m mimir_fast.recipes list` shows all")
    return replace(known[name].build(), recipe=name)
