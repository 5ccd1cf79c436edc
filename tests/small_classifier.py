"""A small classifier of real digits, adversarially trained for seconds, so that its robust accuracy lies in between."""

from pathlib import Path

import torch
from torch import nn

from mimir_fast.attacks.pgd import cross_entropy, fast_threat, pgd
from mimir_fast.data import DataConfig, build_loader

DIGITS = DataConfig(source="digits", image_size=8, channels=1, augment="none", flip=False)
TRAIN_EPS = 16 / 255
EPS = 40 / 255
"""Where about two in five digits are still classified correctly under attack."""


class SmallNet(nn.Module):
    """Two convolutions with BatchNorm; features and a head by timm's convention."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(32 * 9, num_classes)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        return self.body(images)

    def forward_head(self, features: torch.Tensor) -> torch.Tensor:
        return self.head(features)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(images))


def train_small(num_steps: int = 120) -> SmallNet:
    """FastAT on the training digits."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = SmallNet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    batches = iter(build_loader(DIGITS, split="train", batch_size=128, seed=0))
    for step in range(num_steps):
        batch = next(batches)
        images = batch.images.float() / 255
        adversarial = pgd(model, images, batch.labels, fast_threat(TRAIN_EPS), samples=batch.samples, step=step)
        optimizer.zero_grad()
        cross_entropy(model(adversarial), batch.labels).mean().backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval()


def small_net() -> SmallNet:
    """For `--checkpoint small_classifier:small_net`: the weights SMALL_NET names, saved by a test."""
    import os

    model = SmallNet()
    model.load_state_dict(torch.load(Path(os.environ["SMALL_NET"]), weights_only=True))
    return model.eval()
