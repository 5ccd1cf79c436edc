"""The pages docs/systems.md and docs/published.md, as Markdown; a test holds the committed files to them."""

import itertools
from collections.abc import Iterable, Sequence

from mimir_fast.recipes.published import all_rows
from mimir_fast.recipes.systems import SYSTEMS

_SYSTEMS = """\
# What is implemented

Every system of the papers: where it comes from, a recipe to run it, the test that holds it, and the largest size that
was really trained by this project. Written by `python -m mimir_fast.recipes table`.

"""

_PUBLISHED = """\
# The papers' tables, row by row

Each row with its conditions: the recipes that have them (`python -m mimir_fast.pretrain --recipe …`, then
`python -m mimir_fast.finetune --recipe … --init RUN`), or why there is none. None of these numbers is ours. Three texts
of MIMIR (arXiv 2312.04960) differ: **a** has its authors' names and 14 tables, **b** is anonymous, cites works of 2024
and has 12, **c** is the latest, of which only numbers were at hand. Accuracies in per cent, natural first; AA is
AutoAttack standard. Written by `python -m mimir_fast.recipes published`.

"""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _code(*names: str) -> str:
    return " → ".join(f"`{name}`" for name in names if name)


def systems_page() -> str:
    """The text of docs/systems.md: one row for each implemented system."""
    return _SYSTEMS + _table(
        ("system", "source", "recipe", "test", "largest size run here"),
        ((s.name, s.source, _code(s.recipe), _code(s.test), s.largest) for s in SYSTEMS),
    )


def published_page() -> str:
    """The text of docs/published.md: one table for each table of the papers."""
    parts = [_PUBLISHED]
    for table, rows in itertools.groupby(sorted(all_rows(), key=lambda row: row.table), key=lambda row: row.table):
        lines = []
        for row in rows:
            said = [row.remark, f"**unresolved**: {row.unresolved}" if row.unresolved else ""]
            where = _code(row.pretrain, row.finetune) or f"no recipe: {row.why_not}"
            lines.append(
                (row.system, row.values or "none", row.adversary or "none", where, "; ".join(filter(None, said)))
            )
        parts.append(
            f"## {table}\n\n" + _table(("system", "published", "adversary", "recipes", "remark"), lines) + "\n"
        )
    return "".join(parts).rstrip("\n") + "\n"
