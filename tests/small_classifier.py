"""A small classifier of real digits, adversarially trained for seconds, so that its robust accuracy lies in between."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from mimir_fast.attacks.pgd import cross_entropy, fast_threat, pgd
from mimir_fast.data import DataConfig, build_loader

DIGITS = DataConfig(source="digits", image_size=8, channels=1, augment="none", flip=False)
Net = TypeVar("Net", bound=nn.Module)
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


class SmallTransformer(nn.Module):
    """Two blocks on sixteen patches."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.positions = nn.Parameter(0.1 * torch.randn(1, 16, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(2 * images - 1).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.blocks(tokens).mean(dim=1))


def small_perceptron() -> nn.Sequential:
    """Two hidden layers."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def train_small(num_steps: int = 120) -> SmallNet:
    """FastAT on the training digits."""
    return trained(SmallNet, num_steps)


def trained(build: Callable[[], Net], num_steps: int = 150) -> Net:
    """The same of any net."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3 if isinstance(model, SmallTransformer) else 5e-3)
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
