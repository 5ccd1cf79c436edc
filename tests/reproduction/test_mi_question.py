"""The question what the mutual-information term does: statistics, decisions, the judge, and the whole in small."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mimir_fast.attacks.pgd import is_correct, pgd, random_start
from mimir_fast.attacks.rows import run_rows
from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.data.sources.base import MissingDataError
from mimir_fast.methods.adv_mae import AdvMaeConfig
from mimir_fast.reproduce import MiQuestion
from mimir_fast.reproduction.ablation import CellResult, claim_folder
from mimir_fast.reproduction.contrasts import contrast, holm, power
from mimir_fast.reproduction.latent_facts import effective_rank, explained
from mimir_fast.reproduction.mi_plan import Plan, arms_of, plan_of, primary_of, rows_of
from mimir_fast.reproduction.mi_question import Answers, best, cells_of, passes, run_question
from mimir_fast.reproduction.mi_report import LATENT, contrasts_of, plot_effects, plot_why, record_of, report
from mimir_fast.reproduction.quick_judge import PgdRows, judge_quickly
from mimir_fast.reproduction.same_delta import lines_of, same_delta
from mimir_fast.training.finetuning import finetune
from mimir_fast.training.health import TrainingDiverged


def cells(effects: dict[str, float], sd: float, seeds: int, generator: np.random.Generator) -> list[CellResult]:
    """Records of arms with these mean accuracies in per cent; seeds shift all arms alike, and each by sd / √2."""
    common = generator.normal(0, 3, seeds)
    return [
        CellResult(row, seed, {"pgd20": [round(100 * (50 + effect + common[seed] + own)), 10_000]})
        for row, effect in effects.items()
        for seed, own in enumerate(generator.normal(0, sd / 2**0.5, seeds))
    ]


def test_intervals_cover_and_equivalence_is_said_where_it_is() -> None:
    """120 experiments of 14 seeds, differences of s.d. 0.9. Three standard errors of 120 are 6 points at 95 %."""
    generator, pairs = np.random.default_rng(1), [("b", "a"), ("b", "d")]
    covered = resampled = same = different = 0
    for _ in range(120):
        records = cells({"a": 0.0, "b": 1.0, "d": 1.0}, 0.9, 14, generator)
        found = contrasts_of(records, pairs, "pgd20")
        covered += found["b", "a"].interval[0] <= 1 <= found["b", "a"].interval[1]
        resampled += found["b", "a"].bootstrap[0] <= 1 <= found["b", "a"].bootstrap[1]
        same += found["b", "d"].verdict == "equivalent"
        different += found["b", "a"].p_holm < 0.05
        assert found["b", "a"].p_holm >= found["b", "a"].p
    assert 107 <= covered < 120
    assert 99 <= resampled < 120, "percentiles of 14 values are a little narrow"
    assert same > 102, "two equal arms are equivalent within one point"
    assert different / 120 == pytest.approx(power(14, 0.9, 1.0, 0.025), abs=0.08)


def test_equivalence_is_rarely_said_at_its_margin() -> None:
    """At a true difference of the margin: in 5 % of the experiments."""
    generator = np.random.default_rng(2)
    said = sum(contrast(generator.normal(1.0, 0.9, 14).tolist(), margin=1.0, draws=1).equivalence < 0.05
               for _ in range(600))  # fmt: skip
    assert 14 <= said <= 46


def test_holm_steps_down() -> None:
    assert holm({"x": 0.04, "y": 0.01, "z": 0.03}) == {"x": 0.06, "y": 0.03, "z": 0.06}


def test_the_gate_asks_for_both_and_tuning_for_the_best() -> None:
    generator, level = np.random.default_rng(3), 0.05 / 3
    assert passes(cells({"adv_mae": 4, "scratch": 0, "noise_mae": 0}, 0.9, 8, generator), level)
    assert not passes(cells({"adv_mae": 4, "scratch": 0, "noise_mae": 4}, 0.9, 8, generator), level)
    assert not passes(cells({"adv_mae": -4, "scratch": 0, "noise_mae": 0}, 0.9, 8, generator), level)
    ahead = cells({"adv_mae": 4, "scratch": 0, "noise_mae": 0}, 0.9, 8, generator)
    assert not passes([replace(c, accuracy={}) if c.row == "adv_mae" else c for c in ahead], level), (
        "nothing to compare"
    )
    tried = {lr: [CellResult("a", 0, {"heldout": [right, 10]})] for lr, right in ((1.0, 4), (3.0, 6), (2.0, 6))}
    assert best(tried) == 2.0
    assert best(tried | {4.0: [CellResult("a", 0, {}, diverged=["pretrain"])]}) == 2.0


@pytest.mark.parametrize(("size", "data"), [("reduced", "fashion"), ("reduced", "cifar10"), ("full", "digits")])
def test_the_rows_have_one_attack_and_differ_in_the_penalty(size: str, data: str) -> None:
    plan = plan_of(size, data, "cpu")  # type: ignore[arg-type]
    rows = rows_of(plan, 2, 1e-3, 0.1)
    configs = [row.pretrain for row in rows.values() if row.pretrain is not None]
    attacks = [c.objective.attack for c in configs if isinstance(c.objective, AdvMaeConfig)]
    assert len(attacks) > 10 and all(attack == attacks[0] for attack in attacks)
    assert len({replace(c.run, micro_batch=None).max_steps for c in configs}) == 1
    assert {name for pair in primary_of(plan, 0.1) for name in pair} <= set(arms_of(plan, 0.1)) <= set(rows)
    penalties = {str(c.objective) + str(c.run.micro_batch) for c in configs}
    assert len(penalties) == len(configs), "two rows are the same"


def test_images_that_leave_are_those_that_pgd_breaks() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5))
    images, eps = torch.rand(40, 3, 4, 4), 0.05
    labels = model(images).argmax(1)
    start = random_start(images, eps, seed=3)
    wrong, _ = run_rows(PgdRows(model, images, labels, start, eps, 20), torch.arange(40))
    last = pgd(model, images, labels, LinfThreat(eps=eps, alpha=eps / 4, num_steps=20), start=start)
    broken = (~is_correct(model(last), labels)).nonzero()[:, 0]
    assert set(broken.tolist()) <= set(wrong.tolist()) and 0 < len(wrong) < 40
    search = PgdRows(model, images, labels, start, eps, 20)
    while not search.finished():
        _, x = search.step()
    torch.testing.assert_close(x, last)


def test_what_a_latent_holds() -> None:
    torch.manual_seed(0)
    tokens, noise = torch.randn(40, 6, 8), torch.randn(40, 6, 4)
    assert explained(tokens, tokens[..., :4]) > 0.999 and explained(tokens, noise) < 0.1
    assert explained(tokens, tokens[..., :4] + noise) == pytest.approx(0.5, abs=0.15)
    assert effective_rank(torch.randn(4000, 8)) == pytest.approx(8, abs=0.1)
    assert effective_rank(torch.randn(100, 1) @ torch.randn(1, 8)) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.ones(5, 3)) == 0


def test_the_report_has_rows_in_order_and_what_the_latents_hold(tmp_path: Path) -> None:
    """Of cells that two jobs ended in any order."""
    plan, generator = plan_of("reduced"), np.random.default_rng(4)
    arms = arms_of(plan, 0.01)
    found = cells({name: 50.0 * (name == "hsic_0.01") for name in reversed(arms)}, 0.1, 3, generator)
    found = [replace(c, measures=dict.fromkeys(LATENT, c.seed - 0.5 * (c.row == "hsic_0.01"))) for c in found]
    record = record_of(plan, Answers(1.5e-3, 0.01, 1, False, {"arms": [replace(c, environment={}) for c in found]}))
    text = report(record)
    assert [text.index(f"| {record['titles'][name]} |") for name in arms] == sorted(
        text.index(f"| {record['titles'][name]} |") for name in arms
    )
    (line,) = (line for line in text.splitlines() if line.endswith("| −0.5 (−0.5 to −0.5) |") and "− (a)" in line)
    assert line.startswith("| (b) HSIC") and line.count("−0.5 (−0.5 to −0.5)") == len(LATENT)
    assert "| < 0.001 |" in text
    plot_why(tmp_path / "why.png", record)
    assert (tmp_path / "why.png").stat().st_size > 5000


def test_the_report_says_what_diverged_and_at_which_level_an_interval_is() -> None:
    plan, generator = plan_of("reduced"), np.random.default_rng(5)
    names = ("scratch", "mae", "noise_mae", "adv_mae")
    assay = cells({name: 4.0 * (name == "adv_mae") for name in names}, 0.9, 8, generator)
    assay = [replace(c, environment={"commit": "abc", "cpu": "this one"}) for c in assay]
    stopped = [replace(c, diverged=["finetune"]) if (c.row, c.seed) == ("mae", 2) else c for c in assay]
    lost = [replace(c, accuracy={}, diverged=["pretrain"]) if (c.row, c.seed) == ("mae", 2) else c for c in assay]

    def text_of(found: list[CellResult]) -> str:
        return report(record_of(plan, Answers(1.5e-3, 0.01, 1, True, {"assay_1": found, "arms": []})))

    whole = text_of(assay)
    gaps = [a - b for a, b in zip(*([c.accuracy["pgd20"][0] / 100 for c in assay if c.row == r] for r in
            ("adv_mae", "noise_mae")), strict=True)]  # fmt: skip
    low, high = contrast(gaps, margin=1.0, level=0.05 / 3).interval
    assert f"{low:+.2f} to {high:+.2f}" in whole and "98.3 %" in whole and "abc on this one (32 cells)" in whole
    assert "iverged" not in whole and "verdict" not in whole, "the gate asks each interval by itself"
    assert "Diverged, and judged by the last weights that were saved: mae of seed 2 (finetune)." in text_of(stopped)
    assert "Diverged, with nothing left to judge: mae of seed 2 (pretrain)." in text_of(lost)
    assert "were saved" not in text_of(lost)
    tuning = [CellResult("adv_mae", 1000, {}, diverged=["finetune"], environment={})]
    stages = {"tuning_lr_0.003": tuning, "arms": []}
    told = report(record_of(plan, Answers(1.5e-3, 0.01, 1, True, stages)))
    assert "In the tuning: Diverged, with nothing left to judge: adv_mae of seed 1000 (finetune)." in told
    assert text_of(lost).count("| 7 |") > whole.count("| 7 |") == 0


def test_intervals_that_disagree_about_zero_are_said() -> None:
    """Of few and skewed differences the bootstrap's interval is the narrower."""
    found = contrast([0.1, 0.2, 0.1, 3.0], margin=1.0)
    assert found.interval[0] < 0 < found.bootstrap[0] and found.torn
    assert not contrast([1.0, 1.1, 0.9, 1.0], margin=1.0).torn


