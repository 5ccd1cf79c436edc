"""MixUp and CutMix with soft labels: each image is blended with, or gets a rectangle from, its neighbour in the batch.

    MixUp    x̃ = λ·x + (1 − λ)·x',  ỹ = λ·y + (1 − λ)·y',   λ ~ Beta(α, α)           (arXiv 1710.09412)
    CutMix   a box of area 1 − λ comes from x'; λ is then the part of x that is left  (arXiv 1905.04899)

Neighbours are the pairs (0, 1), (2, 3), … of a batch, and λ and box belong to the sample: with an even micro-batch the
result does not depend on how the global batch is cut into ranks. Strength may rise over the first epochs, as in the
MIMIR recipes, because strong augmentation hurts adversarial training at its start.

Shapes: B images, C channels, H × W pixels, K classes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mimir_fast.ops.random_uniform import random_uniform
from mimir_fast.philox import Stream
from mimir_fast.validation import check_fields, without

_BETA_TRIES = 16  # for α = 0.8 a try succeeds in 61 % of cases: all fail once in three million


@dataclass
class MixingConfig:
    """MixUp and CutMix: whether, how strongly and how often images are mixed."""

    mixup: float = 0.0
    """Beta parameter of MixUp, 0.8 in the recipes; 0 is off."""
    cutmix: float = 0.0
    """Beta parameter of CutMix, 1.0 in the recipes; 0 is off."""
    switch_prob: float = 0.5
    """Probability of CutMix where both are on."""
    prob: float = 1.0
    """Probability that an image is mixed at all."""
    warmup_epochs: float = 0.0
    """The probability rises linearly from half of `prob` to `prob` over so many epochs."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.mixup < 0 or self.cutmix < 0:
            raise ValueError(f"mixup={self.mixup}, cutmix={self.cutmix}: wanted 0 (off) or a positive Beta parameter")
        for name in ("switch_prob", "prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}, wanted a probability in [0, 1]")
        if self.warmup_epochs < 0:
            raise ValueError(f"warmup_epochs={self.warmup_epochs}, wanted 0 or more")

    def idle(self) -> dict[str, str]:
        """Options that do nothing as the others are."""
        mixed = self.mixup > 0 or self.cutmix > 0
        both = self.mixup > 0 and self.cutmix > 0
        if self.prob == 0:
            return dict.fromkeys(("mixup", "cutmix", "switch_prob", "warmup_epochs"), "--{}prob is 0")
        return without(both, "--{}mixup or --{}cutmix is 0", "switch_prob") | without(
            mixed, "--{}mixup and --{}cutmix are 0", "prob", "warmup_epochs"
        )

    @property
    def enabled(self) -> bool:
        """True when anything would be mixed."""
        return self.prob > 0 and (self.mixup > 0 or self.cutmix > 0)


def warmup(start: float, end: float, epochs_B: Tensor, warmup_epochs: float) -> Tensor:
    """(B,) float32: from `start` at epoch 0 linearly to `end` at `warmup_epochs`, constant after that."""
    if warmup_epochs <= 0:
        return torch.full_like(epochs_B, end, dtype=torch.float32)
    return start + (end - start) * (epochs_B.float() / warmup_epochs).clamp(max=1)


def smooth_labels(labels_B: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """(B, K) float32: 1 − smoothing on the true class, plus smoothing/K on every class."""
    return F.one_hot(labels_B, num_classes).float() * (1 - smoothing) + smoothing / num_classes


def mix(
    config: MixingConfig, images: Tensor, targets_BK: Tensor, samples_B: Tensor, epochs_B: Tensor, *, seed: int
) -> tuple[Tensor, Tensor]:
    """Mixed images (B, C, H, W) and their soft labels (B, K); an odd batch's last image stays as it is.

    Args:
        images: float.
        targets_BK: one-hot or smoothed labels.
    """
    if not config.enabled:
        return images, targets_BK
    partner = torch.arange(len(images), device=images.device) ^ 1
    partner = partner.clamp(max=len(images) - 1)
    draws = random_uniform(seed, Stream.MIXUP, epochs_B, samples_B, 4 + 2 * _BETA_TRIES)
    prob = warmup(config.prob / 2, config.prob, epochs_B, config.warmup_epochs)
    is_mixed = draws[:, 0] < prob
    switch_prob = config.switch_prob if config.mixup and config.cutmix else float(config.cutmix > 0)
    is_cut = draws[:, 1] < switch_prob
    box, left_over = cut_boxes(beta(config.cutmix or 1.0, draws[:, 4:]), draws[:, 2:4], images.shape[-2:])
    blended = torch.where(is_cut, left_over, beta(config.mixup or 1.0, draws[:, 4:]))
    lam_B = torch.where(is_mixed, blended, torch.ones_like(blended))

    weight = torch.where((is_cut & is_mixed).view(-1, 1, 1), 1 - box.float(), lam_B.view(-1, 1, 1)).unsqueeze(1)
    mixed = images * weight + images[partner] * (1 - weight)
    lam = lam_B.unsqueeze(1)
    return mixed, targets_BK * lam + targets_BK[partner] * (1 - lam)


def beta(alpha: float, draws_BT: Tensor) -> Tensor:
    """(B,) draws of Beta(α, α) from pairs of uniform numbers, by Jöhnk's rejection method.

    X = U^(1/α), Y = V^(1/α); accepted when X + Y ≤ 1, and then X / (X + Y) is Beta(α, α).
    """
    x, y = (draws_BT.chunk(2, dim=1)[i].clamp(min=1e-7) ** (1 / alpha) for i in (0, 1))
    accepted = x + y <= 1
    first = accepted.float().argmax(dim=1, keepdim=True)
    values = (x / (x + y)).gather(1, first)[:, 0]
    return torch.where(accepted.any(dim=1), values, torch.full_like(values, 0.5))


def cut_boxes(lam_B: Tensor, centres_B2: Tensor, size: torch.Size) -> tuple[Tensor, Tensor]:
    """((B, H, W) bool, True inside a box of area 1 − λ cut at the image's edge; (B,) the part outside of it)."""
    height, width = size
    side = (1 - lam_B).sqrt()
    inside = []
    for length, centre in ((height, centres_B2[:, 0]), (width, centres_B2[:, 1])):
        half, middle = (side * length / 2).floor(), (centre * length).floor()
        places = torch.arange(length, device=lam_B.device)
        inside.append((places >= (middle - half)[:, None]) & (places < (middle + half)[:, None]))
    box = inside[0][:, :, None] & inside[1][:, None, :]
    return box, 1 - box.float().mean(dim=(1, 2))
