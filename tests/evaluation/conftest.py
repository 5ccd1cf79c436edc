"""A small classifier of real digits, adversarially trained for seconds, so that its robust accuracy lies in between."""

import pytest
import torch
from torch import nn

from mimir_fast.attacks.pgd import cross_entropy, fast_threat, pgd
from mimir_fast.data import DataConfig, build_loader
from mimir_fast.evaluation.images import EvaluationImages, choose_indices, load_images

EPS = 16 / 255
DIGITS = DataConfig(source="digits", image_size=8, channels=1, augment="none", flip=False)


class SmallNet(nn.Module):
    """Two convolutions with BatchNorm, features and a head (timm's convention)."""

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


def train_small(num_steps: int = 120, adversarial: bool = True) -> SmallNet:
    """FastAT on the training digits."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = SmallNet()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    batches = iter(build_loader(DIGITS, split="train", batch_size=128, seed=0))
    for step in range(num_steps):
        batch = next(batches)
        images = batch.images.float() / 255
        if adversarial:
            images = pgd(model, images, batch.labels, fast_threat(EPS), samples=batch.samples, step=step)
        optimizer.zero_grad()
        cross_entropy(model(images), batch.labels).mean().backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="session")
def small_model() -> SmallNet:
    """Do not train it further: all tests of a process share it."""
    return train_small()


@pytest.fixture(scope="session")
def test_digits() -> EvaluationImages:
    """The 300 test digits at 8 × 8."""
    return load_images(DIGITS)


@pytest.fixture(scope="session")
def few_digits() -> EvaluationImages:
    """30 of them, spread over the split."""
    from mimir_fast.data.sources import build_source

    return load_images(DIGITS, choose_indices(build_source(DIGITS, "test"), 30, None))
