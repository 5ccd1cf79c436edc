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


# White strokes on black are far apart: eps 24/255 is where a naturally trained model fails and a robust one need not.
EPS = 24 / 255
PGD3 = LinfThreat(eps=EPS, alpha=EPS / 2, num_steps=3)
FINETUNE = RunConfig(epochs=6, warmup_epochs=1, batch_size=64, log_every=10, save_every=50)

for method in METHOD_NOTES:
    register_finetuning(
        "digits", method, "tiny", 4, data, FINETUNE, PGD3, "minutes on a laptop, eps 24/255", blr=4e-3, drop_path=0.0
    )
