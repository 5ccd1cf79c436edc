"""The recipes, what the papers got from them, and what of the papers is implemented.

python -m mimir_fast.recipes list            data sets, families, methods and sizes that have recipes
python -m mimir_fast.recipes list WORD       recipes whose name contains WORD, with published numbers beside them
python -m mimir_fast.recipes published       every row of the papers' tables (docs/published.md)
python -m mimir_fast.recipes table           what is implemented (docs/systems.md)
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from mimir_fast._tyro import tyro
from mimir_fast.cli import parse, run
from mimir_fast.extensions import Imports, load_extensions
from mimir_fast.recipes import all_recipes
from mimir_fast.recipes.listing import overview, print_list
from mimir_fast.recipes.pages import published_page, systems_page


@dataclass
class RecipesConfig:
    """The recipes, what the papers got from them, and what of the papers is implemented."""

    what: Annotated[Literal["list", "published", "table"], tyro.conf.Positional] = "list"
    """list: recipes, and with a WORD the published numbers beside them; published: every row of the papers' tables
    (docs/published.md); table: what is implemented (docs/systems.md)."""
    word: Annotated[str, tyro.conf.Positional] = ""
    """Of `list`: show each recipe whose name contains it, or `all`; left out, one line a data set and family."""
    imports: Imports = ()
    """Module that registers recipes or methods of your own."""


def main(args: Sequence[str] | None = None) -> None:
    """The command: print the list or the page that the line names."""
    load_extensions(sys.argv[1:] if args is None else args)
    chosen = parse(RecipesConfig, args, prog="python -m mimir_fast.recipes")
    if chosen.what == "published":
        print(published_page(), end="")
    elif chosen.what == "table":
        print(systems_page(), end="")
    elif not chosen.word:
        print(overview(all_recipes()))
    else:
        print_list([recipe for recipe in all_recipes() if chosen.word == "all" or chosen.word in recipe.name])


if __name__ == "__main__":
    run(main)
