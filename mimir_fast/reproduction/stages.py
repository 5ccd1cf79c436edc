"""A run as one stage of an experiment: started, gone on with, or found finished; and judged afterwards.

A stage is a run folder. Whatever is finished in it is not done again, so an experiment that was killed goes on where
it was.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mimir_fast.checkpoints.reading import checkpoints_of, read_meta
from mimir_fast.data import DataConfig, build_source
from mimir_fast.evaluation.accuracy import Count, measure
from mimir_fast.evaluation.autoattack import run_autoattack
from mimir_fast.evaluation.images import choose_indices, load_images
from mimir_fast.evaluation.job import weights_digest
from mimir_fast.evaluation.named_attacks import make_fgsm, make_pgd, natural
from mimir_fast.models.classifier import load_classifier
from mimir_fast.training.distributed import start_world
from mimir_fast.training.finetuning import FinetuneConfig, finetune
from mimir_fast.training.pretraining import PretrainConfig, pretrain

Say = Callable[[str], None]

# AutoAttack *standard*, in its order; the first two are gradient attacks and break nearly all that falls.
AUTOATTACK = ("apgd-ce", "apgd-t", "fab-t", "square")
APGD_PART = AUTOATTACK[:2]


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
    """By what a classifier is judged.

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
        return "AutoAttack" if self.autoattack == AUTOATTACK else "APGD-CE + APGD-T"


def judge(run: Path, data: DataConfig, rules: Judge, folder: Path, *, device: str = "auto") -> dict[str, Count]:
    """Accuracies of the run's last weights on test images; goes on where an interrupted call ended.

    Args:
        folder: where progress is kept, batch by batch.
    Returns:
        `natural`, `fgsm`, `pgd20` and `autoattack`. An image that PGD-20 broke but AutoAttack did not counts as
        standing in the latter: the columns are independent measurements.
    """
    folder.mkdir(parents=True, exist_ok=True)
    device_of = start_world(device).device
    model = load_classifier(run).to(device_of)
    source = build_source(data, "test")
    images = load_images(data, choose_indices(source, rules.num_images, None))
    identity = {"weights": weights_digest(model), "count": len(images)}
    found: dict[str, Count] = {}
    for attack in (natural(), make_fgsm(rules.eps), make_pgd(rules.eps, 20, rules.seed)):
        record = measure(
            model, images, attack.run, batch_size=rules.batch_size, device=device_of,
            journal=folder / f"{attack.name}.jsonl", settings=identity | attack.parameters,
        )  # fmt: skip
        correct = record.tensor("correct")
        found[attack.name] = Count(int(correct.sum()), len(correct))
    if rules.autoattack_images:
        few = images.evenly(rules.autoattack_images)
        progress = run_autoattack(
            model, few, rules.eps, batch_size=rules.batch_size, device=device_of, state=folder / "autoattack.json",
            seed=rules.seed, attacks=rules.autoattack, settings=identity,
        )  # fmt: skip
        found["autoattack"] = Count(len(progress.standing()), len(few))
    return found


class Stopwatch:
    """Seconds since it was made, or last read."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last reading."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return round(seconds, 1)
