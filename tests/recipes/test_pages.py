"""The generated pages of the docs are what the commands print."""

from pathlib import Path

import pytest

from mimir_fast.methods.registry import all_methods
from mimir_fast.models.families import all_families
from mimir_fast.recipes import all_recipes
from mimir_fast.recipes.__main__ import main
from mimir_fast.recipes.published import all_rows
from mimir_fast.recipes.systems import SYSTEMS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("page", "command"), [("systems", "table"), ("published", "published")])
def test_the_committed_page_is_what_the_command_prints(
    page: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main([command])
    same = capsys.readouterr().out == (ROOT / "docs" / f"{page}.md").read_text()
    assert same, f"write it anew: python -m mimir_fast.recipes {command} > docs/{page}.md"


def test_every_row_of_the_papers_is_on_the_page() -> None:
    page = (ROOT / "docs/published.md").read_text()
    for row in all_rows():
        assert f"| {row.system} | {row.values or 'none'} |" in page


def test_systems_have_a_recipe_and_a_test_file() -> None:
    names = {recipe.name for recipe in all_recipes()}
    for system in SYSTEMS:
        assert system.recipe in names, system.name
        assert (ROOT / system.test).is_file(), system.name


def test_every_family_and_method_is_a_system() -> None:
    """Each is named by the recipe of some row."""
    recipes = [system.recipe.partition("/")[2] for system in SYSTEMS]
    for family in all_families():
        assert any(f"_{family}_" in recipe for recipe in recipes), family
    for method in [*all_methods("pretrain"), *all_methods("finetune")]:
        assert any(recipe.startswith(f"{method}_") for recipe in recipes), method
