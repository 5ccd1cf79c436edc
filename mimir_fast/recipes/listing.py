"""The list of recipes on a terminal."""

from mimir_fast.recipes import Recipe

_SHOWN = 2


def published(recipe: Recipe) -> str:
    """The first rows, how many more there are, and the caveat; `?` marks what the papers leave unresolved."""
    rows = recipe.expected
    lines = [f"{row.values}{' ?' if row.unresolved else ''} ({row.table})" for row in rows[:_SHOWN] if row.numbers]
    if len(rows) > _SHOWN:
        lines.append(f"and {len(rows) - _SHOWN} more rows")
    return "\n".join([*lines, *([recipe.caveat] if recipe.caveat else [])])


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
