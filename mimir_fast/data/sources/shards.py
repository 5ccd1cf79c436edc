"""WebDataset shards with random access: tar files in which a sample is the neighbouring members of one key.

An index of (shard, offset, size, label), made once by reading the tar headers and kept on disk, lets any sample be read
by one seek; so ranks and resuming work as for every other source. The order is one of shuffled blocks (`block`), so
that a disk reads runs of neighbours: the samples of a shard are expected to be mixed, as `mimir_fast.data.prepare` and
everybody else writes them.

A member's extension is what follows the first dot of its name, as in webdataset. Of several images of a sample the
first of EXTENSIONS is taken (jpg before png, which often is a mask). The label is the .cls member, else the .json's.
"""

from pathlib import Path

import numpy as np

from mimir_fast.data.config import DataConfig
from mimir_fast.data.decode import MAX_FILE_BYTES
from mimir_fast.data.index import Arrays, fingerprint_of, kept_index
from mimir_fast.data.manifest import check_classes, read_manifest
from mimir_fast.data.registry import register
from mimir_fast.data.sources.base import EncodedSource, hashes_of_places, state_of
from mimir_fast.data.sources.label_lists import number_labels
from mimir_fast.data.sources.shard_labels import LABEL_BYTES, parse_cls, parse_json
from mimir_fast.data.sources.shard_names import ADVICE, find_shards
from mimir_fast.data.sources.tar_files import members_of
from mimir_fast.data.sources.walk import EXTENSIONS

_COLUMNS = ("shard_ids", "offsets", "sizes", "labels", "names")
_MANIFEST = "train.json"  # of mimir_fast.data.prepare: it knows the classes' names


class ShardSource(EncodedSource):
    """Samples at known places of tar files.

    Args:
        shards: the tar files.
        shard_ids, offsets, sizes: (N,) int64, where each image's bytes lie.
    """

    def __init__(
        self, shards: list[Path], classes: list[str], shard_ids: np.ndarray, offsets: np.ndarray, sizes: np.ndarray,
        labels: np.ndarray,
    ) -> None:  # fmt: skip
        super().__init__("webdataset", classes, labels)
        self.shards, self.shard_ids, self.offsets, self.sizes = shards, shard_ids, offsets, sizes

    block = 64

    def read(self, index: int) -> bytes:
        with self.shards[self.shard_ids[index]].open("rb") as file:
            file.seek(self.offsets[index])
            return file.read(int(self.sizes[index]))

    def where(self, index: int) -> str:
        return f"{self.shards[self.shard_ids[index]]} at byte {self.offsets[index]}"

    def stamp(self, index: int) -> bytes:
        return f"{self.shards[self.shard_ids[index]].name} {self.offsets[index]} {self.sizes[index]}".encode()

    def name_of(self, index: int) -> bytes:
        return f"{self.shards[self.shard_ids[index]].name} {self.offsets[index]}".encode()

    def state(self, index: int) -> bytes:
        return f"{self.sizes[index]} {state_of(self.shards[self.shard_ids[index]])}".encode()

    def identities(self) -> np.ndarray:
        return hashes_of_places([shard.name for shard in self.shards], self.shard_ids, self.offsets, self.sizes)


def build(config: DataConfig, split: str) -> ShardSource:
    """All samples of the split's shards that have an image; -1 where one has no label.

    The training shards number the classes, so that a class without test images changes no count.
    Raises:
        MissingDataError, ValueError: see `find_shards`, `members_of` and `number_labels`.
    """
    found = find_shards(config.root)
    shards = found.of(split)
    index = _index(shards, split)
    if len(index["sizes"]) == 0:
        raise ValueError(f"{shards[0]} … hold no images: expected members named <key>.jpg and <key>.cls")
    train = index if split == "train" or not found.train else _index(found.train, "train")
    classes = _classes(train, shards[0].parent / _MANIFEST, found.train or shards)
    labels, known = index["labels"], _names(index)
    if known:
        numbers = np.array(number_labels(known, classes, shards[0])[0])
        labels = np.where(labels < 0, -1, numbers[labels])
    elif (largest := int(labels.max())) >= len(classes):
        raise ValueError(f"{shards[0]} … have label {largest}, but {found.train[0]} … have {len(classes)} classes")
    return ShardSource(shards, classes, index["shard_ids"], index["offsets"], index["sizes"], labels)


def _classes(train: Arrays, manifest: Path, shards: list[Path]) -> list[str]:
    number = int(train["labels"].max(initial=-1)) + 1
    if names := _names(train):
        return names
    if manifest.is_file() and len(named := read_manifest(manifest, ADVICE).classes) >= number:
        check_classes(manifest.parent, "train", named, ADVICE)
        return named
    return [str(label) for label in range(number)]


def _names(index: Arrays) -> list[str]:
    return [bytes(name).decode() for name in index["names"]]


def _index(shards: list[Path], split: str) -> Arrays:
    """The columns of an index; `labels` are numbers of classes, or of `names` where the shards name the classes."""

    def make() -> Arrays:
        parts = [scan_shard(shard) for shard in shards]
        labels = [label for part in parts for *_, label in part]
        named = sorted({label for label in labels if isinstance(label, str)})
        if named and (number := next((label for label in labels if isinstance(label, int) and label >= 0), None)):
            raise ValueError(f"{shards[0]} … label some samples by name ({named[0]}) and others by number ({number})")
        numbers = {name: number for number, name in enumerate(named)}
        places = np.array([row[:2] for part in parts for row in part], np.int64).reshape(-1, 2).T
        owners = [numbers[label] if isinstance(label, str) else label for label in labels]
        ids = np.repeat(np.arange(len(shards)), [len(part) for part in parts])
        names = np.array([name.encode() for name in named], dtype=bytes)
        return dict(zip(_COLUMNS, [ids, *places, np.array(owners, np.int64), names], strict=True))

    return kept_index(shards[0].parent, f"{split}-tar", lambda _: fingerprint_of(shards), _COLUMNS, make)


def scan_shard(shard: Path) -> list[tuple[int, int, int | str]]:
    """Offset, size and label (a number, a name, or -1) of each sample's image. Nothing is unpacked.

    Raises:
        ValueError: see `members_of`; also for a label that is none, and for a file that no image is as large as.
    """
    rows: list[tuple[int, int, int | str]] = []
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int | str] = {}

    def close_sample() -> None:
        for extension in EXTENSIONS:
            if extension in images:
                rows.append((*images[extension], labels.get(".cls", labels.get(".json", -1))))
                return

    current = None
    with shard.open("rb") as file:
        for member in members_of(shard):
            folder, _, name = member.name.rpartition("/")
            key, _, extension = name.partition(".")
            if (folder, key) != current:
                close_sample()
                current = (folder, key)
                images.clear()
                labels.clear()
            if not key:  # .DS_Store and the like
                continue
            extension = f".{extension.lower()}"
            if extension in EXTENSIONS:
                if member.size > MAX_FILE_BYTES:
                    raise ValueError(f"{shard} holds a file of {member.size} bytes, more than an image has; refused")
                images[extension] = (member.offset_data, member.size)
            elif extension in (".cls", ".json"):
                file.seek(member.offset_data)
                content = file.read(min(member.size, LABEL_BYTES))
                parse = parse_cls if extension == ".cls" else parse_json
                labels[extension] = parse(content, f"{shard}: {member.name}")
    close_sample()
    return rows


register("webdataset", build)
