"""ImageNet-1k pre-training as in MIMIR (arXiv 2312.04960): 800 epochs, batch 2048, patch 16; and its neighbours."""

from collections.abc import Callable
from dataclasses import replace

from mimir_fast.data import DataConfig
from mimir_fast.recipes.pretraining import register_pretraining
from mimir_fast.training.loop import RunConfig
from mimir_fast.training.optimizer import OptimizerConfig


def data() -> DataConfig:
    """224² random resized crops (scale 0.2-1, bicubic), mirrored."""
    return DataConfig(source="imagenet", root="data/imagenet", image_size=224, augment="resized_crop", num_workers=8)


def run() -> RunConfig:
    """The paper's schedule; checkpoints every two epochs or so."""
    return RunConfig(epochs=800, warmup_epochs=40, batch_size=2048, log_every=20, save_every=1250)


# Family → side of a patch (of the stem, where a family has stages) and the sizes of the papers.
ENCODERS: dict[str, tuple[int, tuple[str, ...]]] = {
    "vit": (16, ("small", "base", "large")),
    "convit": (16, ("small",)),
    "cait": (16, ("xxs24", "s36")),
    "xcit": (16, ("small", "medium12")),
    "convstem": (16, ("small", "base")),
    "swin": (4, ("base", "large")),
}
for family, (patch_size, encoders) in ENCODERS.items():
    methods = ("mae", "noise_mae", "adv_mae", "mimir") if family == "vit" else ("mae", "adv_mae", "mimir")
    register_pretraining(
        "imagenet", encoders, patch_size, data, run, "800 epochs", methods=methods, family=family, official=True,
        optim=OptimizerConfig(decay_position_bias=family == "swin"),
    )  # fmt: skip

# CNNs are an open question of MIMIR; mask ratio 0.6 is SparK's.
register_pretraining(
    "imagenet", ("tiny", "base"), 4, data, run, "800 epochs, mask 0.6 as SparK", family="convnext",
    methods=("mae", "adv_mae", "mimir"), options={m: {"mask_ratio": 0.6} for m in ("mae", "adv_mae", "mimir")},
    caveat="none: CNNs are left open by the papers",
)  # fmt: skip

# MAE's own decoder and batch (He et al.), and AEMIM on it, which adds an adversarial stream.
MAE_RUN = replace(run(), batch_size=4096, save_every=625)


def mae_run(epochs: int) -> Callable[[], RunConfig]:
    """MAE's schedule of so many epochs."""
    return lambda: replace(MAE_RUN, epochs=epochs)


for suffix, epochs in (("800ep", 800), ("1600ep", 1600)):
    register_pretraining(
        "imagenet", ("base",), 16, data, mae_run(epochs),
        f"{epochs} epochs, batch 4096, MAE's decoder", methods=("mae", "aemim"), suffix=suffix, decoder="mae",
        caveat="AEMIM did not publish batch, weight and step size: MAE's batch, ours elsewhere",
    )  # fmt: skip

# SimMIM's schedule: no cosine, a tenth of the rate from epoch 700; 1e-4 for 512 images is 5e-5 for 256.
SIMMIM_RUN = replace(run(), warmup_epochs=10, clip_grad=5.0)
SIMMIM_OPTIM = OptimizerConfig(blr=5e-5, betas=(0.9, 0.999), lr_drops=(700 / 800,))
SIMMIM_CAVEAT = "SimMIM's ViT has relative positions and drop path 0.1 in pre-training; this one neither"


def simmim_data() -> DataConfig:
    """Crops of at least 0.67 of the image."""
    return replace(data(), crop_scale=(0.67, 1.0))


register_pretraining(
    "imagenet", ("base",), 16, simmim_data, lambda: SIMMIM_RUN, "800 epochs, ×0.1 at 700", methods=("simmim",),
    optim=SIMMIM_OPTIM, caveat=SIMMIM_CAVEAT,
)  # fmt: skip
AS_SIMMIM = {"mask_ratio": 0.6, "mask_unit": 32, "norm_pix_loss": False, "pixel_loss": "l1"}
register_pretraining(
    "imagenet", ("base",), 16, simmim_data, lambda: SIMMIM_RUN, "on SimMIM, 800 epochs", methods=("aemim",),
    suffix="simmim", optim=SIMMIM_OPTIM, options={"aemim": AS_SIMMIM}, decoder="linear", caveat=SIMMIM_CAVEAT,
)  # fmt: skip
