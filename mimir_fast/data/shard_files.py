"""One prepared shard: its file, written whole or not at all, and the note that says what it was made of.

raw: the pixels of one image after the other, each (height, width, channels) uint8. webdataset: a tar file in which
sample n of the source is 00000000n.jpg (or .png, …) beside 00000000n.cls with its class number.
"""

import io
import json
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mimir_fast.checkpoints.durable import write_whole
from mimir_fast.data.crop import to_grey
from mimir_fast.data.decode import UnreadableImageError, decode
from mimir_fast.data.npz import map_member
from mimir_fast.data.sources.base import EncodedSource, ImageSource

_SUFFIX = {"raw": "bin", "webdataset": "tar"}
_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PN": "png", b"RIF": "webp", b"BM": "bmp", b"P5": "ppm", b"P6": "ppm"}
_COLUMNS = ("offsets", "heights", "widths", "labels", "names", "contents")
_INPUTS = ("inputs", "states", "checksums")
_QUALITY = 95


@dataclass(frozen=True)
class Job:
    """One shard to be written.

    Attributes:
        samples: (n,) int64, which samples of the source, in this order.
        side: short side that larger images are brought down to; None leaves files as they are.
    """

    out: Path
    split: str
    number: int
    format: str
    samples: np.ndarray
    side: int | None
    channels: int

    @property
    def path(self) -> Path:
        """Where the shard is written: OUT/SPLIT-NUMBER.bin or .tar."""
        return self.out / f"{self.split}-{self.number:06d}.{_SUFFIX[self.format]}"

    @property
    def note_path(self) -> Path:
        """What is known of it; there only if the shard is."""
        return self.out / ".notes" / f"{self.split}-{self.number:06d}.npz"


@dataclass
class ShardNote:
    """What a finished shard holds.

    Attributes:
        columns: `offsets`, `heights`, `widths`, `labels`, (n,) int64, `names`, (n,) bytes: where each came from, and
            `contents`, (n,) int64: the CRC-32 of the file it was.
        inputs: of all samples of its job, read or not: `inputs`, label and name, and `states`, as `ImageSource.state`,
            (m,) bytes, and `checksums`, (m,) int64, -1 of what could not be read.
        skipped: files that were left out, path → reason.
    """

    file: str
    bytes: int
    crc32: int
    skipped: dict[str, str]
    columns: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.columns["labels"])


def write_shard(job: Job, source: ImageSource) -> ShardNote:
    """Write the shard, then its note."""
    rows: list[tuple[int, int, int, int, bytes, int]] = []
    skipped: dict[str, str] = {}
    inputs: dict[int, tuple[bytes, bytes, int]] = {}

    def images() -> Iterator[tuple[int, Any]]:
        for sample in job.samples.tolist():
            name, state, value = _input(source, sample), source.state(sample), -1
            try:
                content = _bytes_of(source, sample)
                value = zlib.crc32(content)
                made = _content(job, source, sample, content)
            except (UnreadableImageError, OSError) as error:
                skipped[source.where(sample)] = str(error)
            inputs[sample] = name, state, value
            if source.where(sample) not in skipped:
                yield sample, made

    def write(aside: Path) -> None:
        writer = _write_raw if job.format == "raw" else _write_tar
        for sample, *place in writer(aside, images(), source):
            where = source.where(sample).encode()
            rows.append((*place, int(source.labels[sample]), where, inputs[sample][2]))  # type: ignore[arg-type]

    write_whole(job.path, write)
    numbers = np.array([row[:4] for row in rows], np.int64).reshape(-1, 4)
    names = np.array([row[4] for row in rows], dtype=bytes)
    contents = np.array([row[5] for row in rows], np.int64)
    columns = dict(zip(_COLUMNS, [*numbers.T, names, contents], strict=True))
    known, states, sums = zip(*inputs.values(), strict=True)
    made_of = dict(zip(_INPUTS, [np.array(known), np.array(states), np.array(sums, np.int64)], strict=True))
    note = ShardNote(job.path.name, job.path.stat().st_size, checksum(job.path), skipped, columns, made_of)
    job.note_path.parent.mkdir(exist_ok=True)
    about = {"file": note.file, "bytes": note.bytes, "crc32": note.crc32, "skipped": skipped}

    def write_note(aside: Path) -> None:
        with aside.open("wb") as file:
            np.savez(file, about=np.array([json.dumps(about)]), **(columns | made_of))

    write_whole(job.note_path, write_note)
    return note


