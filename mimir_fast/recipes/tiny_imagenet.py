"""Tiny-ImageNet as in MIMIR (arXiv 2312.04960): 800 epochs, batch 512, patch 4."""

from mimir_fast.data import DataConfig
from mimir_fast.recipes.pretraining import register_pretraining
from mimir_fast.training.loop import RunConfig


def data() -> DataConfig:
    """64² images, random crop with padding 4, mirrored."""
    return DataConfig(source="tiny_imagenet", root="data/tiny-imagenet-200", image_size=64, augment="pad_crop")


def run() -> RunConfig:
    """The paper's schedule."""
    return RunConfig(epochs=800, warmup_epochs=40, batch_size=512)


register_pretraining("tiny_imagenet", ("tiny", "small", "base"), 4, data, run, "800 epochs")
