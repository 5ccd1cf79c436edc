"""Generated images in npz files (EDM, Wang et al. 2023), mapped from disk and mixed with a real source.

`np.savez` stores its arrays uncompressed, so the array inside the zip file can be memory-mapped: ten million images are
30.7 GB on disk and nothing in memory. Arrays: `image` (N, H, W, C) uint8, `label` (N,) integers.
"""

from pathlib import Path

import numpy as np

from mimir_fast.data.npz import MissingArrayError, map_member
from mimir_fast.data.sources.base import ArraySource, ImageSource, MissingDataError


def open_npz(path: str, num_classes: int) -> ArraySource:
    """Generated images with their labels (-1 for all if the file has none).

    Raises:
        MissingDataError, ValueError: see `map_member`; also for images that are not (N, H, W, 1 or 3) uint8.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise MissingDataError(
            f"{file} does not exist; --data.generated takes an npz with `image` (N, H, W, C) uint8 and `label`, such "
            "as the 1m, 5m and 10m files published with 'Better Diffusion Models Further Improve Adversarial Training'"
        )
    images = map_member(file, "image")
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[3] not in (1, 3):
        raise ValueError(f"{file}: `image` must be uint8 (N, H, W, 1 or 3), got {images.dtype} {images.shape}")
    try:
        given = map_member(file, "label")
    except MissingArrayError:
        given = np.full(len(images), -1, np.int64)
    else:
        if given.shape != images.shape[:1] or given.dtype.kind not in "iu" or (len(given) and given.min() < 0):
            raise ValueError(
                f"{file}: `label` must be {len(images)} integers from 0, one an image, got {given.dtype} {given.shape}"
                + (f" from {given.min()}" if given.size else "")
            )
    labels = np.array(given, dtype=np.int64)
    if len(labels) and labels.max() >= num_classes:
        raise ValueError(f"{file}: label {labels.max()} but the real source has {num_classes} classes")
    return ArraySource("generated", images.transpose(0, 3, 1, 2), labels, [str(label) for label in range(num_classes)])


class MixedSource(ImageSource):
    """A real source followed by a generated one: samples 0 … R - 1 are real, R … R + G - 1 generated."""

    def __init__(self, real: ImageSource, generated: ArraySource) -> None:
        if real.image_size != generated.image_size:
            raise ValueError(
                f"the generated images are {generated.image_size} pixels wide, those of {real.name} {real.image_size}; "
                "mix images of one size"
            )
        labels = np.concatenate([real.labels, generated.labels])
        super().__init__(f"{real.name}+generated", real.classes, labels, real.image_size)
        self.real, self.generated = real, generated

    def pixels(self, index: int) -> np.ndarray:
        return self.real.pixels(index) if index < len(self.real) else self.generated.pixels(index - len(self.real))

    def where(self, index: int) -> str:
        return self.real.where(index) if index < len(self.real) else self.generated.where(index - len(self.real))
