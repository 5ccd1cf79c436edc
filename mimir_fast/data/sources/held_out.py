"""The samples of a split that a training run never sees."""

import numpy as np


def hold_out(num_samples: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(rest, held): positions of a split, (N,) int64 ascending; `count` are held out at equal distances.

    At most a tenth is held out: a small data set is there to be trained on.
    """
    count = min(count, num_samples // 10)
    held = np.arange(count, dtype=np.int64) * num_samples // max(count, 1)
    return np.setdiff1d(np.arange(num_samples, dtype=np.int64), held), held
