"""What does the mutual-information term do? Tuning, an assay, and arms that differ in the term alone.

    tuning     learning rate, then the penalty's share: by PGD-10 on training images that are held out, on own seeds
    assay      scratch, MAE, noise-MAE, adv-MAE at growing budgets, until adv-MAE is ahead of scratch and of noise-MAE
    arms       (a) adv-MAE; (b) HSIC and (c) nHSIC at a share of the gradient; (d) their placebo, permuted images; (e)
               the paper's fixed λ; on seeds of their own

Every choice is a function of the records of the stage before; the protocol that says which, and why, was committed
before the first run: docs/results/mi_question/PROTOCOL.md. Cells, locks and records are the ablation's.

    OUTPUT/tuning_lr  tuning_share  assay_1 assay_2 assay_4  arms      results.json  table.md  effects.png  why.png
"""

import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, Literal, TypeVar

import torch

from mimir_fast.data import build_source
from mimir_fast.evaluation.images import load_images
from mimir_fast.methods.mimir import MimirConfig, apply_preset
from mimir_fast.recipes import cifar10
from mimir_fast.reproduction.ablation import (
    Ablation,
    CellResult,
    Row,
    claim_folder,
    read_results,
    run_ablation,
    whole_seeds,
)
from mimir_fast.reproduction.contrasts import LEVEL, contrast
from mimir_fast.reproduction.fashion import EPS, SIZES, SizeName, finetune_base, pretrain_base
from mimir_fast.reproduction.faster import digits
from mimir_fast.reproduction.latent_facts import latent_facts
from mimir_fast.reproduction.quick_judge import QuickJudge, judge_quickly
from mimir_fast.reproduction.stages import Interrupted, Say
from mimir_fast.reproduction.tables import accuracies
from mimir_fast.training.finetuning import FinetuneConfig
from mimir_fast.training.loggers import read_lines
from mimir_fast.training.pretraining import PretrainConfig
from mimir_fast.training.run_config import RunConfig
from mimir_fast.world import chosen

Config = TypeVar("Config", PretrainConfig, FinetuneConfig)
DataName = Literal["fashion", "cifar10", "digits"]
TUNING_SEED, ASSAY_SEED, ARMS_SEED = 1000, 0, 100
"""The first seed of each stage; none is used twice."""


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first run.

    Attributes:
        pretrain, finetune: of adv-MAE at budget 1, but learning rate, seed and folder.
        rules: the judge's.
        learning_rates: peaks of both stages, of which one is chosen; shares: of the penalty's gradient.
        budgets: factors of the steps of both stages, smallest first.
        held_out: training images that tuning is judged by.
        facts_images: test images for what the latent holds.
        whole: all arms of the question, in place of a, b and d at one share.
    """

    data: DataName
    size: SizeName
    pretrain: PretrainConfig
    finetune: FinetuneConfig
    rules: QuickJudge
    device: str = "auto"
    learning_rates: tuple[float, ...] = (7.5e-4, 1.5e-3, 3e-3)
    shares: tuple[float, ...] = (1e-2, 1e-1)
    budgets: tuple[int, ...] = (1, 2, 4)
    tuning_seeds: int = 2
    assay_seeds: int = 8
    seeds: int = 14
    held_out: int = 512
    facts_images: int = 512
    whole: bool = False

    @property
    def level(self) -> float:
        """Of the assay's intervals: there are as many looks as budgets."""
        return LEVEL / len(self.budgets)


def plan_of(size: SizeName, data: DataName = "fashion", device: str = "auto", root: str = "data") -> Plan:
    """The plan of that size; `reduced` runs on CPUs, a thread a job. CIFAR-10 is read from `root`, all else its own."""
    device = "cpu" if size == "reduced" else device
    first: PretrainConfig
    if data == "digits":
        small = digits()
        first = small.with_steps(small.pretrain, small.pretrain.run.max_steps or 0)
        tune = small.with_steps(small.finetune, small.finetune.run.max_steps or 0)
        rules = QuickJudge(small.rules.eps, None, 300, batch_size=128)
    else:
        first, tune = pretrain_base(SIZES[size]), finetune_base(SIZES[size])
        if data == "cifar10":  # as many images, and all else the same
            images = replace(cifar10.data(), root=root, limit=tune.data.limit, augment="none")
            first, tune = replace(first, data=images), replace(tune, data=images)
        rules = QuickJudge(EPS, 2000, 500, batch_size=128 if size == "reduced" else 500)
    rules = replace(rules, apgd_steps=50, apgd_targets=3) if size == "reduced" else rules
    plan = Plan(data, size, first, tune, rules, device, whole=size == "full")
    if (data, size) == ("cifar10", "reduced"):  # what the protocol says of pilots, and of what two cores can do
        return replace(plan, budgets=(2,), learning_rates=(2e-4, 4e-4, 8e-4))
    return plan


