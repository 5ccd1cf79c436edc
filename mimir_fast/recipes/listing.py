"""The lists of recipes on a terminal: one line for a data set and family, or one row for a recipe."""

import itertools
from typing import Any

from mimir_fast.recipes import Recipe

_SHOWN = 2


def published(recipe: Recipe) -> str:
    """The first rows, how many more there are, and the caveat; `?` marks what the papers leave unresolved."""
    rows = recipe.expected
    lines = [f"{row.values}{' ?' if row.unresolved else ''} ({row.table})" for row in rows[:_SHOWN] if row.numbers]
    if len(rows) > _SHOWN:
        lines.append(f"and {len(rows) - _SHOWN} more rows")
    return "\n".join([*lines, *([recipe.caveat] if recipe.caveat else [])])


def overview(recipes: list[Recipe]) -> str:
    """How the recipes' names are put together: for each command one line a data set and encoder family, and how many
    recipes it has."""
    lines = []
    for command in dict.fromkeys(recipe.command for recipe in recipes):
        lines.append(f"python -m mimir_fast.{command} --recipe DATA/METHOD_FAMILY_SIZE[_VARIANT]")
        configs = [(recipe, recipe.build()) for recipe in recipes if recipe.command == command]
        table = [("data", "family", "n", "sizes", "methods")]
        for (data, family), group in itertools.groupby(
            sorted(configs, key=lambda pair: _place(*pair)), key=lambda pair: _place(*pair)
        ):
            found = [config for _, config in group]
            methods, sizes = (dict.fromkeys(names) for names in (
                (config.method for config in found), (config.model.encoder for config in found)
            ))  # fmt: skip
            table.append((data, family, str(len(found)), " ".join(sizes), " ".join(methods)))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines += ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table] + [""]
    return "\n".join([
        *lines, "python -m mimir_fast.recipes list WORD    those with WORD in their names, with published numbers",
        "python -m mimir_fast.recipes list all     every one",
    ])  # fmt: skip


def _place(recipe: Recipe, config: Any) -> tuple[str, str]:
    return recipe.name.partition("/")[0], config.model.family


def print_list(recipes: list[Recipe]) -> None:
    """A table for each command."""
    from rich.console import Console
    from rich.table import Column, Table

    console = Console()
    if not recipes:
        console.print("no recipe has that in its name; `python -m mimir_fast.recipes list` shows all")
    for command in dict.fromkeys(recipe.command for recipe in recipes):
        table = Table(
            Column("recipe", no_wrap=True), "what", "published, %",
            title=f"python -m mimir_fast.{command} --recipe", title_justify="left", box=None, padding=(0, 2, 0, 0),
        )  # fmt: skip
        for recipe in recipes:
            if recipe.command == command:
                table.add_row(recipe.name, recipe.note, published(recipe))
        console.print(table)
        console.print()
    console.print(
        "Beside a pre-training recipe: after the row's fine-tuning. AA is AutoAttack standard; `?`: the papers "
        "contradict themselves. Conditions of every row, and rows without a recipe: "
        "python -m mimir_fast.recipes published",
        markup=False,
    )