def test_a_tuning_cell_that_ended_early_is_not_judged(tmp_path: Path) -> None:
    """By what was looked at before its end, or not at all."""
    plan = small()
    stage = cells_of(plan, tmp_path, [rows_of(plan, 1, 1e-3, 0.1)["scratch"]], 1, 1e-3, (1000, 1), tuning=True)
    for lines in ([{"step": 1, "pgd": 0.5}], [{"step": 2, "loss": 1.0}]):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        with pytest.raises(ValueError, match="ended before its last step"):
            stage.judged(stage.rows[0], tmp_path, tmp_path)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 2, "pgd": 0.5}) + "\n")
    accuracy, _ = stage.judged(stage.rows[0], tmp_path, tmp_path)
    assert accuracy == {"heldout": [3, 6]}


def test_a_model_of_no_numbers_is_not_judged(tmp_path: Path) -> None:
    plan = small()
    run = replace(
        plan.finetune.run, output_dir=str(tmp_path), device="cpu", save_every=1, max_bad_steps=1, warmup_epochs=0.0
    )
    tune = replace(plan.finetune, run=run, optim=replace(plan.finetune.optim, lr=1e10))
    with pytest.raises(TrainingDiverged):
        finetune(tune)
    with pytest.raises(ValueError, match="not finite"):
        judge_quickly(tmp_path, tune.data, plan.rules, torch.device("cpu"))  # type: ignore[arg-type]


