"""Natural and robust accuracy, as exact counts, over images in memory or over a loader.

Shapes: B images a batch, C channels, H × W pixels, K classes.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mimir_fast.attacks.pgd import cross_entropy
from mimir_fast.data.batch import Batch
from mimir_fast.evaluation.images import EvaluationImages
from mimir_fast.evaluation.journal import Journal
from mimir_fast.evaluation.precision import strict_fp32

Attack = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
"""(model, images (B, C, H, W), labels (B,), samples (B,)) → adversarial images."""


@dataclass(frozen=True)
class Count:
    """Correct among all; prints as a percentage with its standard error."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """Part of the images that are classified correctly, 0 … 1."""
        return self.correct / self.total

    @property
    def standard_error(self) -> float:
        """Of the accuracy as an estimate for the whole distribution: √(p(1−p)/N)."""
        return (self.accuracy * (1 - self.accuracy) / self.total) ** 0.5

    def __str__(self) -> str:
        return f"{100 * self.accuracy:.2f} % ({self.correct}/{self.total})"


def clean(model: nn.Module, images: Tensor, labels: Tensor, samples: Tensor) -> Tensor:
    """The attack that does nothing."""
    return images


def outcomes(model: nn.Module, images: Tensor, labels: Tensor, samples: Tensor, attack: Attack) -> dict[str, Tensor]:
    """One number an image: `correct` (0 or 1), `loss` (cross entropy), `linf` (size of the perturbation), each (B,).

    Raises:
        ValueError: the model's outputs are not (B, K).
    """
    x = attack(model, images, labels, samples)
    with torch.no_grad():
        logits = model(x)
    if logits.ndim != 2 or len(logits) != len(images):
        raise ValueError(f"the model returned {tuple(logits.shape)} for {len(images)} images, wanted (B, classes)")
    return {
        "correct": (logits.argmax(dim=1) == labels).int(),
        "loss": cross_entropy(logits, labels),
        "linf": (x - images).abs().flatten(1).amax(dim=1),
    }


def measure(
    model: nn.Module,
    shard: EvaluationImages,
    attack: Attack = clean,
    *,
    batch_size: int,
    device: torch.device,
    journal: Path | None = None,
    settings: Any = None,
) -> Journal:
    """Outcomes of every image of a shard under an attack; goes on where the journal ends.

    Args:
        journal: the file that keeps finished batches.
        settings: JSON-able description of everything the outcomes depend on.
    """
    record = Journal(journal, settings)
    with strict_fp32(device):
        for images, labels, samples in shard.batches(batch_size, device, start=record.num_images):
            started = time.perf_counter()
            values = {name: value.cpu() for name, value in outcomes(model, images, labels, samples, attack).items()}
            record.append(values, time.perf_counter() - started)
    return record


def accuracy(model: nn.Module, batches: Iterable[Batch], attack: Attack = clean) -> Count:
    """Accuracy over a loader's evaluation pass; counts of all processes are added when there are several.

    Args:
        model: takes float images in [0, 1] on the batches' device.
        batches: `build_loader(…, split="test")`, uint8 or float images.
        attack: such as `lambda model, x, y, samples: pgd(model, x, y, threat, samples=samples, mode="eval")`.
    Raises:
        ValueError: there was no image.
    """
    from torch import distributed as dist

    totals = torch.zeros(2, dtype=torch.int64)
    for batch in batches:
        images = batch.images.float() / 255 if batch.images.dtype == torch.uint8 else batch.images
        with strict_fp32(images.device):
            correct = outcomes(model, images, batch.labels, batch.samples, attack)["correct"]
        totals += torch.tensor([int(correct.sum()), len(images)])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(totals)
    if totals[1] == 0:
        raise ValueError("accuracy of no images: the loader is empty, or the limit is 0")
    return Count(int(totals[0]), int(totals[1]))
