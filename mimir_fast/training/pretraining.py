"""Pre-training as a task of the loop: configuration, assembly, pictures."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from mimir_fast.attacks.no_trace import borrowed
from mimir_fast.data import Batch, DataConfig, build_loader
from mimir_fast.data.order import micro_batch_size
from mimir_fast.methods.adv_mae import Adversarial, AdvMae
from mimir_fast.methods.mae import Mae, autoencoder
from mimir_fast.methods.masking import draw_mask, num_keep
from mimir_fast.methods.mimir import Mimir, MimirConfig
from mimir_fast.models.attention import attention_backend
from mimir_fast.models.masked_autoencoder import ModelConfig, build_masked_autoencoder, check_patch_size
from mimir_fast.ops.patches import gather_patches, masked_targets, patchify, unpatchify
from mimir_fast.philox import Stream
from mimir_fast.training.distributed import World, agree, start_world, stop_world
from mimir_fast.training.loggers import JsonLines, Logger, Loggers, Pictures, TensorBoard, Terminal
from mimir_fast.training.loop import RunConfig, Trainer
from mimir_fast.training.optimizer import OptimizerConfig
from mimir_fast.training.pictures import grid, save_curves
from mimir_fast.training.run_folder import open_run

METHODS: dict[str, type[Mae] | type[AdvMae]] = {"mae": Mae, "adv_mae": AdvMae, "mimir": Mimir}


@dataclass
class PretrainConfig:
    """Pre-train a robust masked autoencoder."""

    recipe: str = "digits/mimir_vit_tiny"
    """Named starting point of all options below; `python -m mimir_fast.recipes` lists them."""
    preset: Literal["", "paper", "official"] = ""
    """Set every point in which paper and authors' code differ; empty leaves them as the recipe has them."""
    method: Literal["mae", "adv_mae", "mimir"] = "mimir"
    """Plain MAE, MAE on adversarial images, or the latter with the mutual-information penalty."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: Annotated[MimirConfig, tyro.conf.arg(name="")] = field(default_factory=MimirConfig)
    optim: Annotated[OptimizerConfig, tyro.conf.arg(name="")] = field(default_factory=OptimizerConfig)
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        check_patch_size(self.data.image_size, self.model.patch_size)
        num_keep((self.data.image_size // self.model.patch_size) ** 2, self.objective.mask_ratio)

    @property
    def folder(self) -> Path:
        """Where the run lives."""
        return Path(self.run.output_dir or f"runs/{self.recipe}")


class Pretraining:
    """The task: a masked autoencoder and one of the methods."""

    kind = "pretrain"

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config
        self.method = METHODS[config.method](config.objective)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.run.seed)
            self.model: nn.Module = build_masked_autoencoder(config.model, config.data.image_size, config.data.channels)
        self.architecture: dict[str, Any] = {
            "kind": "masked_autoencoder",
            "image_size": config.data.image_size,
            "channels": config.data.channels,
            **asdict(config.model),
        }

    def losses(self, model: nn.Module, batch: Batch, *, seed: int, step: int) -> dict[str, Tensor]:
        """The method's."""
        return self.method(model, batch, seed=seed, step=step)

    def evaluate(self, model: nn.Module, *, step: int) -> dict[str, float]:
        """Nothing: reconstruction loss is logged anyway, and robustness is fine-tuning's to measure."""
        return {}

    @torch.no_grad()
    def pictures(self, model: nn.Module, batch: Batch, *, seed: int, step: int) -> dict[str, np.ndarray]:
        """One grid: input, adversarial image, what the encoder sees of it, and the reconstruction."""
        first = Batch(*(t[:8] for t in (batch.images, batch.labels, batch.samples, batch.epochs)))
        bare = autoencoder(model)
        patches, p = patchify(first.images, bare.patch_size), bare.patch_size
        objective = self.config.objective
        if isinstance(self.method, AdvMae):
            draws = self.method.draw(bare, first, seed=seed, step=step)
            keep, masked = draws.mask.keep, draws.mask.masked
            target = masked_targets(first.images, masked, p, norm_pix=objective.norm_pix_loss)
            adversarial = self.method.perturb(model, first.images, draws, target)
        else:
            mask = draw_mask(
                first.samples, bare.num_patches, objective.mask_ratio,
                seed=seed, step=step, stream=Stream.MASK, order="sorted",
            )  # fmt: skip
            keep, masked = mask.keep, mask.masked
            adversarial = Adversarial(gather_patches(patches, keep), None)
        with borrowed(model) as module:
            prediction = module(adversarial.visible, keep)[1].float()
        if objective.norm_pix_loss:  # the prediction is of normalised patches: give each its own contrast back
            mean, std = patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()
            prediction = prediction * std + mean
        place = keep.unsqueeze(-1).expand_as(adversarial.visible)
        perturbed = (
            adversarial.patches if adversarial.patches is not None else patches.scatter(1, place, adversarial.visible)
        )
        seen = torch.full_like(patches, 0.5).scatter(1, place, adversarial.visible)
        completed = prediction.scatter(1, place, adversarial.visible)
        rows = {"input": patches, "adversarial": perturbed, "masked": seen, "reconstruction": completed}
        return {"reconstruction": grid({name: unpatchify(x, p) for name, x in rows.items()})}

    def next_command(self, run: Path) -> str:
        """Fine-tuning."""
        group, _, name = self.config.recipe.partition("/")
        return f"python -m mimir_fast.finetune --recipe {group}/pgd_{name.split('_', 1)[-1]} --init {run}"


