"""A run as one stage of an experiment: started, gone on with, or found finished; and judged afterwards.

A stage is a run folder. Whatever is finished in it is not done again, so an experiment that was killed goes on where
it was.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from mimir_fast.checkpoints.reading import checkpoints_of, read_meta
from mimir_fast.data import DataConfig, build_source
from mimir_fast.evaluation.config import EvaluateConfig
from mimir_fast.evaluation.measure import Count
from mimir_fast.evaluation.results import Results
from mimir_fast.evaluation.run import evaluate
from mimir_fast.evaluation.topics.autoattack import ATTACKS
from mimir_fast.training.finetuning import FinetuneConfig, finetune
from mimir_fast.training.pretraining import PretrainConfig, pretrain

Say = Callable[[str], None]

AUTOATTACK = ATTACKS["standard"]
APGD_PART = AUTOATTACK[:2]
"""The gradient attacks break nearly all that falls."""


class Interrupted(Exception):
    """A signal ended a stage early; its work is saved."""


def run_stage(config: PretrainConfig | FinetuneConfig) -> Path:
    """Train to the end, or go on to the end; returns the run's folder at once when it is finished already.

    Raises:
        Interrupted: a signal came.
    """
    total = config.run.total_steps(len(build_source(config.data, "train")))
    if steps_done(config.folder) < total:
        if isinstance(config, PretrainConfig):
            pretrain(config)
        else:
            finetune(config)
    if (done := steps_done(config.folder)) < total:
        raise Interrupted(f"stopped at step {done} of {total} in {config.folder}; the same command goes on from there")
    return config.folder


def steps_done(run: Path) -> int:
    """Optimiser steps in the newest checkpoint of a run folder; 0 when there is none."""
    found = checkpoints_of(run) if run.is_dir() else []
    return int(read_meta(found[-1])["step"]) if found else 0


@dataclass(frozen=True)
class Judge:
    """By what a classifier is judged: the suite `table` on these images.

    Attributes:
        eps: radius of the L∞ ball, images in [0, 1].
        num_images: test images of the natural, FGSM and PGD-20 accuracy, evenly spaced; None for all.
        autoattack_images: as many of those for AutoAttack; 0 leaves it out.
        autoattack: its attacks, in order; see AUTOATTACK and APGD_PART.
        batch_size: images of a forward pass.
        seed: of random starts; the same for every model that is compared.
    """

    eps: float
    num_images: int | None = None
    autoattack_images: int = 64
    autoattack: tuple[str, ...] = AUTOATTACK
    batch_size: int = 128
    seed: int = 0

    @property
    def autoattack_title(self) -> str:
        """What the last column may be called: AutoAttack only where all of it ran."""
        return "AutoAttack" if set(self.autoattack) == set(AUTOATTACK) else "APGD-CE + APGD-T"

    def suite(self, run: Path, data: DataConfig, folder: Path, device: str = "auto") -> EvaluateConfig:
        """The evaluation of a run's last weights."""
        return EvaluateConfig(
            str(run), "table", replace(data, limit=None), "last", eps=self.eps, limit=self.num_images,
            batch_size=self.batch_size, output_dir=str(folder), seed=self.seed, device=device,
            autoattack="yes" if self.autoattack_images else "no", autoattack_images=self.autoattack_images or None,
            autoattack_attacks=() if self.autoattack == AUTOATTACK else self.autoattack,
        )  # fmt: skip


def judge(run: Path, data: DataConfig, rules: Judge, folder: Path, *, device: str = "auto") -> dict[str, Count]:
    """Accuracies of the run's last weights on test images; goes on where an interrupted call ended.

    Args:
        folder: of the evaluation: progress, results.json, report.html.
    Returns:
        see `counts_of`.
    """
    return counts_of(evaluate(rules.suite(run, data, folder, device), log=lambda line: None))


def counts_of(results: Results) -> dict[str, Count]:
    """`natural`, `fgsm`, `pgd20`, `autoattack` where it ran, and `worst`: right under all that ran on every image.

    The first columns are independent measurements: an image that PGD-20 broke and AutoAttack did not stands in the
    latter; `worst` is the one number to quote, and has AutoAttack in it where that ran on every image.
    """
    entries = dict(results.sections["accuracy"]["attacks"])
    if found := results.sections.get("autoattack"):
        entries["autoattack"] = found
    entries["worst"] = results.robust
    return {name: Count(entry["correct"], entry["total"]) for name, entry in entries.items()}


class Stopwatch:
    """Seconds since it was made, or last read."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last reading."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return round(seconds, 1)
