"""The registry of sources: one name, one builder, one file a format."""

from collections.abc import Callable

from mimir_fast.data.config import DataConfig
from mimir_fast.data.sources import cifar, digits, folder, idx, raw, shards
from mimir_fast.data.sources.base import (
    ArraySource,
    EncodedSource,
    ImageSource,
    MissingDataError,
    RawSource,
    subset,
    take_evenly,
)
from mimir_fast.data.sources.held_out import hold_out

Builder = Callable[[DataConfig, str], ImageSource]

SOURCES: dict[str, Builder] = {
    "digits": digits.build,
    "fashion_mnist": idx.build_fashion_mnist,
    "idx": idx.build,
    "cifar10": cifar.build_cifar10,
    "cifar100": cifar.build_cifar100,
    "tiny_imagenet": folder.build_tiny_imagenet,
    "imagenet": folder.build_folder,
    "folder": folder.build_folder,
    "webdataset": shards.build,
    "raw": raw.build,
}

__all__ = ["SOURCES", "ArraySource", "EncodedSource", "ImageSource", "MissingDataError", "RawSource", "build_source"]


def build_source(config: DataConfig, split: str) -> ImageSource:
    """The named source's split ("train" or "test"; "val" is another name of "test"), or the part of "train" that is
    "held_out" of it (`config.hold_out`).

    Raises:
        ValueError: unknown split, or damaged files.
        MissingDataError: the files are not there; the message says how to get them.
    """
    if split not in ("train", "held_out", "test", "val"):
        raise ValueError(f"split must be 'train', 'held_out' or 'test' (or 'val'), got {split!r}")
    source = SOURCES[config.source](config, "train" if split in ("train", "held_out") else "test")
    if split == "held_out" or (split == "train" and config.hold_out):
        rest, held = hold_out(len(source), config.hold_out)
        source = subset(source, held if split == "held_out" else rest)
    return take_evenly(source, config.limit)
