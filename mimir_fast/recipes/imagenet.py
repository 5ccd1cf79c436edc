"""ImageNet-1k as in MIMIR (arXiv 2312.04960): 800 epochs, batch 2048, patch 16."""

from mimir_fast.data import DataConfig
from mimir_fast.recipes.pretraining import register_pretraining
from mimir_fast.training.loop import RunConfig


def data() -> DataConfig:
    """224² random resized crops (scale 0.2-1, bicubic), mirrored."""
    return DataConfig(source="imagenet", root="data/imagenet", image_size=224, augment="resized_crop", num_workers=8)


def run() -> RunConfig:
    """The paper's schedule; checkpoints every two epochs or so."""
    return RunConfig(epochs=800, warmup_epochs=40, batch_size=2048, log_every=20, save_every=1250)


register_pretraining("imagenet", ("small", "base", "large"), 16, data, run, "800 epochs")
