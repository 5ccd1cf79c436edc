"""What `mimir_fast.data.prepare` is asked for, and what that comes to: the sources, and a job for each shard."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from mimir_fast._tyro import tyro
from mimir_fast.data.config import DataConfig
from mimir_fast.data.order import shuffled
from mimir_fast.data.shard_files import Job
from mimir_fast.data.sources import build_source
from mimir_fast.data.sources.base import ImageSource, MissingDataError
from mimir_fast.extensions import Imports
from mimir_fast.validation import check_number, without

ADVICE = "run the command that wrote it again; it goes on where it was"


@dataclass
class PrepareConfig:
    """What to read, where to write it, and how."""

    source: Annotated[str, tyro.conf.Positional]
    """root of the data set, as --data.root of training: a folder with train/<class>/ and val/<class>/"""
    out: Annotated[str, tyro.conf.Positional]
    """folder for the shards; about 200 KB an image (raw at 256 pixels)"""
    format: Literal["raw", "webdataset"] = "raw"
    """raw: uint8 pixels to be mapped into memory, the fastest; webdataset: tar files, a tenth of the size"""
    source_format: str = "folder"
    """how SOURCE is read: any name of --data.source"""
    splits: tuple[str, ...] = ("train", "test")
    """which splits; those that SOURCE lacks are left out if there is another"""
    short_side: int | None = None
    """larger images are resized (bicubic, antialiased) to this short side; raw: 256; webdataset: files as they are"""
    channels: Literal[1, 3] = 3
    """of raw images: 3 RGB, 1 grey"""
    images_per_shard: int = 1000
    """images in a file"""
    num_workers: int = os.cpu_count() or 1
    """processes"""
    max_bad_files: int = 1000
    """unreadable files that are left out before the command stops"""
    seed: int = 0
    """of the order in which training samples are written"""
    verify: bool = False
    """write nothing: compare sizes and checksums of what OUT holds with what was written, and its files with SOURCE"""
    imports: Imports = ()
    """module that registers the source of --source_format"""

    def __post_init__(self) -> None:
        for name, least in (("images_per_shard", 1), ("num_workers", 1), ("max_bad_files", 0), ("seed", 0)):
            check_number(name, getattr(self, name), at_least=least)
        if self.short_side is not None and self.short_side < 1:
            raise ValueError(
                f"short_side must be at least 1 pixel, got {self.short_side}; leave it out for the default"
            )
        if unknown := set(self.splits) - {"train", "test"}:
            raise ValueError(f"splits must be train and test, got {', '.join(sorted(unknown))}")

    def idle(self) -> dict[str, str]:
        """Options that do nothing as the others are."""
        return without(self.format == "raw", "--format is not raw", "channels")

    @property
    def side(self) -> int | None:
        """Short side of the images written; None leaves the files alone."""
        return 256 if self.short_side is None and self.format == "raw" else self.short_side


def sources_of(config: PrepareConfig) -> dict[str, ImageSource]:
    """The splits that are there.

    Raises:
        MissingDataError: none is.
    """
    sources: dict[str, ImageSource] = {}
    missing: list[MissingDataError] = []
    data = DataConfig(source=config.source_format, root=config.source)
    for split in config.splits:
        try:
            sources[split] = build_source(data, split)
        except MissingDataError as error:
            missing.append(error)
    if not sources:
        raise missing[0]
    return sources


def jobs_of(config: PrepareConfig, source: ImageSource, split: str) -> list[Job]:
    """The shards of a split; training samples are mixed before they are dealt out."""
    out, order = Path(config.out).expanduser(), np.arange(len(source))
    if split == "train":
        order = shuffled(order, len(source), config.seed, 0)
    return [
        Job(out, split, number, config.format, order[start : start + config.images_per_shard], config.side,
            config.channels)
        for number, start in enumerate(range(0, len(source), config.images_per_shard))
    ]  # fmt: skip
