"""Images in one zip or tar file, read where they lie: nothing is unpacked, any sample takes one or two reads.

A compressed tar (.tar.gz) has no places to read from and is refused. The list of members is kept as that of a folder.
"""

import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

from mimir_fast.data.decode import MAX_FILE_BYTES, UnreadableImageError
from mimir_fast.data.index import Arrays, fingerprint_of, kept_index
from mimir_fast.data.sources.base import EncodedSource, hashes_of_names, state_of
from mimir_fast.data.sources.tar_files import members_of
from mimir_fast.data.sources.walk import is_hidden, is_image, say_others

_COLUMNS = ("names", "offsets", "stored", "sizes", "others")
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of name and extra field: the data follow them


class ArchiveSource(EncodedSource):
    """Members of a zip or tar file, without labels.

    Args:
        names: (N,) bytes.
        offsets: (N,) int64, of the member's header (zip) or data (tar).
        stored: (N,) int64, bytes in the archive, less than `sizes` where they are deflated.
        sizes: (N,) int64, bytes of the file.
    """

    def __init__(self, name: str, path: Path, index: Arrays) -> None:
        super().__init__(name, [], np.full(len(index["names"]), -1))
        self.path = path
        self.names, self.offsets, self.stored, self.sizes = (index[column] for column in _COLUMNS[:4])
        self._is_zip = _is_zip(path)

    def read(self, index: int) -> bytes:
        stored, size = int(self.stored[index]), int(self.sizes[index])
        if size > MAX_FILE_BYTES:
            raise UnreadableImageError(f"{self.where(index)}: {size} bytes are more than an image has")
        with self.path.open("rb") as file:
            file.seek(int(self.offsets[index]))
            if self._is_zip:
                signature, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
                if signature != b"PK\3\4":
                    raise UnreadableImageError(f"{self.where(index)}: no member begins there")
                file.seek(name_bytes + extra_bytes, 1)
            content = file.read(stored)
        if stored == size:
            return content
        try:
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size)
        except zlib.error as error:
            raise UnreadableImageError(f"{self.where(index)}: {error}") from error

    def where(self, index: int) -> str:
        return f"{self.path}: {bytes(self.names[index]).decode(errors='replace')}"

    def stamp(self, index: int) -> bytes:
        return bytes(self.names[index]) + f" {self.sizes[index]}".encode()

    def name_of(self, index: int) -> bytes:
        return bytes(self.names[index])

    def state(self, index: int) -> bytes:
        return f"{self.sizes[index]} {state_of(self.path)}".encode()

    def identities(self) -> np.ndarray:
        return hashes_of_names(self.names)


def open_archive(name: str, path: Path, split: str) -> ArchiveSource | None:
    """The images of an archive; of its folder `train`, or val, validation or test, where it has one called so.

    None: it has nothing of the test split.
    Raises:
        ValueError: not a whole zip or tar file, compressed otherwise, encrypted, or without images.
    """

    def make() -> Arrays:
        rows = sorted(_zip_members(path) if _is_zip(path) else _tar_members(path))
        images = [row for row in rows if is_image(row[0]) and not is_hidden(row[0])]
        numbers = np.array([row[1:] for row in images], np.int64).reshape(-1, 3).T
        others = sorted({row[0] for row in rows} - {row[0] for row in images})
        return dict(zip(_COLUMNS, [_encoded([row[0] for row in images]), *numbers, _encoded(others)], strict=True))

    index = dict(kept_index(path.parent, path.name, lambda _: fingerprint_of([path]), _COLUMNS, make))
    say_others(path, [bytes(other).decode() for other in index.pop("others")])
    if len(index["names"]) == 0:
        raise ValueError(f"{path} holds no images (.jpg, .png, …)")
    top = np.array([bytes(member).partition(b"/")[0] for member in index["names"]])
    wanted = [b"train"] if split == "train" else [b"val", b"validation", b"test"]
    chosen = next((top == folder for folder in wanted if (top == folder).any()), None)
    if chosen is None and (split != "train" or np.isin(top, [b"val", b"validation", b"test"]).any()):
        return None
    return ArchiveSource(
        name, path, index if chosen is None else {key: column[chosen] for key, column in index.items()}
    )


def _is_zip(path: Path) -> bool:
    """Also of a file that is cut short or empty, whose end does not say so."""
    if zipfile.is_zipfile(path) or path.suffix.lower() == ".zip":
        return True
    with path.open("rb") as file:
        return file.read(4) == b"PK\3\4"


def _zip_members(path: Path) -> list[tuple[str, int, int, int]]:
    """(name, offset of the header, bytes stored, bytes) of each file."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
    except (zipfile.BadZipFile, struct.error) as error:
        raise ValueError(f"{path} is no zip file, or is cut short ({error}); make or fetch it again") from error
    for member in members:
        if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            how = "encrypted" if member.flag_bits & 1 else f"compressed by method {member.compress_type}"
            raise ValueError(f"{path}: {member.filename} is {how}, wanted stored or deflated; unpack the archive")
    return [(one.filename, one.header_offset, one.compress_size, one.file_size) for one in members]


def _tar_members(path: Path) -> list[tuple[str, int, int, int]]:
    return [(one.name, one.offset_data, one.size, one.size) for one in members_of(path)]


def _encoded(names: list[str]) -> np.ndarray:
    return np.array([name.encode(errors="surrogateescape") for name in names], dtype=bytes)
