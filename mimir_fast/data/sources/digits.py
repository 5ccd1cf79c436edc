"""Handwritten digits embedded in scikit-learn: 1797 real images that need no download.

UCI's Optical Recognition of Handwritten Digits (Alpaydin and Kaynak 1998), 8x8 pixels with 17 grey levels, upsampled.
Every sixth image is for testing: 1497 to train on, 300 to test.
"""

import numpy as np

from mimir_fast.data.config import DataConfig
from mimir_fast.data.registry import register
from mimir_fast.data.sources.base import ArraySource
from mimir_fast.sizes import Size, height_width

TEST_EVERY = 6


def build(config: DataConfig, split: str) -> ArraySource:
    """The digits at `config.image_size`, one channel."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("source 'digits' reads scikit-learn's images: pip install scikit-learn") from error
    digits = load_digits()
    is_test = np.arange(len(digits.images)) % TEST_EVERY == 0
    chosen = is_test if split == "test" else ~is_test
    images = np.stack([_upsample(image, config.image_size) for image in digits.images[chosen]])
    return ArraySource("digits", images[:, None], digits.target[chosen], [str(name) for name in digits.target_names])


def _upsample(image: np.ndarray, size: Size) -> np.ndarray:
    from PIL import Image

    height, width = height_width(size)
    levels = Image.fromarray(np.rint(image * (255 / 16)).astype(np.uint8))
    return np.asarray(levels.resize((width, height), Image.Resampling.BICUBIC))


register("digits", build, root=False)
