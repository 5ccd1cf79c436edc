"""Robust training made cheaper, compared at equal compute on small data.

    stages     one stage (`single_stage`) against two: adv-MAE, then PGD adversarial training
    attacks    PGD adversarial training against its cheaper relatives, all from the same pre-trained weights

Equal compute is equal floating-point operations (training/flops.py): an arm whose step costs half makes twice the
steps, with the same peak learning rate and the same shape of its schedule. No arm is tuned by itself, nothing is chosen
on test images, and the last weights are judged. Seconds are those of the process, on all its threads.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal, TypeVar

from mimir_fast.data import build_source
from mimir_fast.recipes import find_recipe
from mimir_fast.reproduction.ablation import Ablation, CellResult, Row, endings, read_results, run_ablation, whole_seeds
from mimir_fast.reproduction.fashion import SIZES, finetune_base, pretrain_base
from mimir_fast.reproduction.stages import Judge, Say
from mimir_fast.reproduction.tables import accuracies, markdown
from mimir_fast.training.finetuning import FinetuneConfig
from mimir_fast.training.flops import flops_of_step
from mimir_fast.training.optimizer import OptimizerConfig
from mimir_fast.training.pretraining import PretrainConfig, with_method

Config = TypeVar("Config", PretrainConfig, FinetuneConfig)
DataName = Literal["digits", "fashion"]
BASELINE, SINGLE = "pgd", "single_stage"
WARMUP = 0.1  # of the steps of every stage
DIGITS_LR = 3e-3  # peak, of both stages; 1.5e-3 was tried on the baseline, at other budgets, by its training loss


@dataclass(frozen=True)
class Arm(Row):
    """A row with a fine-tuning of its own, or none.

    Attributes:
        finetune: but seed, folder and init; None judges what pre-training left.
        weights_of: the row whose pre-trained weights it starts from.
        flops: stage → operations of all its steps.
    """

    finetune: FinetuneConfig | None = None
    weights_of: str = ""
    flops: dict[str, float] = field(default_factory=dict)

    def tuning(self, ablation: Ablation) -> FinetuneConfig | None:
        """Its own."""
        return self.finetune

    def pretrained_in(self, cells: Path, seed: int) -> Path:
        """The folder of the row that it shares pre-training with."""
        return cells / (self.weights_of or self.name) / f"seed{seed}" / "pretrain"


@dataclass(frozen=True)
class Experiment:
    """What is run on a data set.

    Attributes:
        pretrain, finetune: of two-stage training.
        images: training images.
        title: data and model, for the note.
        rules: the judge's.
    """

    pretrain: PretrainConfig
    finetune: FinetuneConfig
    images: int
    title: str
    rules: Judge

    def with_steps(self, config: Config, steps: int) -> Config:
        """The same for so many optimiser steps, a tenth of them of warm-up."""
        epochs = steps * config.run.batch_size / self.images
        run = replace(
            config.run, max_steps=steps, epochs=epochs, warmup_epochs=WARMUP * epochs, log_every=20, save_every=200,
            keep_last=1, device="cpu", precision="fp32",
        )  # fmt: skip
        return replace(config, run=run)


def digits() -> Experiment:
    """All training digits; a ViT so small, and an ε so small, that minutes teach it something."""
    pretrain = find_recipe(PretrainConfig, "digits/adv_mae_vit_nano")
    tune = find_recipe(FinetuneConfig, "digits/pgd_vit_nano")
    small, eps = ("width=64", "depth=2", "heads=4"), 8 / 255
    attack = replace(tune.objective.attack, eps=eps, alpha=eps / 2, num_steps=3)
    pretrain = replace(
        pretrain, model=replace(pretrain.model, options=small), optim=OptimizerConfig(lr=DIGITS_LR),
        run=replace(pretrain.run, max_steps=250, batch_size=32),
    )  # fmt: skip
    tune = replace(
        tune, model=replace(tune.model, options=small), objective=replace(tune.objective, attack=attack),
        probe=replace(tune.probe, num_images=0), optim=replace(tune.optim, lr=DIGITS_LR),
        run=replace(tune.run, max_steps=500, batch_size=32),
    )  # fmt: skip
    images = len(build_source(tune.data, "train"))
    title = "Digits (1,497 training images), ViT/8 of 2 layers 64 wide, ε = 8/255"
    return Experiment(pretrain, tune, images, title, Judge(eps, 300, 0, batch_size=300))


def fashion() -> Experiment:
    """The reduced ablation's with three attack steps, shorter: there are more cells."""
    size = replace(SIZES["reduced"], pretrain_steps=256, finetune_steps=180)
    tune = finetune_base(size)
    attack = replace(tune.objective.attack, alpha=tune.objective.attack.eps / 2, num_steps=3)
    return Experiment(
        with_method(pretrain_base(size), "adv_mae"), replace(tune, objective=replace(tune.objective, attack=attack)),
        size.train_images or 0, "Fashion-MNIST (16,384 training images), ViT-nano/8, ε = 8/255",
        replace(size.rules, autoattack_images=0, batch_size=500),
    )  # fmt: skip


