"""CIFAR-10 as in MIMIR (arXiv 2312.04960): 800 epochs, batch 512, patch 2."""

from mimir_fast.data import DataConfig
from mimir_fast.recipes.pretraining import register_pretraining
from mimir_fast.training.loop import RunConfig


def data() -> DataConfig:
    """32² images, random crop with padding 4, mirrored."""
    return DataConfig(source="cifar10", root="data", image_size=32, augment="pad_crop")


def run() -> RunConfig:
    """The paper's schedule."""
    return RunConfig(epochs=800, warmup_epochs=40, batch_size=512)


register_pretraining("cifar10", ("tiny", "small", "base"), 2, data, run, "800 epochs")
