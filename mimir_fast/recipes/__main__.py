"""The recipes, what the papers got from them, and what of the papers is implemented.

python -m mimir_fast.recipes list [WORD]     recipes (whose name contains WORD), with published numbers beside them
python -m mimir_fast.recipes published       every row of the papers' tables (docs/published.md)
python -m mimir_fast.recipes table           what is implemented (docs/systems.md)
"""

import argparse
import sys
from collections.abc import Sequence

from mimir_fast.recipes import all_recipes
from mimir_fast.recipes.listing import print_list
from mimir_fast.recipes.pages import published_page, systems_page


def main(args: Sequence[str] = ()) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m mimir_fast.recipes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("list", "published", "table"), default="list")
    parser.add_argument("word", nargs="?", default="", help="of `list`: only recipes whose name contains it")
    chosen = parser.parse_args(list(args))
    if chosen.what == "published":
        print(published_page(), end="")
    elif chosen.what == "table":
        print(systems_page(), end="")
    else:
        print_list([recipe for recipe in all_recipes() if chosen.word in recipe.name])


if __name__ == "__main__":
    main(sys.argv[1:])
