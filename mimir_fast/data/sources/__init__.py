"""The sources: what images there are, one file a format; each file registers the names it can build."""

from mimir_fast.data.config import DataConfig
from mimir_fast.data.registry import SOURCES, register
from mimir_fast.data.sources.base import (
    ArraySource,
    EncodedSource,
    ImageSource,
    MissingDataError,
    RawSource,
    hold_out,
    subset,
    take_evenly,
)

__all__ = [
    "SOURCES",
    "ArraySource",
    "EncodedSource",
    "ImageSource",
    "MissingDataError",
    "RawSource",
    "build_source",
    "register",
]


def build_source(config: DataConfig, split: str) -> ImageSource:
    """The named source's split ("train" or "test"; "val" is another name of "test"), or the part of "train" that is
    "held_out" of it (`config.hold_out`).

    Raises:
        ValueError: unknown split, or damaged files.
        MissingDataError: the files are not there; the message says how to get them.
    """
    return part_of(whole_source(config, split), config, split)


def whole_source(config: DataConfig, split: str) -> ImageSource:
    """All that `build_source` takes a part of, with what it raises."""
    if split not in ("train", "held_out", "test", "val"):
        raise ValueError(f"split must be 'train', 'held_out' or 'test' (or 'val'), got {split!r}")
    return SOURCES.find(config.source)(config, "train" if split in ("train", "held_out") else "test")


def part_of(source: ImageSource, config: DataConfig, split: str) -> ImageSource:
    """What of a whole source is the split's: `config.limit` of it, without or only what is held out."""
    if split == "held_out" or (split == "train" and config.hold_out):
        rest, held = hold_out(source.labels, config.hold_out)
        source = subset(source, held if split == "held_out" else rest)
    return take_evenly(source, config.limit)
