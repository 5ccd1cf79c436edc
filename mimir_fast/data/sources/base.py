"""What a source is: numbered images with labels, either decoded in memory or encoded in files.

A source knows nothing of order, batches, augmentation or devices.
Shapes: N samples, C channels, H x W pixels; pixels are uint8 in [0, 255].
"""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from mimir_fast.data.order import BLOCKS_IN_WINDOW
from mimir_fast.sizes import Size, as_size

_ROWS = 65_536  # names that are hashed at a time
_UNLIKELY = 4.5  # standard deviations of a normal distribution, which one of 300,000 exceeds


class MissingDataError(FileNotFoundError):
    """The files of a data set are not where they were looked for; the message says how to get them."""


class ImageSource(ABC):
    """Numbered images with labels.

    Attributes:
        name: the data set's name.
        classes: one name a class.
        labels: (N,) int64; -1 where a sample has no label.
        image_size: of all images, or None where they differ.
        block: neighbouring samples that should be read together (see SampleOrder); 0 where any order is as good.
        window: blocks among which samples are mixed.
    """

    block = 0
    window = BLOCKS_IN_WINDOW

    def __init__(
        self, name: str, classes: Sequence[str], labels: np.ndarray | list[int], image_size: Size | None = None
    ) -> None:
        self.name, self.classes, self.image_size = name, tuple(classes), image_size
        self.labels = np.array(labels, dtype=np.int64)  # a copy: an index may be mapped and read-only
        if len(self.labels) == 0:
            raise ValueError(f"{name} has no samples")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Classes, whether or not each has images."""
        return len(self.classes)

    @abstractmethod
    def pixels(self, index: int) -> np.ndarray:
        """One image, (H, W, C) uint8 with C = 1 or 3.

        Raises:
            UnreadableImageError: the file is no image or is cut short.
        """

    def where(self, index: int) -> str:
        """Where the sample comes from, for messages."""
        return f"{self.name}[{index}]"

    def stamp(self, index: int) -> bytes:
        """What tells the sample from others, found without decoding it; its label is not in it.

        The place of a whole data set is not part of it: one that was moved keeps its stamps.
        """
        return self.pixels(index).tobytes()

    def name_of(self, index: int) -> bytes:
        """What the sample is called within its data set."""
        return f"{self.name}[{index}]".encode()

    def state(self, index: int) -> bytes:
        """Differs if the sample was changed under its name, as far as a cheap look tells: size and time of change."""
        return str(zlib.crc32(self.stamp(index))).encode()

    def identities(self) -> np.ndarray:
        """(N,) int64: what tells all samples from those of another data set, as cheaply as it can be had."""
        return hashes(self.stamp(index) for index in range(len(self)))


class ArraySource(ImageSource):
    """Decoded images of one size: an array in memory or mapped from a file.

    Args:
        images: (N, C, H, W) uint8, C = 1 or 3; any strides.
    """

    def __init__(self, name: str, images: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> None:
        if images.ndim != 4 or images.dtype != np.uint8 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"{name}: images must be uint8 of shape (N, 1 or 3, H, W), got {images.dtype} {images.shape}"
            )
        if len(images) != len(labels):
            raise ValueError(f"{name}: {len(images)} images but {len(labels)} labels")
        super().__init__(name, classes, labels, image_size=as_size(images.shape[2:]))
        self.images = images

    def pixels(self, index: int) -> np.ndarray:
        return np.ascontiguousarray(self.images[index].transpose(1, 2, 0))


class EncodedSource(ImageSource):
    """Encoded images, read one at a time."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The bytes of one encoded image file."""

    def stamp(self, index: int) -> bytes:
        return self.read(index)

    def pixels(self, index: int) -> np.ndarray:
        from mimir_fast.data.decode import decode

        return decode(self.read(index), self.where(index))


