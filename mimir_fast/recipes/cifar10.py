"""CIFAR-10 as in MIMIR (arXiv 2312.04960): 800 epochs, batch 512, patch 2."""

from dataclasses import replace

from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.data import DataConfig
from mimir_fast.methods.ard_prm import ArdPrmConfig
from mimir_fast.methods.mixing import MixingConfig
from mimir_fast.recipes.finetuning import METHODS, MIXING, RANDAUGMENT, register_finetuning
from mimir_fast.recipes.pretraining import register_pretraining, register_variant
from mimir_fast.training.loop import RunConfig
from mimir_fast.training.optimizer import OptimizerConfig


def data() -> DataConfig:
    """32² images, random crop with padding 4, mirrored."""
    return DataConfig(source="cifar10", root="data", image_size=32, augment="pad_crop")


def run() -> RunConfig:
    """The paper's pre-training: 800 epochs in batches of 512."""
    return RunConfig(epochs=800, warmup_epochs=40, batch_size=512)


VIT, CONVIT = ("tiny", "small", "base"), ("tiny", "small", "base")
register_pretraining("cifar10", VIT, 2, data, run, "800 epochs", official=True)
register_pretraining(
    "cifar10", CONVIT, 2, data, run, "800 epochs", methods=("mae", "adv_mae", "mimir"), family="convit", official=True
)
register_pretraining(
    "cifar10", ("base",), 4, data, run, "800 epochs, patch 4", methods=("mimir",), suffix="p4", official=True
)
register_variant("cifar10/mimir_vit_small_official", "400ep", "400 epochs", run={"epochs": 400})

# The ablation. Its rows are the authors' code; without _official it is what the paper's words say.
PAPER_ONLY = "none for the paper's words: measured with the authors' code, see _official"
TEN_STEPS = {"num_steps": 10, "alpha": 2 / 255}
register_variant("cifar10/adv_mae_vit_tiny", "10step", "10 attack steps of 2/255", PAPER_ONLY, attack=TEN_STEPS)
register_variant("cifar10/adv_mae_vit_tiny_official", "10step", "10 attack steps of 2/255", attack=TEN_STEPS)
for weight in ("1e-3", "1e-6"):
    mi: dict[str, object] = {"weight": float(weight)}
    register_variant("cifar10/mimir_vit_tiny", f"hsic_{weight}", f"HSIC, λ {weight}", PAPER_ONLY, mi=mi)
    register_variant("cifar10/mimir_vit_tiny_official", weight, f"nHSIC, λ {weight}", mi=mi)
# α and the clean image as in the authors' code. Their bandwidth saturates (every I is log2 of the batch), so ours is
# the median rule; and on current torch their function does not run at all.
for weight in ("1e-3", "1e-5", "1e-6"):
    mi = {"estimator": "renyi", "alpha": 1.01, "weight": float(weight)}
    register_variant("cifar10/mimir_vit_tiny", f"renyi_{weight}", f"Rényi α 1.01, λ {weight}", PAPER_ONLY, mi=mi)
    register_variant(
        "cifar10/mimir_vit_tiny_official", f"renyi_{weight}", f"Rényi α 1.01 of the clean image, λ {weight}",
        "bandwidth by the median rule: the authors' saturates and has no gradient",
        mi={**mi, "inputs": "clean", "bandwidth": "median"},
    )  # fmt: skip


PGD10 = LinfThreat(eps=8 / 255, alpha=2 / 255, num_steps=10)
FINETUNE = RunConfig(epochs=100, warmup_epochs=10, batch_size=128, log_every=50, save_every=500)
HALF = replace(FINETUNE, epochs=50)
BLR = 5e-2  # the authors' code and the paper's text; its table says 0.5e-2

