"""Somebody else's family, two methods and data source: tests/test_extensions.py copies this file to `mine.py`."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from mimir_fast.data.sources import ArraySource
from mimir_fast.data.sources import register as register_source
from mimir_fast.methods.classification import ClassificationConfig, train_logits
from mimir_fast.methods.mae import Mae, MaeConfig
from mimir_fast.methods.natural import Natural
from mimir_fast.methods.registry import MethodEntry
from mimir_fast.methods.registry import register as register_method
from mimir_fast.models.families import Architecture, find_family
from mimir_fast.models.families import register as register_family
from mimir_fast.models.families.vit import VitEncoder


def stripes(config, split):
    """Two classes: stripes across and stripes along, with noise."""
    count, side = (64, config.image_size) if split == "train" else (16, config.image_size)
    rng = np.random.default_rng(len(split))
    labels = np.arange(count) % 2
    bars = np.where(np.arange(side) // 2 % 2, 220, 20).astype(np.uint8)
    images = np.stack([np.tile(bars, (side, 1)).T if label else np.tile(bars, (side, 1)) for label in labels])
    noise = rng.integers(0, 20, images.shape, dtype=np.uint8)
    return ArraySource("stripes", (images + noise)[:, None], labels, ["across", "along"])


class Gated(VitEncoder):
    """ViT with a learned gate on the latent."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.gate = nn.Parameter(torch.ones(self.width))

    def encode(self, tokens, places_BK, **options):
        return super().encode(tokens, places_BK, **options) * self.gate


def build(architecture, final_norm):
    return Gated(
        48,
        2,
        3,
        image_size=architecture.image_size,
        patch_size=architecture.patch_size,
        channels=architecture.channels,
        final_norm=final_norm,
    )


def recognise(tensors):
    _, channels, patch, _ = tensors["patch_embed.proj.weight"].shape
    grid = round((tensors["pos_embed"].shape[1] - 1) ** 0.5)
    return Architecture("gated", "mini", grid * patch, patch, channels)


@dataclass
class HalfMaeConfig(MaeConfig):
    """MAE's options and the share."""

    share: float = 0.5
    """Of MAE's loss."""


class HalfMae(Mae):
    """A share of MAE's loss."""

    def __call__(self, *args, **options):
        return {name: self.config.share * value for name, value in super().__call__(*args, **options).items()}


@dataclass
class WarmConfig(ClassificationConfig):
    """Fine-tuning's options and a temperature."""

    temperature: float = 2.0
    """Of the softmax."""


class Warm(Natural):
    """Cross entropy of tempered logits."""

    def losses(self, model, inputs):
        logits = train_logits(model, inputs.images, inputs.branch_scales) / self.config.temperature
        return {"loss": nn.functional.cross_entropy(logits, inputs.targets)}

    def adversary(self):
        return f"temperature {self.config.temperature:g}"


register_source("stripes", stripes)
register_family(
    replace(
        find_family("vit"), name="gated", title="Gated", sizes={"mini": "48 wide, 2 deep, 3 heads"}, anchor="gate",
        build=build, recognise=recognise,
    )
)  # fmt: skip
register_method(MethodEntry("half_mae", "pretrain", HalfMaeConfig, HalfMae, "half of MAE"))
register_method(MethodEntry("warm", "finetune", WarmConfig, Warm, "tempered"))