class RawSource(ImageSource):
    """Uint8 images of any sizes that lie decoded in files and are mapped into memory.

    Args:
        files: the files, each with images (height, width, channels) one after the other.
        table: `shard_ids`, `offsets` (bytes), `heights`, `widths`, each (N,) integers; perhaps `contents`, a hash of
            each.
        channels: 1 or 3.
    """

    def __init__(
        self,
        name: str,
        classes: Sequence[str],
        labels: np.ndarray,
        files: Sequence[Path],
        table: dict[str, np.ndarray],
        channels: int,
    ) -> None:
        super().__init__(name, classes, labels)
        self.files, self.table, self.channels = tuple(files), table, channels
        self.sizes = np.stack([table["heights"], table["widths"]], axis=1).astype(np.int64)
        self._maps: dict[int, np.ndarray] = {}

    def pixels(self, index: int) -> np.ndarray:
        shard, offset = int(self.table["shard_ids"][index]), int(self.table["offsets"][index])
        if shard not in self._maps:
            self._maps[shard] = np.memmap(self.files[shard], np.uint8, mode="r")
        height, width = self.sizes[index].tolist()
        content = self._maps[shard][offset : offset + height * width * self.channels]
        return content.reshape(height, width, self.channels).view(np.ndarray)

    def where(self, index: int) -> str:
        return f"{self.files[self.table['shard_ids'][index]]} at byte {self.table['offsets'][index]}"

    def stamp(self, index: int) -> bytes:
        file = self.files[self.table["shard_ids"][index]].name
        return f"{file} {self.table['offsets'][index]} {self.sizes[index].tolist()}".encode()

    def identities(self) -> np.ndarray:
        if "contents" in self.table:
            return self.table["contents"].astype(np.int64)
        return hashes_of_places(
            [file.name for file in self.files], self.table["shard_ids"], self.table["offsets"], *self.sizes.T
        )

    def take(self, indices: np.ndarray) -> "RawSource":
        """A source of the samples at `indices`, renumbered from 0; the files stay shared."""
        table = {name: column[indices] for name, column in self.table.items()}
        return RawSource(self.name, self.classes, self.labels[indices], self.files, table, self.channels)


class SubsetSource(EncodedSource):
    """Some samples of an encoded source, renumbered."""

    def __init__(self, source: EncodedSource, indices: np.ndarray) -> None:
        super().__init__(source.name, source.classes, source.labels[indices], source.image_size)
        self.source, self.indices = source, indices
        self.block, self.window = source.block, source.window

    def read(self, index: int) -> bytes:
        return self.source.read(int(self.indices[index]))

    def where(self, index: int) -> str:
        return self.source.where(int(self.indices[index]))

    def stamp(self, index: int) -> bytes:
        return self.source.stamp(int(self.indices[index]))

    def name_of(self, index: int) -> bytes:
        return self.source.name_of(int(self.indices[index]))

    def state(self, index: int) -> bytes:
        return self.source.state(int(self.indices[index]))

    def identities(self) -> np.ndarray:
        return self.source.identities()[self.indices]


def hashes(contents: Iterable[bytes]) -> np.ndarray:
    """(N,) int64: CRC-32 of each."""
    return np.fromiter((zlib.crc32(content) for content in contents), np.int64)


