"""The probe's numbers against counting by hand, and its alarm."""

import pytest
import torch
from torch import Tensor, nn

from mimir_fast.attacks.pgd import fgsm
from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.data.batch import Batch
from mimir_fast.methods.probe import ProbeConfig, ProbeResult, probe

THREAT = LinfThreat(eps=8 / 255, alpha=10 / 255, num_steps=1)


class Linear(nn.Module):
    """A linear classifier: FGSM is its best adversary, so PGD finds no more than FGSM does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(48, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.flatten(1))


def labelled(model: nn.Module, count: int) -> Batch:
    """Images in the middle of [0, 1] that the model classifies as labelled, nine times in ten."""
    images = torch.randint(50, 200, (count, 3, 4, 4), dtype=torch.uint8)
    labels = model(images.float() / 255).argmax(dim=1)
    labels[::10] = (labels[::10] + 1) % 5
    return Batch(images, labels, torch.arange(count), torch.zeros(count, dtype=torch.long))


def test_counts() -> None:
    model = Linear()
    batch = labelled(model, 200)
    halves = [Batch(*(t[s] for t in vars(batch).values())) for s in (slice(0, 120), slice(120, 200))]
    result = probe(model, halves, THREAT)
    images = batch.images.float() / 255
    by_hand = (model(fgsm(model, images, batch.labels, 8 / 255)).argmax(1) == batch.labels).float().mean()
    assert result.natural == pytest.approx(0.9) and result.num_images == 200
    assert result.fgsm == pytest.approx(float(by_hand)) and result.fgsm < result.natural
    assert abs(result.pgd - result.fgsm) <= 0.02


def test_leaves_the_model_in_its_mode() -> None:
    model = Linear().train()
    probe(model, [labelled(model, 10)], THREAT)
    assert model.training and model.layer.weight.grad is None


def test_alarm_on_catastrophic_overfitting() -> None:
    healthy, overfitted = ProbeResult(0.8, 0.55, 0.5, 512), ProbeResult(0.85, 0.80, 0.01, 512)
    assert healthy.alarm is None
    assert overfitted.alarm is not None and "FGSM accuracy 80.0% but PGD accuracy 1.0%" in overfitted.alarm


def test_no_images() -> None:
    with pytest.raises(ValueError, match=r"--probe\.num_images 0"):
        probe(Linear(), [], THREAT)
    with pytest.raises(ValueError, match="wanted"):
        ProbeConfig(num_steps=0)