def scaled(plan: Plan, config: Config, budget: int, lr: float) -> Config:
    """A configuration with `budget` times the steps and this learning rate."""
    precision = "fp32" if plan.device == "cpu" else config.run.precision
    run = replace(
        config.run, max_steps=budget * (config.run.max_steps or 0), device=plan.device, precision=precision,
        log_every=16, save_every=200, keep_last=1,
    )  # fmt: skip
    return replace(config, run=run, optim=replace(config.optim, lr=lr))


def rows_of(plan: Plan, budget: int, lr: float, share: float) -> dict[str, Row]:
    """Every row by name; all with one attack, budget and learning rate, those of the penalty differ in it alone."""
    base = scaled(plan, replace(plan.pretrain, method="mimir"), budget, lr)
    objective: MimirConfig = apply_preset(base.objective, "paper")
    base = replace(base, objective=objective)

    def method(name: str) -> PretrainConfig:
        return replace(base, method=name)

    def penalty(run: RunConfig = base.run, **mi: Any) -> PretrainConfig:
        return replace(base, run=run, objective=replace(objective, mi=replace(objective.mi, **mi)))

    noise = method("noise_mae")
    noise.objective.eps = objective.attack.eps  # type: ignore[attr-defined]
    rows = [
        Row("scratch", "none (from scratch)", None),
        Row("mae", "MAE", method("mae")),
        Row("noise_mae", "noise-MAE", noise),
        Row("adv_mae", "(a) adv-MAE, no penalty", method("adv_mae")),
    ]
    for name, letter, title in (("hsic", "b", "HSIC"), ("nhsic", "c", "nHSIC")):
        for s in plan.shares:
            own: dict[str, Any] = {"estimator": name, "share": s}
            rows += [
                Row(f"{name}_{s:g}", f"({letter}) {title}, share {s:g}", penalty(**own)),
                Row(
                    f"{name}_{s:g}_permuted", f"(d) {title}, share {s:g}, permuted", penalty(**own, pairing="permuted")
                ),
            ]
        rows.append(Row(f"{name}_fixed", f"(e) {title}, λ 1e-5", penalty(estimator=name, weight=1e-5)))
    micro = replace(base.run, micro_batch=max(2, base.run.batch_size // 8))
    own = {"estimator": "nhsic", "share": share}
    rows += [
        Row("nhsic_parts", f"(c) share {share:g}, an eighth of the batch an estimate", penalty(micro, **own)),
        Row("nhsic_whole", f"(c) share {share:g}, accumulated", penalty(micro, **own, accumulated=True)),
    ]
    return {row.name: row for row in rows}


def arms_of(plan: Plan, share: float) -> tuple[str, ...]:
    """Names of the rows of the last stage."""
    if not plan.whole:
        return ("adv_mae", f"hsic_{share:g}", f"hsic_{share:g}_permuted")
    names = rows_of(plan, 1, 1e-3, share)
    return tuple(name for name in names if name not in ("scratch", "mae", "noise_mae"))


def primary_of(plan: Plan, share: float) -> tuple[tuple[str, str], ...]:
    """The contrasts that Holm's correction is over: does it help (b − a), and because of information (b − d)?"""
    names = ("hsic", "nhsic") if plan.whole else ("hsic",)
    own = [f"{name}_{share:g}" for name in names]
    return tuple((name, other) for name in own for other in ("adv_mae", f"{name}_permuted"))


def secondary_of(plan: Plan, share: float) -> tuple[tuple[str, str], ...]:
    """Contrasts that are described and decide nothing: every other arm against (a), and one estimate against parts."""
    known = {*primary_of(plan, share)}
    pairs = [(name, "adv_mae") for name in arms_of(plan, share) if name != "adv_mae"]
    pairs += [("nhsic_whole", "nhsic_parts")] * plan.whole
    return tuple(pair for pair in pairs if pair not in known)


@dataclass(frozen=True)
class Cells(Ablation):
    """The cells of a stage.

    Attributes:
        tuning: judged by held-out training images; else by test images, and for what the latent holds.
        facts_images: for that.
    """

    tuning: bool = False
    facts_images: int = 0

    def judged(self, row: Row, run: Path, folder: Path) -> tuple[dict[str, list[int]], dict[str, float]]:
        """{"heldout": …} of the probe; or `natural`, `pgd20`, `apgd`, and {"margin", what latent and shares were}."""
        if self.tuning:
            last = [line for line in read_lines(run / "metrics.jsonl") if "pgd" in line][-1]
            count = len(build_source(self.finetune.data, "held_out"))  # a small data set has fewer than it was asked
            return {"heldout": [round(last["pgd"] * count), count]}, {}
        rules, data = self.rules, self.finetune.data
        assert isinstance(rules, QuickJudge)
        device = torch.device(chosen(self.finetune.run.device))
        accuracy, measures = judge_quickly(run, data, rules, device)
        if row.pretrain is not None and self.facts_images:
            first, images = folder / "pretrain", load_images(data).evenly(self.facts_images)
            measures |= latent_facts(row.pretrain, first, images, rules.eps) | shares_over_training(first)
        return accuracy, measures


def shares_over_training(run: Path) -> dict[str, float]:
    """{"share_mean", "share_first", "share_last"}: logged shares, all and the first and last quarter; {} without.

    Step 0, of which no ratio is known, has λ = 0 and is left out.
    """
    lines = read_lines(run / "metrics.jsonl")
    found = [line["mi_share"] for line in lines if "mi_share" in line and line["step"] > 0]
    if not found:
        return {}
    quarter = max(1, len(found) // 4)
    return {
        "share_mean": mean(found), "share_first": mean(found[:quarter]), "share_last": mean(found[-quarter:]),
    }  # fmt: skip


def cells_of(
    plan: Plan, folder: Path, rows: Sequence[Row], budget: int, lr: float, seeds: tuple[int, int], *, tuning: bool
) -> Cells:  # fmt: skip
    """The cells of these rows; `seeds` are the first one and how many."""
    tune = scaled(plan, plan.finetune, budget, lr)
    held = plan.held_out if tuning else 0
    tune = replace(tune, probe=replace(tune.probe, num_images=held))
    if held:
        rows = [
            row if row.pretrain is None
            else replace(row, pretrain=replace(row.pretrain, data=replace(row.pretrain.data, hold_out=held)))
            for row in rows
        ]  # fmt: skip
    return Cells(
        tuple(rows), tune, plan.rules, seeds[1], folder, plan.size, first_seed=seeds[0], tuning=tuning,
        facts_images=0 if tuning else plan.facts_images,
    )  # fmt: skip


@dataclass(frozen=True)
class Answers:
    """What the stages decided so far, and their cells by stage."""

    lr: float
    share: float
    budget: int
    proven: bool
    stages: dict[str, list[CellResult]]


def run_question(plan: Plan, folder: Path, jobs: int = 1, *, say: Say = print, only_read: bool = False) -> Answers:
    """Run what is not finished, stage by stage.

    Args:
        jobs: processes that share the cells.
        only_read: run nothing.
    Raises:
        ValueError: a folder of other settings.
        Interrupted: a signal came, or (`only_read`) a stage is not finished; the same call goes on.
    """
    stages: dict[str, list[CellResult]] = {}

    def run(name: str, rows: Sequence[Row], budget: int, lr: float, seeds: tuple[int, int], tuning: bool) -> Any:
        cells = cells_of(plan, folder / name, rows, budget, lr, seeds, tuning=tuning)
        if not only_read:
            say(f"{name}: {len(rows)} rows x {seeds[1]} seeds")
            run_cells(cells, jobs, say)
        stages[name] = read_results(cells.results)
        missing = len(rows) * seeds[1] - len(stages[name])
        if missing > 0:
            raise Interrupted(f"{name}: {missing} cells are not finished; the same command goes on")
        return stages[name]

    tuned = {}
    for lr in plan.learning_rates:
        rows = rows_of(plan, 1, lr, plan.shares[0])
        picked = [rows["scratch"], rows["adv_mae"]]
        tuned[lr] = run(f"tuning_lr_{lr:g}", picked, 1, lr, (TUNING_SEED, plan.tuning_seeds), True)
    lr = best(tuned)
    rows = rows_of(plan, 1, lr, plan.shares[0])
    picked = [rows[f"hsic_{share:g}"] for share in plan.shares]
    found = run("tuning_share", picked, 1, lr, (TUNING_SEED, plan.tuning_seeds), True)
    share = best({s: [cell for cell in found if cell.row == f"hsic_{s:g}"] for s in plan.shares})
    budget, proven = plan.budgets[0], False
    for budget in plan.budgets:
        rows = rows_of(plan, budget, lr, share)
        picked = [rows[name] for name in ("scratch", "mae", "noise_mae", "adv_mae")]
        found = run(f"assay_{budget}", picked, budget, lr, (ASSAY_SEED, plan.assay_seeds), False)
        if proven := passes(found, plan.level):
            break
    budget = budget if proven else plan.budgets[0]
    rows = rows_of(plan, budget, lr, share)
    picked = [rows[name] for name in arms_of(plan, share)]
    run("arms", picked, budget, lr, (ARMS_SEED, plan.seeds), False)
    return Answers(lr, share, budget, proven, stages)


def best(tried: dict[float, list[CellResult]]) -> float:
    """The value whose cells have the highest mean accuracy on held-out training images; of equals the smallest.

    A cell that diverged before there was anything to judge has none right.
    """

    def score(value: float) -> tuple[float, float]:
        counts = [cell.accuracy.get("heldout", (0, 1)) for cell in tried[value]]
        return mean(right / total for right, total in counts), -value

    return max(tried, key=score)


def passes(results: Sequence[CellResult], level: float) -> bool:
    """Whether adv-MAE is ahead of scratch and of noise-MAE under PGD-20, by intervals at 1 − level."""
    ahead = [differences(results, "adv_mae", other, "pgd20") for other in ("scratch", "noise_mae")]
    return all(contrast(gaps, margin=1.0, level=level).interval[0] > 0 for gaps in ahead)


def differences(results: Sequence[CellResult], row: str, other: str, measure: str) -> list[float]:
    """Of two rows, over the seeds that all rows have, in seeds' order: points of an accuracy, or a measure's unit."""
    results = whole_seeds(results)

    def values(name: str) -> dict[int, float]:
        found = accuracies(results, name, measure)
        return found or {r.seed: r.measures[measure] for r in results if r.row == name and measure in r.measures}

    ours, theirs = values(row), values(other)
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def run_cells(cells: Cells, jobs: int, say: Say) -> None:
    """Run what is not finished of a stage, in this process or in several that share its cells.

    A job computes on one thread of the CPU, so no number depends on how many there are.

    Raises:
        ValueError, Interrupted: as `run_ablation`.
    """
    claim_folder(cells)
    if jobs == 1:
        _job(cells, say)
        return
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_child, args=(cells,)) for _ in range(jobs)]
    with _terminated():
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join()
        finally:
            for process in processes:
                if process.is_alive():
                    process.terminate()
            for process in processes:
                if process.pid is not None:
                    process.join()
    if failed := [process.exitcode for process in processes if process.exitcode]:
        raise Interrupted(f"{len(failed)} of {jobs} jobs ended early; the same command goes on")


def _job(cells: Cells, say: Say) -> None:
    if cells.finetune.run.device == "cpu":
        torch.set_num_threads(1)
    run_ablation(cells, say=say)


def _child(cells: Cells) -> None:
    try:
        _job(cells, partial(print, flush=True))
    except Interrupted:
        raise SystemExit(3) from None


@contextmanager
def _terminated() -> Iterator[None]:
    """SIGTERM as `Interrupted`, so that jobs hear of it."""

    def stop(number: int, frame: object) -> None:
        raise Interrupted("stopped; the same command goes on")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
