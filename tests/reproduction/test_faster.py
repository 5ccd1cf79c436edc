"""Robust training at equal compute: the budgets are equal, the machinery resumes, the page has the records' numbers."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest

from mimir_fast.recipes import find_recipe
from mimir_fast.reproduce import config_from
from mimir_fast.reproduction import faster
from mimir_fast.reproduction.faster import Arm, Estimate, Experiment, arms_of, run_faster, tables, tunings
from mimir_fast.training.finetuning import FinetuneConfig
from mimir_fast.training.flops import flops_of_step

TUNED = ("pgd", "free")
DOCS = Path(__file__).parents[2] / "docs"


def tiny() -> Experiment:
    """Digits, but 64 of them, and steps that take a second."""
    whole = faster.digits()
    data = replace(whole.finetune.data, limit=64)
    first, tune = (
        replace(config, data=data, run=replace(config.run, batch_size=16, max_steps=2))
        for config in (whole.pretrain, whole.finetune)
    )
    return Experiment(first, tune, 64, "Few digits", replace(whole.rules, num_images=20))


@pytest.fixture(scope="module")
def arms() -> dict[str, Arm]:
    return {arm.name: arm for arm in arms_of(faster.digits())}


def test_every_arm_has_the_operations_of_its_baseline(arms: dict[str, Arm]) -> None:
    budget = arms["pgd"].flops
    assert len(arms) == 8
    for name, arm in arms.items():
        steps, run = arm.flops["finetune" if arm.finetune else "pretrain"], (arm.finetune or arm.pretrain).run  # type: ignore[union-attr]
        wanted = budget["finetune"] if arm.finetune else sum(budget.values())
        assert steps == pytest.approx(wanted, rel=0.51 / run.max_steps), name  # type: ignore[operator]
        assert run.warmup_epochs == pytest.approx(0.1 * run.epochs), name
    tuned = [arm.finetune for arm in arms.values() if arm.finetune]
    assert all(one.optim == tuned[0].optim and one.data == tuned[0].data for one in tuned)


def test_operations_of_a_step() -> None:
    """A backward pass to weights costs two forward passes, to the images one; the embedding's gradients aside."""
    base = find_recipe(FinetuneConfig, "digits/pgd_vit_nano")
    base = replace(base, probe=replace(base.probe, num_images=0))
    wanted = ("pgd", "every2", "free", "visible")
    flops = {name: flops_of_step(config) for name, (_, config) in tunings(base).items() if name in wanted}
    natural = flops_of_step(replace(base, method="natural"))
    assert flops["pgd"] == pytest.approx((1 + 5 * 2 / 3) * natural, rel=0.03)
    assert flops["every2"] == pytest.approx((flops["pgd"] + natural) / 2)
    assert natural <= flops["free"] < 1.05 * natural
    # 9 of 17 tokens in four of five attack steps.
    assert flops["visible"] == pytest.approx((1 + 2 / 3 * (1 + 4 * 9 / 17)) * natural, rel=0.03)
    growing = replace(base.objective, attack=replace(base.objective.attack, ramp_steps=9))
    with pytest.raises(ValueError, match=r"attack\.ramp_steps"):
        flops_of_step(replace(base, objective=growing))


@pytest.mark.parametrize("single", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["tuned", "one_stage_too"])
def test_an_experiment_resumes_and_becomes_tables(
    single: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(faster.EXPERIMENTS, "digits", tiny)
    monkeypatch.setattr(faster, "tunings", lambda base: {n: one for n, one in tunings(base).items() if n in TUNED})
    said: list[str] = []
    run_faster("digits", tmp_path, int(single), 1, run=True, say=said.append)
    record = json.loads((tmp_path / "results.json").read_text())
    stages = {cell["row"]: set(cell["cpu_seconds"]) - {"judge"} for cell in record["cells"]}
    assert stages.pop("single_stage", {"pretrain"}) == {"pretrain"}
    # The second fine-tuning starts from the weights of the first.
    assert stages == {"pgd": {"pretrain", "finetune"}, "free": {"finetune"}}
    text = (tmp_path / "table.md").read_text()
    assert text == tables(record) == said[-1] and "Few digits" in text and ("one stage" in text) == single
    run_faster("digits", tmp_path, 1, 1, run=False, say=said.append)
    assert said[-1] == text


def test_an_interval_is_students() -> None:
    values = (60.0, 62.0, 67.0)
    reach = 4.30265 * ((9 + 1 + 16) / 2) ** 0.5 / 3**0.5
    assert Estimate(values).reach == pytest.approx(reach, rel=1e-5)
    assert Estimate(values).text() == f"63.0 ({63 - reach:.1f} to {63 + reach:.1f})"
    assert Estimate((99.0, 100.0)).text() == "99.5 (93.1 to 100.0)"
    assert Estimate((-1.5,)).text("+") == "−1.5" and Estimate((1.5,)).text("+") == "+1.5"


def test_commands_parse() -> None:
    assert config_from(["faster", "--data", "fashion", "--seeds", "2"]).seeds == 2  # type: ignore[union-attr]


@pytest.mark.parametrize("path", sorted(DOCS.glob("results/faster_*/results.json")), ids=lambda p: p.parent.name)
def test_the_tables_in_the_docs_are_of_the_records(path: Path) -> None:
    record = json.loads(path.read_text())
    assert tables(record) in (DOCS / "results.md").read_text()
    cells = [cell for cell in record["cells"] if cell["row"] == "pgd"][:3]
    robust = mean(100 * right / images for right, images in (cell["accuracy"]["pgd20"] for cell in cells))
    assert f"| {robust:.1f} (" in tables(record)