def build_logger(config: PretrainConfig, world: World, total_steps: int, first_step: int) -> Logger:
    """Terminal, metrics.jsonl, TensorBoard and PNG files on the main rank."""
    if not world.is_main:
        return Logger()
    folder = config.folder
    return Loggers(
        [
            Terminal(total_steps, first_step),
            JsonLines(folder / "metrics.jsonl", first_step),
            TensorBoard(folder / "tensorboard", first_step),
            Pictures(folder / "pictures"),
        ]
    )


def pretrain(config: PretrainConfig) -> Path:
    """Run pre-training to its end (or to a signal) and return the run's folder."""
    world = start_world(config.run.device)
    try:
        return _pretrain(config, world)
    finally:
        stop_world()


def _pretrain(config: PretrainConfig, world: World) -> Path:
    run, folder = config.run, config.folder
    micro = micro_batch_size(run.batch_size, world.size, run.accum_iter)
    problem = None
    if world.is_main:
        try:
            open_run(folder, config, resume=run.resume, overwrite=run.overwrite, allow_changes=run.allow_changes)
        except FileExistsError as error:
            problem = error
    if agree(problem is not None):  # all ranks leave together, one says why
        raise problem or FileExistsError(f"{folder} cannot be used; rank 0 says why")
    loader = build_loader(
        config.data, split="train", batch_size=micro, device=world.device, rank=world.rank, world_size=world.size,
        seed=run.seed, accum_iter=run.accum_iter,
    )  # fmt: skip
    task = Pretraining(config)
    trainer = Trainer(task, loader, run, config.optim, json.loads(json.dumps(asdict(config))), folder, world, Logger())
    resumed = trainer.resume()
    trainer.logger = logger = build_logger(config, world, trainer.total_steps, trainer.step)
    try:
        logger.say(headline(config, world, trainer, loader.num_samples))
        if resumed:
            logger.say(f"resumed at step {trainer.step} of {trainer.total_steps}")
        finished = trainer.train()
    finally:
        logger.close()
        loader.close()
    if world.is_main:
        print(closing_words(config, task, trainer, finished), flush=True)
    return folder


def headline(config: PretrainConfig, world: World, trainer: Trainer, num_samples: int) -> str:
    """What runs, on what, through which backends."""
    model = config.model
    millions = sum(p.numel() for p in trainer.task.model.parameters() if p.requires_grad) / 1e6
    precision = "bf16" if trainer.bf16 else "fp32"
    return (
        f"{config.method} on {config.data.source} ({num_samples:,} images, {config.data.image_size}²): "
        f"ViT-{model.encoder}/{model.patch_size}, {model.decoder} decoder, {millions:.1f} M parameters\n"
        f"{world.size} x {world.device}, {precision}, attention: {attention_backend(world.device)}, "
        f"batch {config.run.batch_size}, {trainer.total_steps} steps -> {config.folder}"
    )


def closing_words(config: PretrainConfig, task: Pretraining, trainer: Trainer, finished: bool) -> str:
    """Where everything is and what to type next."""
    folder = config.folder
    if not finished:
        return f"stopped at step {trainer.step} of {trainer.total_steps}; the same command goes on from there"
    lines = [f"done: {trainer.total_steps} steps", f"  checkpoint  {folder}/checkpoints/step-{trainer.step:08d}"]
    if save_curves(folder / "metrics.jsonl", folder / "curves.png", ("loss", "mi", "lr")):
        lines.append(f"  curves      {folder}/curves.png")
    pictures = sorted((folder / "pictures").glob("reconstruction-*.png"))
    if pictures:
        lines.append(f"  picture     {pictures[-1]}")
    if trainer.guard.skipped:
        lines.append(
            f"  {trainer.guard.skipped} non-finite steps were skipped; their batches are in {folder}/bad_batches"
        )
    return "\n".join([*lines, f"next: {task.next_command(folder)}"])
