"""RandAugment on the device, a batch at a time (Cubuk et al., arXiv 1909.13719; timm's `rand-mM-mstd0.5-inc1`).

Each image goes through `num_ops` operations drawn from fifteen, each applied with probability one half at a strength
M + N(0, 0.5) on a scale of 0 … 10. The images of a batch that drew the same operation are worked on together, every
one with its own strength. Draws are functions of (seed, epoch, sample). The strength may rise over the first epochs, as
in the MIMIR recipes (1 → 9 over 10 epochs).

Grouping by operation needs the draws on the host: one wait for the device a step, next to the passes of an attack.
Shapes: B images (G in a group), C channels, H × W pixels; uint8 in and out. `level` is (G,) in [0, 1], `sign` (G,) ±1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mimir_fast.methods.mixing import warmup
from mimir_fast.ops.random_uniform import random_uniform
from mimir_fast.philox import Stream, normal
from mimir_fast.validation import check_fields, without

Interpolation = Literal["bilinear", "bicubic"]

_MAX_LEVEL = 10.0
_LEVEL_STD = 0.5
_APPLY_PROB = 0.5


@dataclass
class RandAugmentConfig:
    """Strong augmentation; it hurts short adversarial training and helps long one."""

    num_ops: int = 0
    """Operations an image goes through: 2 in the recipes, 0 is off."""
    magnitude: float = 9.0
    """Strength, 0 to 10."""
    warmup_epochs: float = 0.0
    """The strength rises linearly from 1 to `magnitude` over so many epochs; 10 in the recipes."""
    fill: tuple[int, ...] = (128,)
    """Level, 0 to 255, of what a geometric operation brings in from outside: one, or one a channel. timm's
    `create_transform` takes the mean that images are normalised by: 0 for the MIMIR authors, 124 116 104 for MAE."""
    interpolation: Interpolation = "bilinear"
    """Of the geometric operations. `bilinear` blends the border with the fill; `bicubic` is PIL's, with a hard border,
    as in the authors' `create_transform`."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.num_ops < 0:
            raise ValueError(f"randaugment num_ops={self.num_ops}, wanted 0 (off) or more; the recipes use 2")
        if not 0 <= self.magnitude <= _MAX_LEVEL:
            raise ValueError(f"randaugment magnitude={self.magnitude}, wanted 0 to 10; the recipes use 9")
        if not self.fill or min(self.fill) < 0 or max(self.fill) > 255:
            raise ValueError(
                f"randaugment fill={self.fill}, wanted levels from 0 to 255: one, such as 128, or one a channel"
            )
        if self.warmup_epochs < 0:
            raise ValueError(f"randaugment warmup_epochs={self.warmup_epochs}, wanted 0 or more")

    def idle(self) -> dict[str, str]:
        """Options that do nothing as the others are."""
        return without(self.enabled, "--{}num_ops is 0", "magnitude", "warmup_epochs", "fill", "interpolation")

    @property
    def enabled(self) -> bool:
        """True when anything would be done."""
        return self.num_ops > 0


def rand_augment(
    config: RandAugmentConfig, images: Tensor, samples_B: Tensor, epochs_B: Tensor, *, seed: int
) -> Tensor:
    """Augmented images, (B, C, H, W) uint8.

    Raises:
        ValueError: images are not uint8.
    """
    if images.dtype != torch.uint8:
        raise ValueError(f"RandAugment works on uint8 images in [0, 255], got {images.dtype}; switch it off for floats")
    samples, epochs = samples_B.cpu(), epochs_B.cpu()
    draws = random_uniform(seed, Stream.AUGMENT, epochs, samples, 3 * config.num_ops).view(
        len(images), config.num_ops, 3
    )
    jitter = normal(seed, Stream.AUGMENT_STRENGTH, epochs, samples, config.num_ops) * _LEVEL_STD
    middle = warmup(1.0, config.magnitude, epochs, config.warmup_epochs)
    level = ((middle[:, None] + jitter) / _MAX_LEVEL).clamp(0, 1).to(images.device)
    sign = torch.where(draws[..., 1] < 0.5, -1.0, 1.0).to(images.device)
    chosen = (draws[..., 0] * len(OPERATIONS)).long()
    applied = draws[..., 2] < _APPLY_PROB

    images = images.clone()
    for slot in range(config.num_ops):
        for number, operation in enumerate(OPERATIONS.values()):
            rows = torch.nonzero((chosen[:, slot] == number) & applied[:, slot])[:, 0].to(images.device)
            if len(rows):
                images[rows] = operation(images[rows], level[rows, slot], sign[rows, slot], config)
    return images


