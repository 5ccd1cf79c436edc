"""What `mimir_fast.data.prepare` says about the shards it wrote: one `<split>.json` that people can read.

Beside it a table, `<split>.npz` (mapped into memory): each image's label, the file it was (`names`) and that file's
CRC-32 (`contents`); of the raw format also where it lies and its size.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mimir_fast.checkpoints.durable import write_whole
from mimir_fast.data.sources.base import MissingDataError

VERSION = 1
TABLE = ("shard_ids", "offsets", "heights", "widths", "labels", "names")


@dataclass
class Shard:
    """One file of a prepared split."""

    file: str
    images: int
    bytes: int
    crc32: int


@dataclass
class Manifest:
    """One prepared split.

    Attributes:
        format: "raw" or "webdataset".
        settings: what was asked for: source, split, short_side, …
        channels: of the raw images.
        skipped: files that could not be read, path → reason.
    """

    format: str
    settings: dict[str, Any]
    channels: int
    classes: list[str]
    shards: list[Shard] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    version: int = VERSION

    @property
    def num_images(self) -> int:
        """Number of images in all shards together."""
        return sum(shard.images for shard in self.shards)

    def write(self, path: Path) -> None:
        """Durably, whole or not at all."""
        write_whole(path, lambda aside: aside.write_text(json.dumps(asdict(self), indent=1)))


def read_manifest(path: Path, advice: str) -> Manifest:
    """The manifest of a prepared split.

    Raises:
        MissingDataError: there is none.
        ValueError: it is damaged, of another version, or names files outside of its folder.
    """
    if not path.is_file():
        raise MissingDataError(f"{path} does not exist, so {path.parent} was not (completely) prepared: {advice}")
    try:
        entries = json.loads(path.read_text())
        version = entries["version"]
        if version != VERSION:
            raise ValueError(f"it has version {version}, this mimir_fast reads version {VERSION}")
        shards = [Shard(**shard) for shard in entries.pop("shards")]
        manifest = Manifest(shards=shards, **entries)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a manifest of prepared shards ({error}): {advice}") from error
    for shard in manifest.shards:
        if Path(shard.file).name != shard.file or shard.file in ("", "..", "."):
            raise ValueError(f"{path} names {shard.file!r}, which is no file in its folder; refused")
    return manifest


def check_classes(folder: Path, split: str, classes: list[str], advice: str) -> None:
    """Raises ValueError if another split of the folder was prepared with other classes: its labels mean others."""
    for other in {"train", "test"} - {split}:
        path = folder / f"{other}.json"
        if path.is_file() and (theirs := read_manifest(path, advice).classes) != classes:
            here, there = (f"{len(names)} ({', '.join(names[:3])}, …)" for names in (classes, theirs))
            raise ValueError(
                f"{folder}: {split} has the classes {here}, {other} was prepared when they were {there}: prepare both "
                f"splits anew: {advice}"
            )


def check_sizes(manifest: Manifest, folder: Path, advice: str) -> None:
    """Raises ValueError if a shard is missing or has another size than was written."""
    for shard in manifest.shards:
        path = folder / shard.file
        size = path.stat().st_size if path.is_file() else None
        if size != shard.bytes:
            what = "is missing" if size is None else f"has {size} bytes, {shard.bytes} were written"
            raise ValueError(f"{path} {what}: copy it again, or make it anew: {advice}")