EXPERIMENTS: dict[DataName, Callable[[], Experiment]] = {"digits": digits, "fashion": fashion}


def tunings(base: FinetuneConfig) -> dict[str, tuple[str, FinetuneConfig]]:
    """Name → title and configuration of each fine-tuning, as many steps as the base."""

    def attacked(**options: Any) -> FinetuneConfig:
        return replace(base, objective=replace(base.objective, attack=replace(base.objective.attack, **options)))

    attack = base.objective.attack
    few = attack.num_steps - 1
    return {
        BASELINE: (f"PGD-{attack.num_steps}", base),
        "fewer_steps": (
            f"PGD-{few}, larger steps",
            attacked(num_steps=few, alpha=attack.alpha * attack.num_steps / few),
        ),
        "visible": ("`--attack.visible 0.5`", attacked(visible=0.5)),
        "every2": ("`--attack.every 2`", attacked(every=2)),
        "every4": ("`--attack.every 4`", attacked(every=4)),
        "free": ("`--method free`, m = 4", replace(base, method="free")),
        "fast": ("`--method fast`", replace(base, method="fast")),
    }


def arms_of(experiment: Experiment) -> tuple[Arm, ...]:
    """All arms, each with the operations of the baseline."""
    first = experiment.with_steps(experiment.pretrain, _steps(experiment.pretrain))
    pretraining = flops_of_step(first) * _steps(first)
    budget = flops_of_step(experiment.finetune) * _steps(experiment.finetune)
    arms = []
    for name, (title, config) in tunings(experiment.finetune).items():
        step = flops_of_step(config)
        config = experiment.with_steps(config, round(budget / step))
        flops = {"pretrain": pretraining, "finetune": step * _steps(config)}
        arms.append(Arm(name, title, first, "", config, BASELINE, flops))
    single = with_method(first, SINGLE)
    step = flops_of_step(single)
    single = experiment.with_steps(single, round((pretraining + budget) / step))
    return (
        arms[0],
        Arm(SINGLE, "one stage (`single_stage`)", single, flops={"pretrain": step * _steps(single)}),
        *arms[1:],
    )


def run_faster(
    data: DataName, folder: Path, stage_seeds: int, attack_seeds: int, *, run: bool, say: Say = print
) -> None:
    """Run what is not finished, and write results.json and table.md of what is.

    Raises:
        ValueError: the folder holds an experiment with other settings.
        Interrupted: a signal came; the same call goes on.
    """
    experiment = EXPERIMENTS[data]()
    arms = {arm.name: arm for arm in arms_of(experiment)}
    whole = Ablation((), experiment.finetune, experiment.rules, 0, folder, data)
    try:
        for seed in range(max(stage_seeds, attack_seeds) if run else 0):
            # All rows of a seed before the next one: what is finished can be compared.
            staged = {BASELINE, SINGLE} if seed < stage_seeds else set()
            tuned = set(arms) - {SINGLE} if seed < attack_seeds else set()
            rows = tuple(arm for name, arm in arms.items() if name in staged | tuned)
            run_ablation(replace(whole, rows=rows, num_seeds=seed + 1), say=say)
    finally:
        if results := read_results(whole.results):
            record = record_of(experiment, tuple(arms.values()), results)
            (folder / "results.json").write_text(json.dumps(record, indent=1) + "\n")
            (folder / "table.md").write_text(tables(record))
            say(tables(record))


