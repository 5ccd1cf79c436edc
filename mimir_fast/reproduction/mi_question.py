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
from typing import Any

import torch

from mimir_fast.data import build_source
from mimir_fast.evaluation.images import load_images
from mimir_fast.reproduction.ablation import (
    Ablation,
    CellResult,
    Row,
    claim_folder,
    read_results,
    run_ablation,
    whole_seeds,
)
from mimir_fast.reproduction.contrasts import contrast
from mimir_fast.reproduction.latent_facts import latent_facts
from mimir_fast.reproduction.mi_plan import Plan, arms_of, rows_of, scaled
from mimir_fast.reproduction.quick_judge import QuickJudge, judge_quickly
from mimir_fast.reproduction.stages import Interrupted, Say
from mimir_fast.reproduction.tables import accuracies
from mimir_fast.training.loggers import read_lines
from mimir_fast.world import RunFailed, chosen

_STOPPED = 3  # how a job ends that was told to
TUNING_SEED, ASSAY_SEED, ARMS_SEED = 1000, 0, 100
"""The first seed of each stage; none is used twice."""


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
            (*_, last) = read_lines(run / "metrics.jsonl")
            if "pgd" not in last or last["step"] + 1 < (self.finetune.run.max_steps or 0):
                raise ValueError(f"{run} ended before its last step, behind which held-out images are looked at")
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
        MissingDataError: no images; nothing is written then.
        Interrupted: a signal came, or (`only_read`) a stage is not finished; the same call goes on.
    """
    stages: dict[str, list[CellResult]] = {}
    if not only_read:
        for split in ("train", "test"):
            build_source(plan.finetune.data, split)

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

    A cell that diverged with nothing left to judge has none right.
    """

    def score(value: float) -> tuple[float, float]:
        counts = [cell.accuracy.get("heldout", (0, 1)) for cell in tried[value]]
        return mean(right / total for right, total in counts), -value

    return max(tried, key=score)


def passes(results: Sequence[CellResult], level: float) -> bool:
    """Whether adv-MAE is ahead of scratch and of noise-MAE under PGD-20, by intervals at 1 − level."""
    ahead = [differences(results, "adv_mae", other, "pgd20") for other in ("scratch", "noise_mae")]
    return all(len(gaps) > 1 and contrast(gaps, margin=1.0, level=level).interval[0] > 0 for gaps in ahead)


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
        RunFailed: a job did.
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
    ended = [process.exitcode for process in processes if process.exitcode]
    if failed := [code for code in ended if code > 0 and code != _STOPPED]:
        raise RunFailed(f"{len(failed)} of {jobs} jobs failed, for what they said above")
    if ended:
        raise Interrupted(f"{len(ended)} of {jobs} jobs ended early; the same command goes on")


def _job(cells: Cells, say: Say) -> None:
    if cells.finetune.run.device == "cpu":
        torch.set_num_threads(1)
    run_ablation(cells, say=say)


def _child(cells: Cells) -> None:
    try:
        _job(cells, partial(print, flush=True))
    except Interrupted:
        raise SystemExit(_STOPPED) from None


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
