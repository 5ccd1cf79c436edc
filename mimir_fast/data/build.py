"""From a configuration to a loader: source, order, plan, and the loader that suits them."""

import numpy as np
import torch

from mimir_fast.data.config import DataConfig
from mimir_fast.data.loaders.base import Loader
from mimir_fast.data.loaders.resident import ResidentLoader
from mimir_fast.data.order import BatchPlan, SampleOrder
from mimir_fast.data.sources import ArraySource, build_source


def build_loader(
    config: DataConfig,
    *,
    split: str,
    batch_size: int,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    accum_iter: int = 1,
    shuffle: bool | None = None,
    augment: bool | None = None,
) -> Loader:
    """A loader of one split for one rank.

    Args:
        split: "train" or "test" ("val" is another name of it).
        batch_size: samples in a rank's micro-batch; the global batch is batch_size * world_size * accum_iter.
        device: where the batches are wanted.
        seed: of order and augmentation.
        shuffle: an endless shuffled stream (True) or one pass in order (False); the default is True for "train".
        augment: crop and mirror as configured; the default is True for "train".
    Raises:
        ValueError, MissingDataError, ImportError: see `build_source` and the loaders; the message names the fix.
    """
    device = torch.device(device)
    shuffle = split == "train" if shuffle is None else shuffle
    augment = split == "train" if augment is None else augment
    source = build_source(config, split)
    order = SampleOrder(len(source), seed, shuffle)
    plan = BatchPlan(batch_size, rank, world_size, accum_iter, stop=None if shuffle else len(source))
    if not isinstance(source, ArraySource):
        raise TypeError(f"no loader for {type(source).__name__}")
    if source.image_size != config.image_size:
        raise ValueError(
            f"{source.name} has {source.image_size} x {source.image_size} pixels but image_size is {config.image_size}; "
            f"give --data.image_size {source.image_size}"
        )
    images = torch.from_numpy(np.ascontiguousarray(source.images))
    return ResidentLoader(images, torch.from_numpy(source.labels), config, plan, order, device, augment)