def read_note(job: Job) -> ShardNote | None:
    """The note of a finished shard; None if it has to be written (again)."""
    if not job.note_path.is_file() or not job.path.is_file():
        return None
    try:
        about = json.loads(str(map_member(job.note_path, "about")[0]))
        columns, inputs = ({name: map_member(job.note_path, name) for name in names} for names in (_COLUMNS, _INPUTS))
        whole = about["bytes"] == job.path.stat().st_size
        return ShardNote(**about, columns=columns, inputs=inputs) if whole else None
    except (ValueError, KeyError, TypeError, OSError):
        return None  # a damaged note, or one of an older version: the shard is made again


def changed_since(note: ShardNote | None, job: Job, source: ImageSource) -> str | None:
    """Which sample has another label, name or content than when its shard was written; None: none, or no shard.

    A file of the same size and time of change is believed to be the same; any other is read and its checksum compared.
    """
    if note is None:
        return None
    inputs, states, sums = (note.inputs[name] for name in _INPUTS)
    if len(inputs) != len(job.samples):
        return f"{len(inputs)} samples, now {len(job.samples)}"
    for sample, known, state, value in zip(job.samples.tolist(), inputs, states, sums.tolist(), strict=True):
        if bytes(known) != _input(source, sample):
            return source.where(sample)
        if bytes(state) == source.state(sample):
            continue
        try:
            now = zlib.crc32(_bytes_of(source, sample))
        except (UnreadableImageError, OSError):
            now = -1
        if now != value:
            return source.where(sample)
    return None


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            value = zlib.crc32(block, value)
    return value


def _input(source: ImageSource, sample: int) -> bytes:
    return f"{int(source.labels[sample])} ".encode() + source.name_of(sample)


def _bytes_of(source: ImageSource, sample: int) -> bytes:
    return source.read(sample) if isinstance(source, EncodedSource) else source.pixels(sample).tobytes()


def _content(job: Job, source: ImageSource, sample: int, content: bytes) -> Any:
    """Pixels for a raw shard, the bytes of a file for a tar.

    Args:
        content: the sample's file, or the bytes of its pixels.
    """
    pixels = decode(content, source.where(sample)) if isinstance(source, EncodedSource) else source.pixels(sample)
    if job.format == "webdataset" and job.side is None and isinstance(source, EncodedSource):
        return content
    pixels = _shrunk(pixels, job.side)
    if job.format == "webdataset":
        return _as_jpeg(pixels)
    if pixels.shape[2] == job.channels:
        return pixels
    return np.repeat(pixels, 3, axis=2) if job.channels == 3 else to_grey(pixels)


def _shrunk(pixels: np.ndarray, side: int | None) -> np.ndarray:
    """The image with its short side brought down to `side`; a smaller one stays as it is."""
    from PIL import Image

    height, width = pixels.shape[:2]
    short = min(height, width)
    if side is None or short <= side:
        return pixels
    image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    size = (width * side // short, height * side // short)
    resized = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    return resized.reshape(*resized.shape[:2], pixels.shape[2])


def _as_jpeg(pixels: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(file, format="JPEG", quality=_QUALITY)
    return file.getvalue()


def _write_raw(aside: Path, images: Iterator[tuple[int, np.ndarray]], source: ImageSource) -> Iterator[tuple[int, ...]]:
    """(sample, offset, height, width) of each image written."""
    offset = 0
    with aside.open("wb") as file:
        for sample, pixels in images:
            file.write(np.ascontiguousarray(pixels).data)
            yield sample, offset, *pixels.shape[:2]
            offset += pixels.size


def _write_tar(aside: Path, images: Iterator[tuple[int, bytes]], source: ImageSource) -> Iterator[tuple[int, ...]]:
    """(sample, its number in the shard, 0, 0) of each image written."""
    with tarfile.open(aside, "w", format=tarfile.USTAR_FORMAT) as archive:
        for number, (sample, content) in enumerate(images):
            suffix = next((name for magic, name in _MAGIC.items() if content.startswith(magic)), "jpg")
            for extension, data in ((suffix, content), ("cls", str(int(source.labels[sample])).encode())):
                member = tarfile.TarInfo(f"{sample:09d}.{extension}")  # no times, no owners: the same bytes each time
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
            yield sample, number, 0, 0
