"""Our side of `robust.py`: the recipe as configurations of mimir_fast, and their training step by step."""

import contextlib
import io
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.plain_robust import Recipe
from mimir_fast.attacks.training_attack import ClassifierAttack
from mimir_fast.data import DataConfig, build_source
from mimir_fast.data.build import decoded
from mimir_fast.data.registry import register
from mimir_fast.data.sources import ImageSource, subset
from mimir_fast.methods.classification import ClassificationConfig
from mimir_fast.methods.probe import ProbeConfig
from mimir_fast.models.classifier import ClassifierConfig
from mimir_fast.models.masked_model import ModelConfig
from mimir_fast.training.finetuning import FinetuneConfig, Finetuning
from mimir_fast.training.optimizer import OptimizerConfig
from mimir_fast.training.pretraining import PretrainConfig, pretrain
from mimir_fast.training.run_config import Precision, RunConfig
from mimir_fast.training.run_folder import RunFolder
from mimir_fast.training.session import build_trainer
from mimir_fast.world import World

HELD_OUT_EVERY = 5


def fold(name: str, config: DataConfig, split: str) -> ImageSource:
    """The training split of a data set, of which every fifth image stands in for the test split."""
    source = build_source(DataConfig(source=name, image_size=config.image_size, channels=config.channels), "train")
    held = np.arange(len(source)) % HELD_OUT_EVERY == 0
    return subset(source, np.flatnonzero(held if split == "test" else ~held))


for _name in ("digits", "fashion_mnist"):
    register(f"{_name}_fold", partial(fold, _name))


def data_of(name: str, recipe: Recipe, images: int) -> DataConfig:
    """So many images of a fold, as they are."""
    return DataConfig(
        source=f"{name}_fold", image_size=recipe.image_size, channels=recipe.channels, augment="none", flip=False,
        limit=images,
    )  # fmt: skip


def source_of(name: str, recipe: Recipe, images: int, split: str) -> tuple[np.ndarray, np.ndarray]:
    """(N, C, H, W) uint8 and (N,) int64 of a fold, held out where the split is `test`."""
    config = data_of(name, recipe, images)
    source = build_source(config, split)
    return decoded(source, config)[0], source.labels


def finetuning(
    recipe: Recipe, name: str, images: int, seed: int, *, bf16: bool, method: str = "pgd", init: str = "", **attack: Any
) -> FinetuneConfig:
    """The recipe, with other options of the attack."""
    threat = ClassifierAttack(eps=recipe.eps, alpha=recipe.alpha, num_steps=recipe.attack_steps)
    return FinetuneConfig(
        method=method,
        init=init,
        model=ClassifierConfig(
            encoder="nano", patch_size=recipe.patch_size, drop_path=0.0, head_std=2e-2, options=_shape(recipe)
        ),
        data=data_of(name, recipe, images),
        objective=ClassificationConfig(attack=replace(threat, **attack)),
        probe=ProbeConfig(num_images=0),
        optim=OptimizerConfig(lr=recipe.lr, weight_decay=recipe.weight_decay, betas=(0.9, 0.999)),
        run=_run(recipe, images, seed, bf16),
    )


def pretraining(recipe: Recipe, name: str, images: int, seed: int, *, bf16: bool, lr: float = 1e-3) -> PretrainConfig:
    """MIMIR as by default, as many steps as the recipe has."""
    return PretrainConfig(
        model=ModelConfig(encoder="nano", patch_size=recipe.patch_size, options=_shape(recipe)),
        data=data_of(name, recipe, images), optim=OptimizerConfig(lr=lr), run=_run(recipe, images, seed, bf16),
    )  # fmt: skip


def ours(config: FinetuneConfig, first: PretrainConfig | None = None) -> Iterator[nn.Module]:
    """Train; yields the model as it is built, then after each step. Pre-training, where there is some, comes before."""
    with tempfile.TemporaryDirectory() as folder:
        if first is not None:
            yield nn.Identity()  # the clock runs from here on
            run = replace(first.run, output_dir=f"{folder}/pretrained")
            with contextlib.redirect_stdout(io.StringIO()):
                config = replace(config, init=str(pretrain(replace(first, run=run))))
        world = World(0, 1, torch.device("cpu"))
        trainer = build_trainer(
            config, RunFolder(Path(folder) / "run", world), lambda world, checkpoint: Finetuning(config, world), None
        )
        model, batches = trainer.task.model, iter(trainer.loader)
        if first is None:
            yield model
        while trainer.step < trainer.total_steps:
            if trainer.step % trainer.task.replays == 0:
                batch = next(batches)
            trainer.train_step([batch])
            yield model


def _shape(recipe: Recipe) -> tuple[str, ...]:
    return f"width={recipe.width}", f"depth={recipe.depth}", f"heads={recipe.heads}"


def _run(recipe: Recipe, images: int, seed: int, bf16: bool) -> RunConfig:
    """So many steps, warm-up and seed, in a precision; the folder is given later."""
    passes = recipe.batch_size / images
    precision: Precision = "bf16" if bf16 else "fp32"
    return RunConfig(
        max_steps=recipe.steps, epochs=recipe.steps * passes, warmup_epochs=recipe.warmup * passes, seed=seed,
        batch_size=recipe.batch_size, device="cpu", precision=precision, log_every=100, save_every=recipe.steps,
    )  # fmt: skip
