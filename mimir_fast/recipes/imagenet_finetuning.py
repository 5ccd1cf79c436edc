"""ImageNet-1k fine-tuning as in MIMIR (arXiv 2312.04960), batch 1024, and what it is compared with."""

from dataclasses import replace
from typing import Any

from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.methods.augmentation import RandAugmentConfig
from mimir_fast.methods.mixing import MixingConfig
from mimir_fast.recipes.finetuning import register_finetuning
from mimir_fast.recipes.imagenet import ENCODERS, data
from mimir_fast.training.loop import RunConfig

FINETUNE = RunConfig(epochs=100, warmup_epochs=10, batch_size=1024, log_every=50, save_every=1250)
LONG = replace(FINETUNE, epochs=300, warmup_epochs=20)
FAST = {"": LinfThreat(4 / 255, 5 / 255, 1), "eps2": LinfThreat(2 / 255, 2.5 / 255, 1)}
PGD2 = LinfThreat(4 / 255, 2 / 255, 2)
APGD2 = LinfThreat(4 / 255, 4 / 255, 2, random_start=False)

for family, (patch_size, encoders) in (ENCODERS | {"convnext": (4, ("tiny", "base"))}).items():
    for encoder in encoders:
        for suffix, attack in FAST.items():
            register_finetuning(
                "imagenet", "fast", encoder, patch_size, data, FINETUNE, attack,
                f"100 epochs, eps {'2' if suffix else '4'}/255", suffix=suffix, family=family,
            )  # fmt: skip
        register_finetuning(
            "imagenet", "pgd", encoder, patch_size, data, FINETUNE, PGD2, "100 epochs, PGD-2, eps 4/255", family=family,
            caveat="step size not published: 2/255 is ours",
        )  # fmt: skip
        # The papers' long runs have no layer-wise decay, and weak augmentation only.
        for suffix, run, decay in (("", LONG, 1.0), ("100ep", FINETUNE, 0.65)):
            register_finetuning(
                "imagenet", "apgd", encoder, patch_size, data, run, APGD2, f"{run.epochs} epochs, APGD-2, eps 4/255",
                layer_decay=decay, suffix=suffix, family=family,
            )  # fmt: skip

# Without MIMIR: from scratch, and from supervised weights.
register_finetuning(
    "imagenet", "fast", "small", 16, data, FINETUNE, FAST[""], "no --init: from scratch",
    layer_decay=1.0, suffix="scratch",
)  # fmt: skip
register_finetuning(
    "imagenet", "fast", "small", 16, data, FINETUNE, FAST[""], "from supervised weights", suffix="clean_init",
    init="timm:deit_small_patch16_224", normalization="imagenet",
    caveat="the paper says `weights available in timm`; DeiT-S, trained on ImageNet-1k alone, is our reading",
)  # fmt: skip
# Of AGAT's paper. Its code was not at hand; pooling, normalisation and dropping are as others report of it.
AGAT: dict[str, Any] = {"token_keep_rate": 0.9, "token_drop": "always"}
AGAT_CAVEAT = (
    "AGAT's code not at hand: base learning rate and step are MIMIR's; cls pooling, ImageNet's normalisation and "
    "tokens dropped in evaluation too are as reported of it; positions start at sines and cosines, not at random"
)
for encoder in ("small", "base"):
    for suffix, attack in FAST.items():
        for name, words, dropping in (
            ("scratch_300ep", "no --init: FastAT from scratch, 300 epochs", {}),
            ("agat", "no --init: AGAT, a tenth of the tokens dropped by each layer, 300 epochs", AGAT),
        ):
            register_finetuning(
                "imagenet", "fast", encoder, 16, data, LONG, attack, f"{words}, eps {'2' if suffix else '4'}/255",
                layer_decay=1.0, suffix=f"{name}_{suffix}" if suffix else name, global_pool="cls",
                normalization="imagenet", caveat=AGAT_CAVEAT, **dropping,
            )  # fmt: skip

# Natural fine-tuning: MIMIR's, with weak augmentation, and MAE's own (He et al., Table 9; without random erasing).
for family, encoder in (("vit", "small"), ("vit", "base"), ("convit", "small")):
    register_finetuning(
        "imagenet", "natural", encoder, 16, data, FINETUNE, FAST[""], "100 epochs", suffix="100ep", family=family
    )  # fmt: skip
register_finetuning(
    "imagenet", "natural", "base", 16, data, replace(FINETUNE, warmup_epochs=5), FAST[""], "as He et al., 100 epochs",
    blr=5e-4, suffix="mae", label_smoothing=0.1, mixing=MixingConfig(mixup=0.8, cutmix=1.0),
    randaugment=RandAugmentConfig(num_ops=2, magnitude=9, fill=(124, 116, 104), interpolation="bicubic"),
    caveat="without the random erasing of MAE's fine-tuning",
)  # fmt: skip
