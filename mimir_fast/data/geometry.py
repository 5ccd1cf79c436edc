"""Where the pixels of an augmented image come from: crop box, size, window and mirror, as numbers.

Every loader draws these numbers here and only carries them out with its own tools, so PIL, DALI and the tensor ops of
the resident loader cut the same crop. The numbers are functions of (seed, epoch, sample): see mimir_fast.philox.

    image --box--> part --bicubic resize--> H' x W' --window at anchor, zeros outside--> S --mirror-->

Shapes: B samples, S the size of the result: height and width. Coordinates are (y, x) in pixels; all integers.
"""

from dataclasses import dataclass

import numpy as np
import torch

from mimir_fast.data.config import DataConfig
from mimir_fast.philox import Stream, uniform
from mimir_fast.sizes import height_width

_CROP_ATTEMPTS = 10
EVALUATION_RATIO = 256 / 224  # side before the centre crop / side of the crop, where the image fits it tightly


@dataclass
class Geometry:
    """One row a sample.

    Attributes:
        box: (B, 4) int64 y, x, height, width inside the source image.
        size: (B, 2) int64 height and width the box is resized to.
        anchor: (B, 2) int64 corner of the window of size S in the resized box; may lie outside, zeros fill.
        mirror: (B,) bool.
    """

    box: np.ndarray
    size: np.ndarray
    anchor: np.ndarray
    mirror: np.ndarray


def draw_mirror(seed: int, samples: np.ndarray, epochs: np.ndarray) -> np.ndarray:
    """(B,) bool: half of the samples, other ones each epoch."""
    return _uniform(seed, Stream.FLIP, samples, epochs, 1)[:, 0] < 0.5


def draw_shift(seed: int, samples: np.ndarray, epochs: np.ndarray, padding: int) -> np.ndarray:
    """(B, 2) int64 in [-padding, padding]: the shift of a random crop from the zero-padded image."""
    numbers = _uniform(seed, Stream.CROP, samples, epochs, 2)
    return np.floor(numbers * (2 * padding + 1)).astype(np.int64) - padding


def draw_box(
    seed: int,
    samples: np.ndarray,
    epochs: np.ndarray,
    sizes: np.ndarray,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> np.ndarray:
    """(B, 4) int64 y, x, height, width: the box of RandomResizedCrop (Szegedy et al. 2015, torchvision's rule).

    Up to ten tries of an area in `scale` of the image and a log-uniform width/height `ratio`; if none fits, the largest
    centred box whose ratio is allowed. `sizes` is (B, 2) int64, height and width.
    """
    count = _CROP_ATTEMPTS
    numbers = _uniform(seed, Stream.CROP, samples, epochs, 2 * count + 2)
    height, width = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    area = (height * width)[:, None] * (scale[0] + (scale[1] - scale[0]) * numbers[:, :count])
    low, high = np.log(ratio[0]), np.log(ratio[1])
    aspect = np.exp(low + (high - low) * numbers[:, count : 2 * count])
    box_width, box_height = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (box_width > 0) & (box_width <= width[:, None]) & (box_height > 0) & (box_height <= height[:, None])
    rows, first, found = np.arange(len(fits)), fits.argmax(1), fits.any(1)

    fallback_width = np.minimum(width, np.maximum(np.rint(height * ratio[1]), 1))
    fallback_height = np.minimum(height, np.maximum(np.rint(width / ratio[0]), 1))
    box_width = np.where(found, box_width[rows, first], fallback_width)
    box_height = np.where(found, box_height[rows, first], fallback_height)
    y = np.where(found, np.floor(numbers[:, -2] * (height - box_height + 1)), (height - box_height) // 2)
    x = np.where(found, np.floor(numbers[:, -1] * (width - box_width + 1)), (width - box_width) // 2)
    return np.stack([y, x, box_height, box_width], axis=1).astype(np.int64)


def plan_geometry(
    config: DataConfig, augment: bool, seed: int, samples: np.ndarray, epochs: np.ndarray, sizes: np.ndarray
) -> Geometry:
    """The way from images of the given sizes to `config.image_size`.

    Without augmentation an image of that very size is left alone; any other is resized until it just covers 8/7 of it
    (short side 256 for 224 x 224) and the centre cut out. `pad_crop` covers it, and shifts the central window.

    Args:
        samples, epochs: (B,) int64.
        sizes: (B, 2) int64 height and width of the images.
    """
    wanted, num_samples = np.array(height_width(config.image_size)), len(samples)
    how = config.augment if augment else "none"
    mirror = draw_mirror(seed, samples, epochs) if augment and config.flip else np.zeros(num_samples, bool)
    if how == "resized_crop":
        box = draw_box(seed, samples, epochs, sizes, config.crop_scale, config.crop_ratio)
        size = np.tile(wanted.astype(np.int64), (num_samples, 1))
        return Geometry(box, size, np.zeros((num_samples, 2), np.int64), mirror)

    box = np.concatenate([np.zeros_like(sizes), sizes], axis=1)
    is_native = (sizes == wanted).all(axis=1, keepdims=True)
    covered = wanted if how == "pad_crop" else np.rint(wanted * EVALUATION_RATIO).astype(np.int64)
    tight = (covered[0] * sizes[:, 1] < covered[1] * sizes[:, 0]).astype(np.int64)  # the axis with nothing to spare
    size = np.where(is_native, wanted, sizes * covered[tight][:, None] // sizes[np.arange(num_samples), tight][:, None])
    anchor = np.rint((size - wanted) / 2).astype(np.int64)
    if how == "pad_crop":
        anchor += draw_shift(seed, samples, epochs, config.crop_padding)
    return Geometry(box, size, anchor, mirror)


def _uniform(seed: int, stream: Stream, samples: np.ndarray, epochs: np.ndarray, num: int) -> np.ndarray:
    numbers = uniform(seed, stream, torch.from_numpy(epochs), torch.from_numpy(samples), num)
    return numbers.numpy().astype(np.float64)
