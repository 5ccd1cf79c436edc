"""The probe of every epoch: natural, FGSM and PGD accuracy on a fixed subset, and an alarm.

Its images are held out of the *training* split, because it chooses the best checkpoint: chosen on test images, that
checkpoint's test accuracy would be flattered. Not an evaluation (that is `python -m mimir_fast.evaluate`): a few
hundred images, enough to see whether training works and to notice catastrophic overfitting, in which single-step
adversarial training learns a defence against the single step only: FGSM accuracy is high while PGD accuracy falls to
zero (Wong et al., arXiv 2001.03994, §5.4).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mimir_fast.attacks.pgd import fgsm, is_correct, pgd
from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.data.batch import Batch
from mimir_fast.layers.borrowing import borrowed
from mimir_fast.validation import without

# FGSM accuracy may lie a few points above PGD accuracy in healthy training; a gap of 20 points does not happen there.
_ALARMING_GAP = 0.20


@dataclass
class ProbeConfig:
    """What is measured at the end of every epoch."""

    num_images: int = 512
    """Training images it looks at, over all ranks, evenly spaced and never trained on; at most a tenth of the training
    split. 0 is off: everything is trained on, and no checkpoint is called the best."""
    num_steps: int = 10
    """Steps of PGD, each of eps/4."""
    batch_size: int = 128
    """Images that a rank attacks at once."""

    def __post_init__(self) -> None:
        if self.num_images < 0 or self.num_steps < 1 or self.batch_size < 1:
            raise ValueError(
                f"probe of {self.num_images} images, {self.num_steps} steps, batches of {self.batch_size}: "
                "wanted 0 or more images and at least 1 step and 1 image a batch"
            )

    def idle(self) -> dict[str, str]:
        """Options that do nothing as the others are."""
        return without(self.num_images, "--{}num_images is 0", "num_steps", "batch_size")


@dataclass(frozen=True)
class ProbeResult:
    """Accuracies, 0 … 1, and how many images they are of."""

    natural: float
    fgsm: float
    pgd: float
    num_images: int

    @property
    def alarm(self) -> str | None:
        """What to do, when single steps no longer stand for the adversary."""
        if self.fgsm - self.pgd <= _ALARMING_GAP:
            return None
        return (
            f"CATASTROPHIC OVERFITTING: FGSM accuracy {self.fgsm:.1%} but PGD accuracy {self.pgd:.1%}. The model "
            "defends against the single step only, and is not robust. Go back to the `best` checkpoint and train "
            "with more steps (--method pgd --attack.num_steps 2), a smaller --attack.eps, or a lower learning rate"
        )


def probe(
    model: nn.Module, batches: Iterable[Batch], threat: LinfThreat, *, num_steps: int = 10, seed: int = 0
) -> ProbeResult:
    """Accuracies of the model in eval mode on this rank's batches, summed over ranks.

    Args:
        model: takes images in [0, 1]; left as it was, mode included.
        batches: labelled images, uint8 or float.
        threat: its eps is attacked: FGSM with one step of eps, PGD with steps of eps/4 from a random start.
    Raises:
        ValueError: no images on any rank.
    """
    attack = LinfThreat(eps=threat.eps, alpha=threat.eps / 4, num_steps=num_steps, random_start=True)
    counts = torch.zeros(4, dtype=torch.int64)
    with borrowed(model, "eval") as module:
        for batch in batches:
            images = batch.images.float() / 255 if batch.images.dtype == torch.uint8 else batch.images
            stepped = fgsm(module, images, batch.labels, threat.eps)
            attacked = pgd(module, images, batch.labels, attack, samples=batch.samples, seed=seed)
            correct = [_correct(module, x, batch.labels) for x in (images, stepped, attacked)]
            counts += torch.stack([*correct, torch.full_like(correct[0], len(images))]).cpu()
    if dist.is_initialized():
        dist.all_reduce(counts)
    natural, single, robust, total = counts.tolist()
    if total == 0:
        raise ValueError("the probe got no images: give it more training images, or --probe.num_images 0")
    return ProbeResult(natural / total, single / total, robust / total, total)


@torch.no_grad()
def _correct(module: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return is_correct(module(images), labels).sum()