def record_of(experiment: Experiment, arms: Sequence[Arm], results: Sequence[CellResult]) -> dict[str, Any]:
    """All that the tables are made from, as JSON."""
    rules, tune, first = experiment.rules, experiment.finetune, experiment.pretrain
    note = (
        f"{experiment.title}. Two stages: {_steps(first)} steps of {first.run.batch_size} images of adv-MAE, then "
        f"{_steps(tune)} of {tune.run.batch_size} of PGD-{tune.objective.attack.num_steps}. Judged by PGD-20 on "
        f"{rules.num_images} test images, looked at once; last weights."
    )
    shown = [
        {
            "name": arm.name,
            "title": arm.title,
            "flops": arm.flops,
            "steps": {"pretrain": _steps(arm.pretrain)} | ({"finetune": _steps(arm.finetune)} if arm.finetune else {}),
        }
        for arm in arms
    ]
    return {"note": note, "arms": shown, "cells": [asdict(result) for result in results]}


@dataclass(frozen=True)
class Estimate:
    """Mean of values over seeds, with the 95 % interval of Student's t."""

    values: tuple[float, ...]

    @property
    def reach(self) -> float | None:
        """Of the interval to each side; None of a single value."""
        from scipy.stats import t

        count = len(self.values)
        return None if count < 2 else float(t.ppf(0.975, count - 1)) * stdev(self.values) / count**0.5

    def text(self, sign: str = "") -> str:
        """`81.2 (80.1 to 82.3)`, cut to what per cent can be; with `+` for a sign, of differences, which have one."""
        middle, reach = mean(self.values), self.reach
        shown = [middle] if reach is None else [middle, middle - reach, middle + reach]
        shown = shown if sign else [min(max(value, 0.0), 100.0) for value in shown]
        first, *ends = (f"{value:{sign}.1f}".replace("-", "−") for value in shown)
        return f"{first} ({' to '.join(ends)})" if ends else first


def tables(record: dict[str, Any]) -> str:
    """Both tables in Markdown, with the note between them, from the record alone."""
    every = [CellResult(**cell) for cell in record["cells"]]
    results, ended = whole_seeds(every), endings(every)
    arms = {arm["name"]: arm for arm in record["arms"]}
    measures = {"natural": "natural", "pgd20": "PGD-20"}

    def lines(names: Sequence[str], stages: Sequence[str], head: str) -> list[list[str]]:
        common = sorted(set.intersection(*(set(accuracies(results, name, "pgd20")) for name in names)))
        found = [[head, "steps", "10¹² operations", "CPU seconds", *measures.values(), "PGD-20 − first row", "seeds"]]
        for name in names:
            arm = arms[name]
            values = {m: accuracies(results, name, m) for m in measures}
            gaps = [values["pgd20"][s] - accuracies(results, names[0], "pgd20")[s] for s in common]
            cells = [r for r in results if r.row == name and r.seed in common]
            timed = [[r.cpu_seconds[s] for r in cells if s in r.cpu_seconds] for s in stages if s in arm["steps"]]
            found.append(
                [
                    arm["title"] if head != "training" or name == SINGLE else "two stages (adv-MAE, then PGD)",
                    " + ".join(f"{arm['steps'][s]:,}" for s in stages if s in arm["steps"]),
                    f"{sum(arm['flops'].get(s, 0) for s in stages) / 1e12:.1f}",
                    f"{sum(map(mean, timed)):.0f}" if all(timed) else "",
                    *(Estimate(tuple(v[s] for s in common)).text() for v in values.values()),
                    "" if name == names[0] else Estimate(tuple(gaps)).text("+"),
                    str(len(common)),
                ]
            )
        return found

    done = [name for name in arms if accuracies(results, name, "pgd20")]
    parts = []
    if {BASELINE, SINGLE} <= set(done):
        parts.append(markdown(lines([BASELINE, SINGLE], ("pretrain", "finetune"), "training")))
    if tuned := [name for name in done if name != SINGLE]:
        parts.append(markdown(lines(tuned, ("finetune",), "fine-tuning")))
    return "\n".join([*parts, " ".join(filter(None, (record["note"], ended))) + "\n"])


def _steps(config: PretrainConfig | FinetuneConfig | None) -> int:
    assert config is not None and config.run.max_steps is not None
    return config.run.max_steps
