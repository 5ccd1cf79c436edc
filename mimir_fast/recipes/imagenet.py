"""ImageNet-1k as in MIMIR (arXiv 2312.04960): 800 epochs, batch 2048, patch 16."""

from dataclasses import replace

from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.data import DataConfig
from mimir_fast.recipes.finetuning import register_finetuning
from mimir_fast.recipes.pretraining import register_pretraining
from mimir_fast.training.loop import RunConfig


def data() -> DataConfig:
    """224² random resized crops (scale 0.2-1, bicubic), mirrored."""
    return DataConfig(source="imagenet", root="data/imagenet", image_size=224, augment="resized_crop", num_workers=8)


def run() -> RunConfig:
    """The paper's schedule; checkpoints every two epochs or so."""
    return RunConfig(epochs=800, warmup_epochs=40, batch_size=2048, log_every=20, save_every=1250)


# Natural / PGD accuracy after `fast_vit_small` (the paper's one-step fine-tuning).
register_pretraining(
    "imagenet", ("small", "base", "large"), 16, data, run, "800 epochs",
    expected={
        ("mae", "small"): "69.98 / 35.64 PGD", ("adv_mae", "small"): "68.24 / 19.32 PGD",
        ("mimir", "small"): "71.02 / 37.22 PGD",
    },
)  # fmt: skip


FINETUNE = RunConfig(epochs=100, warmup_epochs=10, batch_size=1024, log_every=50, save_every=1250)
LONG = replace(FINETUNE, epochs=300, warmup_epochs=20)
FAST = LinfThreat(eps=4 / 255, alpha=5 / 255, num_steps=1)
APGD2 = LinfThreat(eps=4 / 255, alpha=4 / 255, num_steps=2, random_start=False)
PGD2 = LinfThreat(eps=4 / 255, alpha=2 / 255, num_steps=2)
SHORT_NUMBERS: dict[str, str] = {"small": "71.02 / 37.22 PGD", "base": "", "large": ""}
LONG_NUMBERS: dict[str, str] = {"small": "71.00 / 46.10 AA", "base": "76.32 / 54.28 AA", "large": ""}

register_finetuning(
    "imagenet", "fast", "small", 16, data, FINETUNE, FAST, "no --init: from scratch",
    blr=1e-3, layer_decay=1.0, suffix="scratch", expected="66.02 / 31.40 PGD",
)  # fmt: skip
for encoder in SHORT_NUMBERS:
    register_finetuning(
        "imagenet", "fast", encoder, 16, data, FINETUNE, FAST, "100 epochs, eps 4/255",
        blr=1e-3, expected=SHORT_NUMBERS[encoder],
    )  # fmt: skip
    register_finetuning("imagenet", "pgd", encoder, 16, data, FINETUNE, PGD2, "100 epochs, PGD-2, eps 4/255", blr=1e-3)
    register_finetuning(
        "imagenet", "apgd", encoder, 16, data, LONG, APGD2, "300 epochs, APGD-2, eps 4/255, strong augmentation",
        blr=1e-3, layer_decay=1.0, strong=True, expected=LONG_NUMBERS[encoder],
    )  # fmt: skip
