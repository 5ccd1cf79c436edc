"""Data are known by what they hold, not by where they lie.

content_of   all samples, as they are stored: the same images in another form of storage are other data
pixels_of    a few decoded images: the same ones in any form of storage
"""

import hashlib
import json
from collections.abc import Iterable

import numpy as np

from mimir_fast.data.sources.base import ImageSource


def digest(parts: Iterable[bytes]) -> str:
    """A short hash of these bytes and of how they are divided."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()[:16]


def content_of(source: ImageSource, indices: np.ndarray | None = None) -> str:
    """A short hash of samples of a source, their order, their labels and the names of the classes; decodes no file.

    Args:
        indices: (N,) positions; None for all of them.
    """
    chosen = np.arange(len(source)) if indices is None else indices
    labels = np.asarray(source.labels[chosen], np.int64).tobytes()
    stamps = (source.stamp(int(index)) for index in chosen)
    return digest([json.dumps(source.classes).encode(), labels, *(hashlib.sha256(stamp).digest() for stamp in stamps)])


def pixels_of(source: ImageSource) -> str:
    """A short hash of all labels and of the pixels of at most 32 samples of a source, at equal distances."""
    chosen = range(0, len(source), max(1, -(-len(source) // 32)))
    labels = np.asarray(source.labels, np.int64).tobytes()
    return digest([labels, *(source.pixels(index).tobytes() for index in chosen)])
