"""Handwritten digits (1,797 real images inside scikit-learn): everything in minutes on two CPU cores."""

from mimir_fast.data import DataConfig
from mimir_fast.recipes.pretraining import register_pretraining
from mimir_fast.training.loop import RunConfig


def data() -> DataConfig:
    """32² digits, shifted by up to two pixels, never mirrored."""
    return DataConfig(source="digits", image_size=32, channels=3, augment="pad_crop", crop_padding=2, flip=False)


def run() -> RunConfig:
    """About ten passes."""
    return RunConfig(epochs=10, warmup_epochs=1, batch_size=128, log_every=5, save_every=50)


register_pretraining("digits", ("tiny",), 4, data, run, "minutes on a laptop, no download", blr=2e-3)
