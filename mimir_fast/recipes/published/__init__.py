"""The papers' tables, row by row: numbers, their conditions, and the recipes that have them, or why there is none.

Three texts of MIMIR (arXiv 2312.04960) differ, and are told apart here: **a** has its authors' names and 14 tables,
**b** is anonymous, cites works of 2024 and has 12, **c** is the latest, of which only the numbers were at hand.
"""

import functools
import importlib
from dataclasses import dataclass
from typing import Literal

_TABLES = ("mimir_a", "mimir_b", "mimir_c", "others")


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        table: paper and table.
        system: data, model, pre-training → fine-tuning.
        numbers: (what, value); accuracies in per cent, `natural` first.
        adversary: of the judge.
        pretrain, finetune: names of the recipes that have the row's conditions, finetune with --init of pretrain.
        why_not: what is missing, where there is no recipe.
        remark: conditions that the recipe cannot have, or does not need to say.
        unresolved: in what the papers contradict themselves or each other.
    """

    table: str
    system: str
    numbers: tuple[tuple[str, float], ...]
    adversary: str = ""
    pretrain: str = ""
    finetune: str = ""
    why_not: str = ""
    remark: str = ""
    unresolved: str = ""

    def __post_init__(self) -> None:
        if not (self.pretrain or self.finetune) and not self.why_not:
            raise ValueError(f"{self.table}, {self.system}: name its recipes, or say why there are none")

    @property
    def values(self) -> str:
        """`84.82 natural / 57.51 PGD-20 / 52.96 AA`; empty where the papers give none."""
        return " / ".join(f"{value:g} {what}" if value > 100 else f"{value:.2f} {what}" for what, value in self.numbers)


def accuracies(natural: float, **robust: float) -> tuple[tuple[str, float], ...]:
    """(natural, …) with `pgd20=57.51` as PGD-20 and `aa` as AA."""
    names = {"aa": "AA", "pgd": "PGD"}
    attacks = ((names.get(what, what.replace("pgd", "PGD-")), value) for what, value in robust.items())
    return (("natural", natural), *attacks)


@functools.cache
def all_rows() -> tuple[Row, ...]:
    """Every row, table by table."""
    modules = (importlib.import_module(f"{__name__}.{name}") for name in _TABLES)
    return tuple(row for module in modules for row in module.ROWS)


def rows_of(command: Literal["pretrain", "finetune"] | str, recipe: str) -> tuple[Row, ...]:
    """The rows whose conditions a recipe has."""
    return tuple(row for row in all_rows() if getattr(row, command) == recipe)
