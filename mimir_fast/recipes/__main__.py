"""`python -m mimir_fast.recipes [list]`: the recipes, with what the papers got from them."""

from mimir_fast.recipes import all_recipes


def main() -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(Column("recipe", no_wrap=True), "command", "what", "published natural / robust %")
    for recipe in all_recipes():
        command = recipe.config_type.__name__.removesuffix("Config").lower()
        table.add_row(recipe.name, command, recipe.note, recipe.expected)
    Console().print(table)


if __name__ == "__main__":
    main()
