"""Pre-training as a task of the loop: configuration, assembly, pictures."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from mimir_fast.attacks.no_trace import borrowed
from mimir_fast.data import Batch, DataConfig
from mimir_fast.methods.adv_mae import Adversarial, AdvMae
from mimir_fast.methods.mae import Mae, autoencoder
from mimir_fast.methods.masking import draw_mask, num_keep
from mimir_fast.methods.mimir import Mimir, MimirConfig
from mimir_fast.models.masked_autoencoder import ModelConfig, build_masked_autoencoder, check_patch_size
from mimir_fast.ops.patches import gather_patches, masked_targets, patchify, unpatchify
from mimir_fast.philox import Stream
from mimir_fast.training.loop import RunConfig
from mimir_fast.training.optimizer import OptimizerConfig
from mimir_fast.training.pictures import grid
from mimir_fast.training.session import run_session

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
    curves: tuple[str, ...] = ("loss", "mi", "lr")

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

    def alarm(self) -> str | None:
        """None: nothing is evaluated."""
        return None

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

    def describe(self, num_samples: int) -> str:
        """What is trained."""
        config, model = self.config, self.config.model
        return (
            f"{config.method} on {config.data.source} ({num_samples:,} images, {config.data.image_size}²): "
            f"ViT-{model.encoder}/{model.patch_size}, {model.decoder} decoder"
        )

    def next_command(self, run: Path) -> str:
        """Fine-tuning."""
        group = self.config.recipe.partition("/")[0]
        return f"mimir_fast.finetune --recipe {group}/pgd_vit_{self.config.model.encoder} --init {run}"


def pretrain(config: PretrainConfig) -> Path:
    """Run pre-training to its end (or to a signal) and return the run's folder."""
    return run_session(config, lambda world: Pretraining(config))