def test_missing_images_leave_nothing_behind(tmp_path: Path) -> None:
    plan = plan_of("reduced", "cifar10", root=str(tmp_path / "nowhere"))
    with pytest.raises(MissingDataError):
        run_question(plan, tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="fashion has a place of its own"):
        MiQuestion(data_root="data")


def test_images_may_move_between_two_starts(tmp_path: Path) -> None:
    for root in ("one", "two"):
        plan = plan_of("reduced", "cifar10", root=root)
        claim_folder(
            cells_of(plan, tmp_path, list(rows_of(plan, 1, 1e-3, 0.1).values()), 1, 1e-3, (0, 1), tuning=False)
        )
    with pytest.raises(ValueError, match="finetune, mae"):
        claim_folder(cells_of(plan, tmp_path, [rows_of(plan, 1, 2e-3, 0.1)["mae"]], 1, 2e-3, (0, 1), tuning=False))


def small() -> Plan:
    """Three steps on 64 digits, two budgets; the gate cannot be passed in so few."""
    plan = plan_of("reduced", "digits")
    tiny, tune = (
        replace(c, data=replace(c.data, limit=64), run=replace(c.run, max_steps=3, batch_size=16))
        for c in (plan.pretrain, plan.finetune)
    )
    rules = replace(plan.rules, num_images=30, autoattack_images=10, apgd_steps=3)
    return replace(
        plan, pretrain=tiny, finetune=tune, rules=rules, learning_rates=(1e-3,), budgets=(1, 2), tuning_seeds=1,
        assay_seeds=2, seeds=2, held_out=6, facts_images=20,
    )  # type: ignore[arg-type]  # fmt: skip


