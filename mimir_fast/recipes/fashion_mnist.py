"""Fashion-MNIST (70,000 real images; Debian's dataset-fashion-mnist or torchvision's download)."""

from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.data import DataConfig
from mimir_fast.recipes.finetuning import METHODS, register_finetuning
from mimir_fast.recipes.pretraining import register_pretraining
from mimir_fast.training.loop import RunConfig


def data() -> DataConfig:
    """28² grey images padded to 32², shifted and mirrored."""
    return DataConfig(source="fashion_mnist", image_size=32, channels=3, augment="pad_crop")


def run() -> RunConfig:
    """A short version of the CIFAR-10 recipe."""
    return RunConfig(epochs=100, warmup_epochs=5, batch_size=256, save_every=50)


register_pretraining("fashion_mnist", ("tiny", "small"), 4, data, run, "60,000 images of 32²", blr=5e-4)
register_pretraining("fashion_mnist", ("nano",), 8, data, run, "for CPUs", blr=2e-3)


FINETUNE = RunConfig(epochs=20, warmup_epochs=2, batch_size=256, log_every=20, save_every=200)
PGD5 = LinfThreat(eps=8 / 255, alpha=2.5 / 255, num_steps=5)

encoders: tuple[str, ...] = ("tiny", "small")
for encoder in encoders:
    for method in METHODS:
        register_finetuning("fashion_mnist", method, encoder, 4, data, FINETUNE, PGD5, "20 epochs, eps 8/255", blr=1e-3)
for method in METHODS:
    register_finetuning(
        "fashion_mnist", method, "nano", 8, data, FINETUNE, PGD5, "for CPUs, eps 8/255", blr=4e-3, drop_path=0.0
    )
