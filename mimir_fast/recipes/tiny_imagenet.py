"""Tiny-ImageNet as in MIMIR (arXiv 2312.04960): 800 epochs, batch 512, patch 4."""

from dataclasses import replace

from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.data import DataConfig
from mimir_fast.recipes.finetuning import register_finetuning
from mimir_fast.recipes.pretraining import register_pretraining
from mimir_fast.training.loop import RunConfig


def data() -> DataConfig:
    """64² images, random crop with padding 4, mirrored."""
    return DataConfig(source="tiny_imagenet", root="data/tiny-imagenet-200", image_size=64, augment="pad_crop")


def generated_data() -> DataConfig:
    """Seven EDM images to three real ones (Wang et al. 2023), of a million."""
    return replace(data(), generated="data/tiny_1m.npz", generated_ratio=0.7)


def run() -> RunConfig:
    """The paper's pre-training: 800 epochs in batches of 512."""
    return RunConfig(epochs=800, warmup_epochs=40, batch_size=512)


PGD10 = LinfThreat(eps=8 / 255, alpha=2 / 255, num_steps=10)
FINETUNE = RunConfig(epochs=100, warmup_epochs=10, batch_size=256, log_every=50, save_every=500)
ENCODERS = {"vit": ("tiny", "small", "base"), "convit": ("tiny", "small")}

register_pretraining("tiny_imagenet", ENCODERS["vit"], 4, data, run, "800 epochs", official=True)
register_pretraining(
    "tiny_imagenet", ENCODERS["convit"], 4, data, run, "800 epochs",
    methods=("mae", "adv_mae", "mimir"), family="convit", official=True,
)  # fmt: skip

for family, encoders in ENCODERS.items():
    for encoder in encoders:
        register_finetuning(
            "tiny_imagenet", "pgd", encoder, 4, data, FINETUNE, PGD10, "100 epochs", blr=1e-3, family=family,
            caveat="none without generated images: see _edm1m",
        )  # fmt: skip
        register_finetuning(
            "tiny_imagenet", "pgd", encoder, 4, generated_data, FINETUNE, PGD10, "with 1 million EDM images",
            blr=1e-3, suffix="edm1m", family=family,
        )  # fmt: skip
for family, encoder in (("vit", "base"), ("vit", "small"), ("convit", "small")):
    register_finetuning(
        "tiny_imagenet", "natural", encoder, 4, data, replace(FINETUNE, epochs=50), PGD10, "50 epochs",
        blr=1e-3, suffix="50ep", family=family,
    )  # fmt: skip
