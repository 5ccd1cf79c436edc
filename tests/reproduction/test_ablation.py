"""The machinery of an experiment: cells run, are found finished, and become a table."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mimir_fast.data import build_loader
from mimir_fast.methods.adv_mae import AdvMae
from mimir_fast.methods.mimir import Mimir
from mimir_fast.models.masked_model import build_masked_model
from mimir_fast.recipes import all_recipes, find_recipe
from mimir_fast.recipes.__main__ import main
from mimir_fast.reproduce import config_from, tabulate
from mimir_fast.reproduction.ablation import Ablation, Row, read_results, run_ablation, select
from mimir_fast.reproduction.fashion import SIZES, rows_of
from mimir_fast.reproduction.gradient_share import PenaltyAlone, gradient_share
from mimir_fast.reproduction.stages import APGD_PART, Judge
from mimir_fast.training.finetuning import FinetuneConfig
from mimir_fast.training.pretraining import PretrainConfig


@pytest.fixture(scope="module")
def ablation(tmp_path_factory: pytest.TempPathFactory) -> Ablation:
    """Two rows at one seed on 64 digits, three steps a stage: all the machinery, none of the waiting."""
    pretrain = find_recipe(PretrainConfig, "digits/mimir_vit_nano")
    data = replace(pretrain.data, limit=64)
    pretrain = replace(pretrain, data=data, run=replace(pretrain.run, max_steps=3, batch_size=16, device="cpu"))
    tune = find_recipe(FinetuneConfig, "digits/pgd_vit_nano")
    tune = replace(
        tune, data=data, probe=replace(tune.probe, num_images=0),
        run=replace(tune.run, max_steps=3, batch_size=16, device="cpu"),
    )  # fmt: skip
    rows = (Row("scratch", "none", None), Row("mimir", "MIMIR", pretrain, "76.30 / 47.60"))
    rules = Judge(8 / 255, num_images=20, autoattack_images=4, autoattack=APGD_PART)
    return Ablation(rows, tune, rules, 1, tmp_path_factory.mktemp("ablation"), "test", "a note")


def test_cells_run_once_and_become_a_table(ablation: Ablation) -> None:
    found = run_ablation(ablation, say=lambda line: None)
    assert [(r.row, r.seed) for r in found] == [("scratch", 0), ("mimir", 0)]
    assert all(total == 20 for r in found for name, (_, total) in r.accuracy.items() if name != "autoattack")
    assert set(found[1].share) == {"init", "trained"} and found[1].share["init"] > 0
    before = ablation.results.read_text()
    said: list[str] = []
    assert run_ablation(ablation, say=said.append) == found and not said
    assert ablation.results.read_text() == before
    tabulate(ablation)
    text = (ablation.folder / "table.md").read_text()
    assert "MIMIR" in text and "a note" in text and "76.30" in text
    assert (ablation.folder / "ablation.png").stat().st_size > 5000


def test_a_killed_line_is_run_again(ablation: Ablation) -> None:
    """What a kill cut short is no result, and the next line must not be lost with it."""
    run_ablation(ablation, say=lambda line: None)
    lines = ablation.results.read_text().splitlines(keepends=True)
    ablation.results.write_text(lines[0] + lines[1][: len(lines[1]) // 2])
    assert len(read_results(ablation.results)) == 1
    again = run_ablation(ablation, say=lambda line: None)  # the cell's own folders make this short
    assert len(again) == 2 and again[1].accuracy == json.loads(lines[1])["accuracy"]
    assert read_results(ablation.results) == again


def test_other_budgets_in_the_same_folder_are_refused(ablation: Ablation) -> None:
    run_ablation(ablation, say=lambda line: None)
    with pytest.raises(ValueError, match="rules differ"):
        run_ablation(replace(ablation, rules=replace(ablation.rules, eps=4 / 255)), say=lambda line: None)


@pytest.mark.parametrize("size", SIZES)
def test_the_fashion_rows_differ_in_pretraining_only(size: str) -> None:
    rows = rows_of(SIZES[size])
    assert len({row.name for row in rows}) == len(rows)
    runs = [row.pretrain.run for row in rows if row.pretrain is not None]
    assert all(run == runs[0] for run in runs), "equal budgets"
    with pytest.raises(ValueError, match="no row mimr; there are scratch"):
        select(rows, "mae,mimr")


def test_every_recipe_builds_and_names_are_found() -> None:
    recipes = all_recipes()
    assert len(recipes) > 60
    for recipe in recipes:
        assert isinstance(find_recipe(recipe.config_type, recipe.name), recipe.config_type)


def test_published_numbers_stand_beside_their_recipes() -> None:
    expected = {recipe.name: recipe.expected for recipe in all_recipes() if recipe.expected}
    assert "54.55 AA" in expected["cifar10/pgd_vit_base"]
    assert any(name.startswith("imagenet/") for name in expected) and any("tiny_imagenet" in n for n in expected)


def test_commands_parse() -> None:
    assert config_from(["fashion_ablation", "--size", "full", "--seeds", "5"]).seeds == 5  # type: ignore[union-attr]
    assert Path(config_from(["digits_demo"]).output_dir).name == "digits_demo"


def test_published_numbers_are_accuracies() -> None:
    """`natural / robust KIND [/ robust KIND]`, natural above robust, all in per cent."""
    published = [recipe.expected for recipe in all_recipes() if recipe.expected]
    assert len(published) > 20
    for text in published:
        natural, *robust = text.split(" / ")
        assert robust and all(re.fullmatch(r"\d\d\.\d\d (AA|PGD)", part) for part in robust), text
        assert all(float(part.split()[0]) < float(natural) < 100 for part in robust), text


def test_a_variant_differs_from_its_base_in_what_it_names() -> None:
    base = find_recipe(PretrainConfig, "cifar10/mimir_vit_tiny")
    variant = find_recipe(PretrainConfig, "cifar10/mimir_vit_tiny_renyi_1e-3")
    mi = replace(base.objective.mi, estimator="renyi", alpha=1.01, weight=1e-3)
    assert variant == replace(base, recipe=variant.recipe, objective=replace(base.objective, mi=mi))
    assert find_recipe(PretrainConfig, "cifar10/adv_mae_vit_tiny_10step").objective.attack.num_steps == 10


def test_the_list_fits_a_hundred_columns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    main()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    for recipe in all_recipes():
        assert any(line.split()[:1] == [recipe.name] for line in lines), f"{recipe.name} is cut short"
    assert any("Swin-L" in line and "not built" in line for line in lines)


def test_the_share_is_the_gradients_ratio() -> None:
    """λ scales it; at twice λ it is twice as large, and MIMIR's gradient is the sum of the two parts."""
    config = find_recipe(PretrainConfig, "digits/mimir_vit_nano")
    objective = replace(config.objective, mi=replace(config.objective.mi, estimator="nhsic", weight=0.1))
    model = build_masked_model(config.model, 32, 3)
    batch = next(iter(build_loader(config.data, split="train", batch_size=16)))
    once = gradient_share(objective, model, batch)
    twice = gradient_share(replace(objective, mi=replace(objective.mi, weight=0.2)), model, batch)
    assert once > 1e-3 and twice == pytest.approx(2 * once)
    weight = model.encoder.blocks[0].mlp.fc1.weight
    whole, plain, penalty = (
        torch.autograd.grad(method(model, batch, seed=0, step=0)["loss"], weight)[0]
        for method in (Mimir(objective), AdvMae(objective), PenaltyAlone(objective))
    )
    torch.testing.assert_close(whole, plain + penalty, rtol=1e-3, atol=1e-6)