def hashes_of_names(names: np.ndarray) -> np.ndarray:
    """(N,) int64 in [0, 2^32): a hash of each name, of (N,) bytes; a million take a tenth of a second."""
    words = -(-names.dtype.itemsize // 8)
    parts = []
    for start in range(0, len(names), _ROWS):
        table = names[start : start + _ROWS].astype(f"S{8 * words}").view(np.uint64).reshape(-1, words)
        mixed = np.zeros(len(table), np.uint64)
        for column in table.T:  # words of zeros are padding: how long the longest name is changes nothing
            mixed = np.where(column == 0, mixed, _mix(mixed ^ column))
        parts.append(mixed)
    return (np.concatenate(parts) >> np.uint64(32)).astype(np.int64)


def _mix(words: np.ndarray) -> np.ndarray:
    words = (words ^ (words >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    return words ^ (words >> np.uint64(29))


def hashes_of_places(files: Sequence[str], file_ids: np.ndarray, *columns: np.ndarray) -> np.ndarray:
    """(N,) int64 in [0, 2^32): a hash of each sample's file name and numbers, such as offset and size."""
    mixed = hashes(name.encode() for name in files)[file_ids].astype(np.uint64)
    for column in columns:
        mixed = _mix(mixed ^ column.astype(np.uint64))
    return (mixed >> np.uint64(32)).astype(np.int64)


def state_of(path: Path) -> str:
    """Size and time of change of a file."""
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def take_evenly(source: ImageSource, limit: int | None) -> ImageSource:
    """`limit` samples as `evenly` chooses them, or the source itself when it is no longer than that."""
    if limit is None or limit >= len(source):
        return source
    return subset(source, evenly(source.labels, limit))


def evenly(labels: np.ndarray, count: int) -> np.ndarray:
    """(min(count, N),) int64 ascending positions of samples that stand for all; labels (N,).

    They lie at equal distances: of data in the order of classes, and of data in random order, that is a fair part of
    each class. Where classes take turns (0, 1, …, 9, 0, 1, …) it may be one class only; then they lie at equal
    distances within the classes, one after the other. Nothing is random: it is the same choice on every rank and at
    every start.
    """
    count = min(count, len(labels))
    chosen = np.arange(count, dtype=np.int64) * len(labels) // max(count, 1)
    return np.sort(np.argsort(labels, kind="stable")[chosen]) if lopsided(labels, chosen) else chosen


def lopsided(labels: np.ndarray, chosen: np.ndarray) -> bool:
    """Whether a part of the samples holds other shares of the classes than one drawn at random ever would.

    A class is missing that less than one of a thousand random parts would miss, or Pearson's X² of the counts is such
    as one of 300,000 would have: with rare classes, too, its tail is taken for that of a gamma distribution with its
    mean k and variance 2k + Σ 1/E (Haldane, Biometrika 29, 1937), by the cube root of Wilson & Hilferty (1931).

    Args:
        labels: (N,) int64 of all samples.
        chosen: positions of the part.
    """
    if not 0 < len(chosen) < len(labels):
        return False
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    part, free = len(chosen) / len(labels), len(counts) - 1
    found, expected = np.bincount(classes.ravel()[chosen], minlength=len(counts)), len(chosen) / len(labels) * counts
    square = float((np.square(found - expected) / expected).sum()) / (1 - part)
    scale = (2 * free + float((1 / expected).sum())) / (2 * free) if free else 1.0
    spread = 2 * scale / (9 * free) if free else 0.0
    unlikely = free * (1 - spread + _UNLIKELY * spread**0.5) ** 3
    return square > unlikely or bool((found[expected > 7 + np.log(len(counts))] == 0).any())


def subset(source: ImageSource, indices: np.ndarray) -> ImageSource:
    """The samples at `indices`, renumbered."""
    if isinstance(source, ArraySource):
        return ArraySource(source.name, source.images[indices], source.labels[indices], source.classes)
    if isinstance(source, EncodedSource):
        return SubsetSource(source, indices)
    if isinstance(source, RawSource):
        return source.take(indices)
    raise TypeError(f"cannot take a part of a {type(source).__name__}")


def hold_out(labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(rest, held): positions of a split, int64 ascending; training never sees the `count` held ones. Labels (N,).

    They lie as `evenly` has it, and are at most a tenth: a small data set is there to be trained on.
    """
    held = evenly(labels, min(count, len(labels) // 10))
    return np.setdiff1d(np.arange(len(labels), dtype=np.int64), held), held


def existing_root(root: str | None, source: str, advice: str) -> Path:
    """The root as a path, or an error that says where the data can be had."""
    if root is None:
        raise MissingDataError(f"source {source!r} needs root (--data.root FOLDER): {advice}")
    path = Path(root).expanduser()
    if not path.exists():
        raise MissingDataError(f"{path} does not exist; source {source!r} is read from there: {advice}")
    return path
