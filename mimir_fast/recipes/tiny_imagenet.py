"""Tiny-ImageNet as in MIMIR (arXiv 2312.04960): 800 epochs, batch 512, patch 4."""

from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.data import DataConfig
from mimir_fast.recipes.finetuning import register_finetuning
from mimir_fast.recipes.pretraining import register_pretraining
from mimir_fast.training.loop import RunConfig


def data() -> DataConfig:
    """64² images, random crop with padding 4, mirrored."""
    return DataConfig(source="tiny_imagenet", root="data/tiny-imagenet-200", image_size=64, augment="pad_crop")


def run() -> RunConfig:
    """The paper's schedule."""
    return RunConfig(epochs=800, warmup_epochs=40, batch_size=512)


register_pretraining("tiny_imagenet", ("tiny", "small", "base"), 4, data, run, "800 epochs")


PGD10 = LinfThreat(eps=8 / 255, alpha=2 / 255, num_steps=10)
FINETUNE = RunConfig(epochs=100, warmup_epochs=10, batch_size=256, log_every=50, save_every=500)
PUBLISHED: dict[str, str] = {"tiny": "", "small": "63.33 / 22.52 AA", "base": "65.06 / 22.82 AA"}

for encoder, numbers in PUBLISHED.items():
    register_finetuning(
        "tiny_imagenet", "pgd", encoder, 4, data, FINETUNE, PGD10, "100 epochs", blr=1e-3, expected=numbers
    )
