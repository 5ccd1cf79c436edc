"""`python -m mimir_fast.recipes [list]`: the recipes, with what the papers got from them."""

from mimir_fast.recipes import all_recipes
from mimir_fast.recipes.published import ADAPTIVE, NOT_BUILT


def main() -> None:
    """Print a table for each command, and what the papers have beyond them."""
    from rich.console import Console
    from rich.table import Column, Table

    console, recipes = Console(), all_recipes()
    for config_type in dict.fromkeys(recipe.config_type for recipe in recipes):
        command = config_type.__name__.removesuffix("Config").lower()
        table = Table(
            Column("recipe", no_wrap=True), "what", "published %",
            title=f"python -m mimir_fast.{command} --recipe", title_justify="left", box=None, padding=(0, 2, 0, 0),
        )  # fmt: skip
        for recipe in recipes:
            if recipe.config_type is config_type:
                table.add_row(recipe.name, recipe.note, recipe.expected)
        console.print(table)
        console.print()
    console.print("published %: natural / robust; AA is AutoAttack. Beside a pre-training recipe: after fine-tuning.\n")
    rest = Table(
        Column("published, without a recipe", no_wrap=True), "%", "why",
        box=None, padding=(0, 2, 0, 0),
    )  # fmt: skip
    for row, (numbers, why) in NOT_BUILT.items():
        rest.add_row(row, numbers, why)
    for row, numbers in ADAPTIVE.items():
        rest.add_row(row, numbers, "python -m mimir_fast.evaluate --suite paper")
    console.print(rest)


if __name__ == "__main__":
    main()
