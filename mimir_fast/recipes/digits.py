"""Handwritten digits (1,797 real images inside scikit-learn): everything in minutes on two CPU cores."""

from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.data import DataConfig
from mimir_fast.recipes.finetuning import METHOD_NOTES, register_finetuning
from mimir_fast.recipes.pretraining import register_pretraining
from mimir_fast.training.loop import RunConfig


def data() -> DataConfig:
    """32² digits, shifted by up to two pixels, never mirrored."""
    return DataConfig(source="digits", image_size=32, channels=3, augment="pad_crop", crop_padding=2, flip=False)


def run() -> RunConfig:
    """About ten passes."""
    return RunConfig(epochs=10, warmup_epochs=1, batch_size=128, log_every=5, save_every=50)


register_pretraining("digits", ("tiny",), 4, data, run, "minutes on a laptop, no download", blr=2e-3)


def finetune_run() -> RunConfig:
    """Fifteen passes."""
    return RunConfig(epochs=15, warmup_epochs=2, batch_size=64, log_every=20, save_every=100)


# Digits are black strokes on white, so far apart that 8/255 is no threat: 0.2 is what hurts a naturally trained model.
for method in METHOD_NOTES:
    register_finetuning(
        "digits", method, "tiny", 4, data, finetune_run(), LinfThreat(eps=0.1, alpha=0.05, num_steps=4),
        "minutes on a laptop, eps 0.1", blr=2e-3,
    )  # fmt: skip
