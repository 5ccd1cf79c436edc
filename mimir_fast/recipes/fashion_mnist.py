"""Fashion-MNIST (70,000 real images; Debian's dataset-fashion-mnist or torchvision's download)."""

from mimir_fast.data import DataConfig
from mimir_fast.recipes.pretraining import register_pretraining
from mimir_fast.training.loop import RunConfig


def data() -> DataConfig:
    """28² grey images padded to 32², shifted and mirrored."""
    return DataConfig(source="fashion_mnist", image_size=32, channels=3, augment="pad_crop")


def run() -> RunConfig:
    """A short version of the CIFAR-10 recipe."""
    return RunConfig(epochs=100, warmup_epochs=5, batch_size=256, save_every=50)


register_pretraining("fashion_mnist", ("tiny", "small"), 4, data, run, "60,000 images of 32²", blr=5e-4)