Operation = Callable[[Tensor, Tensor, Tensor, RandAugmentConfig], Tensor]
"""(images (G, C, H, W) uint8, level (G,), sign (G,), fill and interpolation) → images."""


def _auto_contrast(images: Tensor, level: Tensor, sign: Tensor, config: RandAugmentConfig) -> Tensor:
    from torchvision.transforms.v2.functional import autocontrast

    return autocontrast(images)


def _equalize(images: Tensor, level: Tensor, sign: Tensor, config: RandAugmentConfig) -> Tensor:
    from torchvision.transforms.v2.functional import equalize

    return equalize(images)


def _invert(images: Tensor, level: Tensor, sign: Tensor, config: RandAugmentConfig) -> Tensor:
    return 255 - images


def _posterize(images: Tensor, level: Tensor, sign: Tensor, config: RandAugmentConfig) -> Tensor:
    dropped_bits = 4 + (level * 4).long()
    mask = (0xFF << dropped_bits) & 0xFF
    return images & _column(mask).to(torch.uint8)


def _solarize(images: Tensor, level: Tensor, sign: Tensor, config: RandAugmentConfig) -> Tensor:
    threshold = 256 - (level * 256).floor()
    return torch.where(images >= _column(threshold), 255 - images, images)


def _solarize_add(images: Tensor, level: Tensor, sign: Tensor, config: RandAugmentConfig) -> Tensor:
    added = (images.int() + _column((level * 110).int())).clamp(max=255).to(torch.uint8)
    return torch.where(images < 128, added, images)


def _blend(images: Tensor, degenerate: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """degenerate + factor·(image − degenerate), factor 1 ± 0.9·level: PIL's ImageEnhance."""
    factor = _column((1 + 0.9 * level * sign).clamp(min=0.1))
    return (degenerate + factor * (images.float() - degenerate)).clamp(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    if images.shape[1] == 1:
        return images.float()
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device).view(1, 3, 1, 1)
    return (images.float() * weights).sum(dim=1, keepdim=True).round()


def _color(images: Tensor, level: Tensor, sign: Tensor, config: RandAugmentConfig) -> Tensor:
    return _blend(images, _grey(images), level, sign)


def _contrast(images: Tensor, level: Tensor, sign: Tensor, config: RandAugmentConfig) -> Tensor:
    mean = (_grey(images).mean(dim=(1, 2, 3), keepdim=True) + 0.5).floor()
    return _blend(images, mean, level, sign)


def _brightness(images: Tensor, level: Tensor, sign: Tensor, config: RandAugmentConfig) -> Tensor:
    return _blend(images, torch.zeros((), device=images.device), level, sign)


def _sharpness(images: Tensor, level: Tensor, sign: Tensor, config: RandAugmentConfig) -> Tensor:
    kernel = torch.tensor([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]], device=images.device) / 13
    channels = images.shape[1]
    smooth = images.float()
    inner = F.conv2d(smooth, kernel.expand(channels, 1, 3, 3), groups=channels).round()
    smooth = smooth.clone()
    smooth[:, :, 1:-1, 1:-1] = inner  # PIL leaves the border as it is
    return _blend(images, smooth, level, sign)


