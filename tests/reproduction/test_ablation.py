"""The machinery of an experiment: cells run, are found finished, and become a table."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch

from mimir_fast.data import build_loader
from mimir_fast.methods.adv_mae import AdvMae
from mimir_fast.methods.mimir import Mimir
from mimir_fast.models.masked_model import build_masked_model
from mimir_fast.recipes import find_recipe
from mimir_fast.reproduce import config_from, tabulate
from mimir_fast.reproduction.ablation import Ablation, Row, read_results, run_ablation, select, whole_seeds
from mimir_fast.reproduction.fashion import SIZES, rows_of
from mimir_fast.reproduction.gradient_share import PenaltyAlone, gradient_share
from mimir_fast.reproduction.stages import APGD_PART, Judge
from mimir_fast.training.finetuning import FinetuneConfig, finetune
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


@pytest.mark.parametrize("save_every", [1, 100])
def test_a_cell_that_diverges_with_nothing_to_judge_has_no_accuracy(
    ablation: Ablation, tmp_path: Path, save_every: int
) -> None:
    """No checkpoint, or one of a model whose outputs are no numbers; the experiment goes on."""
    tune = ablation.finetune
    run = replace(tune.run, max_bad_steps=1, save_every=save_every, warmup_epochs=0.0)
    wild = replace(tune, run=run, optim=replace(tune.optim, lr=1e10))
    scratch, other = ablation.rows[0], replace(ablation.rows[0], name="other")
    found = run_ablation(
        replace(ablation, rows=(scratch, other), finetune=wild, folder=tmp_path), say=lambda line: None
    )
    assert [(r.row, r.diverged, r.accuracy) for r in found] == [
        (name, ["finetune"], {}) for name in ("scratch", "other")
    ]
    assert whole_seeds(found) == []


def test_a_cell_that_diverged_is_judged_by_its_last_weights(ablation: Ablation, tmp_path: Path) -> None:
    folder = tmp_path / "cells" / "scratch" / "seed0" / "finetune"
    tune = ablation.finetune
    config = replace(tune, init="", run=replace(tune.run, seed=0, output_dir=str(folder)))
    finetune(replace(config, run=replace(config.run, stop_after=2)))
    saved = json.loads((folder / "config.json").read_text())
    saved["run"]["stop_after"] = None
    (folder / "diverged.json").write_text(json.dumps({"first_bad": 2, "config": saved}))
    (found,) = run_ablation(replace(ablation, rows=ablation.rows[:1], folder=tmp_path), say=lambda line: None)
    assert found.diverged == ["finetune"] and found.accuracy["natural"][1] == 20
    assert "would do so again" in (folder.parent / "log.txt").read_text()


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


def test_commands_parse() -> None:
    assert config_from(["fashion_ablation", "--size", "full", "--seeds", "5"]).seeds == 5  # type: ignore[union-attr]
    assert Path(config_from(["digits_demo"]).output_dir).name == "digits_demo"


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


def test_the_intervals_in_the_docs_are_of_the_records() -> None:
    """Student's t of paired differences over three seeds, from unrounded accuracies."""
    docs = Path(__file__).parents[2] / "docs"
    records = (docs / "results/fashion_ablation_reduced/results.jsonl").read_text().splitlines()
    found: dict[str, dict[int, float]] = {}
    for cell in map(json.loads, records):
        right, images = cell["accuracy"]["pgd20"]
        found.setdefault(cell["row"], {})[cell["seed"]] = 100 * right / images
    page = " ".join((docs / "results.md").read_text().split())
    for row, other, words in (
        ("scratch", "adv_mae", "(interval {} to {})"),
        ("mimir_paper", "adv_mae", "their difference is −0.1 ({} to {})"),
        ("hsic_1e3", "adv_mae", "−0.4 ({} to {})"),
        ("mimir_official", "adv_mae", "−1.5 ({} to {})"),
        ("nhsic_1e-4", "adv_mae", "is not told from zero ({} to {})"),
        ("adv_mae", "mae", "(ours +0.3, {} to {})"),
    ):
        gaps = [found[row][seed] - found[other][seed] for seed in (0, 1, 2)]
        reach = 4.30265 * stdev(gaps) / 3**0.5
        low, high = (f"{mean(gaps) + sign * reach:+.1f}".replace("-", "−") for sign in (-1, 1))
        assert words.format(low, high) in page, row