@pytest.mark.slow
def test_the_whole_question_in_small(tmp_path: Path) -> None:
    """One job or two: the same records; and a finished one is only read."""
    alone, shared = run_question(small(), tmp_path / "one"), run_question(small(), tmp_path / "two", 2)
    assert list(alone.stages) == ["tuning_lr_0.001", "tuning_share", "assay_1", "assay_2", "arms"]
    assert not alone.proven and alone.budget == 1
    for name, found in alone.stages.items():
        ours, theirs = ({(c.row, c.seed): (c.accuracy, c.measures) for c in s} for s in (found, shared.stages[name]))
        assert ours == theirs and len(ours) == len(found)
    (penalised,) = (c for c in alone.stages["arms"] if c.row == f"hsic_{alone.share:g}" and c.seed == 100)
    assert penalised.measures.keys() >= {"margin", "delta_r2", "rank", "share_mean"}
    record = record_of(small(), run_question(small(), tmp_path / "one", only_read=True))
    assert "did NOT hold" in report(record) and "(d) HSIC" in report(record)
    plot_effects(tmp_path / "effects.png", record)
    plot_why(tmp_path / "why.png", record)
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in ("effects", "why"))
    rows = rows_of(small(), alone.budget, alone.lr, alone.share)
    found = same_delta(small(), tmp_path / "one" / "arms", [rows["adv_mae"], rows["hsic_0.01"]], rows["adv_mae"])
    own = {c.seed: c.measures["delta_r2"] for c in alone.stages["arms"] if c.row == "adv_mae"}
    assert {seed: cell["attacked"] for seed, cell in found["adv_mae"].items()} == pytest.approx(own, abs=1e-6)
    assert len(lines_of(found, "adv_mae")) == 6


@pytest.mark.slow
def test_every_arm_of_the_full_size_in_small(tmp_path: Path) -> None:
    """What the size reduced leaves out: nHSIC, both shares, fixed λ, a part of the batch and the accumulated batch."""
    plan = replace(small(), whole=True, budgets=(1,), assay_seeds=2, facts_images=8)
    answers = run_question(plan, tmp_path, 2)
    arms = arms_of(plan, answers.share)
    assert {(c.row, c.seed) for c in answers.stages["arms"]} == {(row, seed) for row in arms for seed in (100, 101)}
    assert len(arms) == 13 and all(c.accuracy["pgd20"][1] == 30 for c in answers.stages["arms"])
    record = record_of(plan, answers)
    text = report(record)
    assert all(f"| {record['titles'][row]} |" in text for row in arms)
    assert text.count("primary PGD-20") == 1 and len(record["primary"]) == 4
    plot_effects(tmp_path / "effects.png", record)
    plot_why(tmp_path / "why.png", record)
