"""Features of a data set by a frozen encoder, computed once and kept in memory-mapped files.

Each rank writes a block of rows of one file; images are decoded by threads while the encoder works on those before.
Shapes: N images, C channels, S × S pixels, D numbers a feature.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mimir_fast.data.config import DataConfig
from mimir_fast.data.sources.base import ImageSource
from mimir_fast.evaluation.images import EvaluationImages, Fitting, load_from
from mimir_fast.sizes import height_width
from mimir_fast.validation import counted
from mimir_fast.world import World

DECODED_AT_ONCE = 1024
"""Images of a rank that are decoded together, while those before are encoded."""


@dataclass
class Features:
    """Features of images, in the order of their samples.

    Attributes:
        values: (N, D) float32, memory-mapped.
        labels: (N,) int64.
        samples: (N,) int64, positions in the split.
    """

    values: Tensor
    labels: Tensor
    samples: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> "Features":
        """The rows at `index`, in memory."""
        return Features(self.values[index], self.labels[index], self.samples[index])


def decoded(
    source: ImageSource, config: DataConfig, indices: np.ndarray, fitting: Fitting | None = None
) -> Iterator[EvaluationImages]:
    """Images of an open source, some at a time; the next ones are decoded meanwhile.

    Raises:
        ValueError: an image is unreadable or has no label.
    """
    pieces = np.array_split(indices, max(1, -(-len(indices) // DECODED_AT_ONCE)))
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(load_from, source, config, pieces[0], fitting)
        for piece in [*pieces[1:], None]:
            images = coming.result()
            if images.skipped:
                where, reason = next(iter(images.skipped.items()))
                are = counted(len(images.skipped), "image is", "images are")
                raise ValueError(f"{source.name}: {are} unreadable, such as {where}: {reason}")
            if piece is not None:
                coming = ahead.submit(load_from, source, config, piece, fitting)
            yield images


def extract(
    encode: Callable[[Tensor], Tensor], source: ImageSource, config: DataConfig, indices: np.ndarray, path: Path,
    world: World, *, batch_size: int = 256, fitting: Fitting | None = None,
) -> Features:  # fmt: skip
    """Features of the images at `indices` (N,), written to `path` (.npy) and mapped from there. Collective.

    Args:
        encode: images (B, C, S, S) float in [0, 1] on the world's device → features (B, D), D the same for all.
    """
    blank = torch.zeros(1, config.channels, *height_width(config.image_size), device=world.device)
    with torch.inference_mode():
        width = encode(blank).shape[1]

    def create() -> bool:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(len(indices), width)).flush()
        return True

    world.on_main(create)
    rows = np.load(path, mmap_mode="r+")
    start, end = (len(indices) * part // world.size for part in (world.rank, world.rank + 1))

    def write() -> bool:
        place = start
        for images in decoded(source, config, indices[start:end], fitting) if end > start else ():
            for x, _, _ in images.batches(batch_size, world.device):
                with torch.inference_mode():
                    found = encode(x).float().cpu().numpy()
                rows[place : place + len(found)] = found
                place += len(found)
        rows.flush()
        return True

    world.together(write)
    labels = torch.from_numpy(np.asarray(source.labels)[indices].astype(np.int64))
    return Features(torch.from_numpy(np.load(path, mmap_mode="r+")), labels, torch.from_numpy(indices.astype(np.int64)))