# Mo et al. 2022, from their public code: a tenth of the rate for the last 5 of 40 epochs, a hundredth for the last 2.
MO_RUN = RunConfig(epochs=40, warmup_epochs=0, batch_size=64, clip_grad=1.0, log_every=50, save_every=500)
MO_SGD = OptimizerConfig(optimizer="sgd", lr=0.1, weight_decay=1e-4, lr_drops=(0.875, 0.95))
MO_MIXING = MixingConfig(mixup=0.8, cutmix=1.0, prob=0.3)
MO_CAVEAT = (
    "published from ImageNet-1K weights of patch 16, whose kernels the authors sum over 4 x 4 pixels; --init resizes "
    "them as FlexiViT"
)


def generated_data() -> DataConfig:
    """Seven EDM images to three real ones (Wang et al. 2023)."""
    return replace(data(), generated="data/5m.npz", generated_ratio=0.7)


for encoder in VIT:
    for method in METHODS:
        if method != "ard_prm":
            register_finetuning("cifar10", method, encoder, 2, data, FINETUNE, PGD10, "100 epochs", blr=BLR)
for encoder in CONVIT:
    register_finetuning("cifar10", "pgd", encoder, 2, data, FINETUNE, PGD10, "100 epochs", blr=BLR, family="convit")
for family in ("vit", "convit"):
    for encoder in ("tiny", "small", "base"):
        register_finetuning(
            "cifar10", "pgd", encoder, 2, generated_data, FINETUNE, PGD10, "with 5 million EDM images",
            blr=BLR, suffix="edm5m", family=family,
        )  # fmt: skip
        for method, suffix, options in (
            ("ard_prm", "", {}), ("pgd", "mo", {}),
            # Their code mixes no images for these two.
            ("ard_prm", "trades", {"ard_prm": ArdPrmConfig(loss="trades")}),
            ("ard_prm", "mart", {"ard_prm": ArdPrmConfig(loss="mart")}),
        ):  # fmt: skip
            register_finetuning(
                "cifar10", method, encoder, 4, data, MO_RUN, PGD10, "Mo et al.'s 40 epochs of SGD, patch 4",
                suffix=suffix, drop_path=0.0, optim=MO_SGD, mixing=None if options else MO_MIXING, caveat=MO_CAVEAT,
                family=family, global_pool="cls", options=options,
            )  # fmt: skip

register_finetuning(
    "cifar10", "pgd", "tiny", 2, data, FINETUNE, PGD10, "no --init: supervised adversarial training from scratch",
    blr=BLR, layer_decay=1.0, suffix="scratch", caveat="none: a control that the papers have for ImageNet only",
)  # fmt: skip

# Learning rates, 50 epochs. The first is MAE's, and that of the whole ablation; the texts say `LR` and mean blr.
for rate in ("5e-4", "1e-3", "1e-2", "5e-2", "1e-1"):
    what = "of the ablation: 50 epochs, blr 5e-4" if rate == "5e-4" else f"50 epochs, blr {rate}"
    register_finetuning(
        "cifar10", "pgd", "tiny", 2, data, HALF, PGD10, what, blr=float(rate), suffix=f"50ep_blr{rate}"
    )  # fmt: skip
register_finetuning("cifar10", "pgd", "small", 2, data, HALF, PGD10, "50 epochs", blr=BLR, suffix="50ep")
for family, encoder in (("vit", "base"), ("vit", "small"), ("convit", "small")):
    register_finetuning(
        "cifar10", "natural", encoder, 2, data, HALF, PGD10, "50 epochs", blr=1e-3, suffix="50ep", family=family
    )  # fmt: skip

# Long schedules with weak and strong augmentation, at patch 4.
LONG = replace(FINETUNE, epochs=800)
for suffix, words, mixing, randaugment in (
    ("", "800 epochs, patch 4", None, None),
    ("_mix", "800 epochs, patch 4, MixUp and CutMix", MIXING, None),
    ("_mix_randaugment", "800 epochs, patch 4, MixUp, CutMix and RandAugment", MIXING, RANDAUGMENT),
):
    register_finetuning(
        "cifar10", "pgd", "base", 4, data, LONG, PGD10, words,
        blr=BLR, suffix=f"p4_800ep{suffix}", mixing=mixing, randaugment=randaugment,
    )  # fmt: skip
