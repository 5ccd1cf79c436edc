"""Parts of a source: some of its samples, and those a training run never sees."""

import numpy as np

from mimir_fast.data.sources.base import ArraySource, EncodedSource, ImageSource, SubsetSource


def take(source: ImageSource, indices: np.ndarray) -> ImageSource:
    """The samples at `indices` (N,) int64, renumbered."""
    if isinstance(source, ArraySource):
        return ArraySource(source.name, source.images[indices], source.labels[indices], source.classes)
    if isinstance(source, EncodedSource):
        return SubsetSource(source, indices)
    own = getattr(source, "take", None)
    if callable(own):  # sources that know how
        part: ImageSource = own(indices)
        return part
    raise TypeError(f"cannot take a part of a {type(source).__name__}")


def hold_out(num_samples: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(rest, held): positions of a split, (N,) int64 ascending; `count` are held out at equal distances.

    At most a tenth is held out: a small data set is there to be trained on.
    """
    count = min(count, num_samples // 10)
    held = np.arange(count, dtype=np.int64) * num_samples // max(count, 1)
    return np.setdiff1d(np.arange(num_samples, dtype=np.int64), held), held