def _affine(images: Tensor, rows_G23: Tensor, config: RandAugmentConfig) -> Tensor:
    """Resampling; `rows_G23` maps output to input places, in units where the image spans [−1, 1]."""
    grid = F.affine_grid(rows_G23, list(images.shape), align_corners=False)
    fill = torch.tensor(config.fill, dtype=torch.float32, device=images.device).view(-1, 1, 1)
    if config.interpolation == "bicubic":
        return _bicubic(images, grid, fill)
    moved = F.grid_sample(images.float() - fill, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return (moved + fill).round().clamp(0, 255).to(torch.uint8)


def _bicubic(images: Tensor, grid_GHW2: Tensor, fill_C11: Tensor) -> Tensor:
    """As PIL's `transform`: cubic with a = −1 on the image continued by its border, cut to integers; the fill outside.

    torch's own bicubic has a = −0.75, and blends the border with what is outside.
    """
    G, C, H, W = images.shape
    sides = torch.tensor([W, H], device=images.device)
    place = (grid_GHW2 + 1) / 2 * sides  # in pixels from the left upper corner
    inside = ((place >= 0) & (place < sides)).all(dim=-1)
    first = (place - 0.5).floor()
    part = place - 0.5 - first
    flat, rows, wide = images.float().flatten(2), [], range(-1, 3)
    weights = [_cubic(part - offset) for offset in wide]  # of x and y, (G, H, W, 2)
    index = [(first + offset).clamp(min=0).minimum(sides - 1).long() for offset in wide]
    for y in range(4):
        row: Tensor | float = 0.0
        for x in range(4):
            at = (index[y][..., 1] * W + index[x][..., 0]).flatten(1)
            row = row + weights[x][:, None, ..., 0] * flat.gather(2, at[:, None].expand(-1, C, -1)).view(G, C, H, W)
        rows.append(weights[y][:, None, ..., 1] * row)
    # Whole numbers stay what they are whatever they were rounded to in fp32.
    moved = torch.where(inside[:, None], (sum(rows) + 1e-3).clamp(0, 255), fill_C11)  # type: ignore[union-attr]
    return moved.to(torch.uint8)


def _cubic(distance: Tensor) -> Tensor:
    """Keys' kernel with a = −1."""
    d = distance.abs()
    near, far = (d - 2) * d**2 + 1, ((5 - d) * d - 8) * d + 4
    return torch.where(d <= 1, near, torch.where(d < 2, far, torch.zeros_like(d)))


def _rows(level: Tensor, **entries: Tensor | float) -> Tensor:
    """(G, 2, 3) matrices, identity but for the entries `xx, xy, x1, yx, yy, y1`."""
    places = {"xx": (0, 0), "xy": (0, 1), "x1": (0, 2), "yx": (1, 0), "yy": (1, 1), "y1": (1, 2)}
    matrix = torch.eye(2, 3, device=level.device).repeat(len(level), 1, 1)
    for name, value in entries.items():
        matrix[:, places[name][0], places[name][1]] = value
    return matrix


def _rotate(images: Tensor, level: Tensor, sign: Tensor, config: RandAugmentConfig) -> Tensor:
    angle, tall = torch.deg2rad(30 * level * sign), images.shape[2] / images.shape[3]
    return _affine(
        images, _rows(level, xx=angle.cos(), xy=-angle.sin() * tall, yx=angle.sin() / tall, yy=angle.cos()), config
    )


def _shear_x(images: Tensor, level: Tensor, sign: Tensor, config: RandAugmentConfig) -> Tensor:
    shear = 0.3 * level * sign * (images.shape[2] / images.shape[3])
    return _affine(images, _rows(level, xy=shear, x1=shear), config)  # about the upper edge, as PIL does


def _shear_y(images: Tensor, level: Tensor, sign: Tensor, config: RandAugmentConfig) -> Tensor:
    shear = 0.3 * level * sign * (images.shape[3] / images.shape[2])
    return _affine(images, _rows(level, yx=shear, y1=shear), config)


def _translate_x(images: Tensor, level: Tensor, sign: Tensor, config: RandAugmentConfig) -> Tensor:
    return _affine(images, _rows(level, x1=2 * 0.45 * level * sign), config)


def _translate_y(images: Tensor, level: Tensor, sign: Tensor, config: RandAugmentConfig) -> Tensor:
    return _affine(images, _rows(level, y1=2 * 0.45 * level * sign), config)


def _column(values_G: Tensor) -> Tensor:
    return values_G.view(-1, 1, 1, 1)


OPERATIONS: dict[str, Operation] = {
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "Invert": _invert,
    "Rotate": _rotate,
    "PosterizeIncreasing": _posterize,
    "SolarizeIncreasing": _solarize,
    "SolarizeAdd": _solarize_add,
    "ColorIncreasing": _color,
    "ContrastIncreasing": _contrast,
    "BrightnessIncreasing": _brightness,
    "SharpnessIncreasing": _sharpness,
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateXRel": _translate_x,
    "TranslateYRel": _translate_y,
}
