"""WebDataset shards with random access: tar files in which a sample is the neighbouring members of one key.

An index of (shard, offset, size, label), made once by reading the tar headers and kept on disk, lets any sample be read
by one seek; so ranks and resuming work as for every other source. The order is one of shuffled blocks (`block`), so
that a disk reads runs of neighbours: the samples of a shard are expected to be mixed, as `mimir_fast.data.prepare` and
everybody else writes them.
"""

import json
import tarfile
from pathlib import Path

import numpy as np

from mimir_fast.data.config import DataConfig
from mimir_fast.data.decode import MAX_FILE_BYTES
from mimir_fast.data.index import fingerprint_of, kept_index
from mimir_fast.data.registry import register
from mimir_fast.data.sources.base import EncodedSource, MissingDataError
from mimir_fast.validation import counted

_IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "ppm", "webp", "bmp")
_LABEL_KEYS = ("label", "cls", "class", "target")  # in a .json member
_COLUMNS = ("shard_ids", "offsets", "sizes", "labels")
_LABEL_BYTES = 2**20  # of a .cls or .json member; more is no label
_ADVICE = (
    "give --data.root a brace pattern such as 'shards/train-{0000..0146}.tar', or a folder whose tar files start with "
    "train and val"
)


class ShardSource(EncodedSource):
    """Samples at known places of tar files.

    Args:
        shards: the tar files.
        shard_ids, offsets, sizes: (N,) int64, where each image's bytes lie.
    """

    def __init__(
        self, shards: list[Path], shard_ids: np.ndarray, offsets: np.ndarray, sizes: np.ndarray, labels: np.ndarray
    ) -> None:
        classes = [str(label) for label in range(int(labels.max(initial=-1)) + 1)]
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


def build(config: DataConfig, split: str) -> ShardSource:
    """All samples of the split's shards that have an image; labels from the .cls or .json member, -1 without."""
    shards = find_shards(config.root, split)

    def make() -> dict[str, np.ndarray]:
        parts = [scan_shard(shard) for shard in shards]
        ids = np.repeat(np.arange(len(shards)), [part.shape[1] for part in parts])
        return dict(zip(_COLUMNS, [ids, *np.concatenate(parts, axis=1)], strict=True))

    index = kept_index(shards[0].parent, f"{split}-tar", fingerprint_of(shards), _COLUMNS, make)
    shard_ids, offsets, sizes, labels = (index[name] for name in _COLUMNS)
    if len(sizes) == 0:
        raise ValueError(f"{shards[0]} … hold no images: expected members named <key>.jpg and <key>.cls")
    return ShardSource(shards, shard_ids, offsets, sizes, labels)


def find_shards(root: str | None, split: str) -> list[Path]:
    """The split's tar files: of a folder by their names' start, of a brace pattern all that it names.

    Raises:
        MissingDataError: no root, or files that do not exist.
        ValueError: a pattern of training shards where the test split is asked for.
    """
    if root is None:
        raise MissingDataError(f"source 'webdataset' needs root: {_ADVICE}")
    folder = Path(root).expanduser()
    if folder.is_dir():
        names = ("train",) if split == "train" else ("val", "test")
        shards = sorted(path for name in names for path in folder.glob(f"*{name}*.tar"))
        if not shards:
            raise MissingDataError(f"{folder} has no tar files named {' or '.join(names)}…: {_ADVICE}")
        return shards
    if split != "train" and "train" in folder.name:
        raise ValueError(f"the {split} split was asked for but {root} names training shards: {_ADVICE}")
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise ImportError("source 'webdataset' needs the library: pip install webdataset") from error
    shards = [Path(url).expanduser() for url in expand_urls(root)]
    missing = [str(shard) for shard in shards if not shard.is_file()]
    if missing:
        raise MissingDataError(
            f"missing are {len(missing)} of {counted(len(shards), 'shard')}, first {missing[0]}: {_ADVICE}"
        )
    return shards


def scan_shard(shard: Path) -> np.ndarray:
    """(3, n) int64: offset, size and label of each image of a tar file. Nothing is unpacked.

    Raises:
        ValueError: not a tar file, compressed, cut short, or with a member whose name leads out of it.
    """
    from webdataset.tariterators import base_plus_ext

    rows: list[list[int]] = []
    current, image, label = None, None, -1
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                if member.name.startswith("/") or ".." in member.name.split("/"):
                    raise ValueError(f"{shard}: a member is called {member.name!r}, outside of the archive; refused")
                if not member.isfile():
                    continue
                key, extension = base_plus_ext(member.name)
                if key != current:
                    if image is not None:
                        rows.append([*image, label])
                    current, image, label = key, None, -1
                if key is None:
                    continue
                if extension.lower() in _IMAGE_EXTENSIONS:
                    image = (member.offset_data, member.size)
                elif extension in ("cls", "json"):
                    content = archive.extractfile(member)
                    text = content.read(_LABEL_BYTES) if content else b""
                    label = _parse_label(text, extension, f"{shard}: {member.name}")
    except tarfile.TarError as error:
        raise ValueError(f"{shard} is not a whole, uncompressed tar file ({error}); make or fetch it again") from error
    if image is not None:
        rows.append([*image, label])
    table = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    if table.size and (table[0] + table[1]).max() > shard.stat().st_size:
        raise ValueError(f"{shard} is cut short: its last image ends past the end of the file; fetch it again")
    if table.size and table[1].max() > MAX_FILE_BYTES:
        raise ValueError(f"{shard} holds a file of {table[1].max()} bytes, more than an image has; refused")
    return table


def _parse_label(content: bytes, extension: str, where: str) -> int:
    try:
        if extension == "cls":
            return int(content)
        entries = json.loads(content)
        return next((int(entries[key]) for key in _LABEL_KEYS if key in entries), -1)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where} holds no class number: {content[:40]!r}") from error


register("webdataset", build)
