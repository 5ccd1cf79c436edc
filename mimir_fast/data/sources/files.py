"""Image files named by path, and the list of them: made once, kept under the root or in the user's cache."""

import os
from pathlib import Path

import numpy as np

from mimir_fast.data.decode import MAX_FILE_BYTES, UnreadableImageError
from mimir_fast.data.index import Arrays, fingerprint_of, kept_index
from mimir_fast.data.sources.base import EncodedSource, hashes_of_names, state_of
from mimir_fast.data.sources.walk import say_others, walk


class FileSource(EncodedSource):
    """Files named by path.

    Args:
        root: the folder the paths are relative to.
        paths: relative, one a sample; as (N,) bytes perhaps mapped from an index.
    """

    def __init__(
        self,
        name: str,
        root: Path,
        paths: np.ndarray | list[str],
        labels: np.ndarray | list[int],
        classes: list[str],
        size: int | None = None,
    ) -> None:
        super().__init__(name, classes, labels, size)
        self.root = root
        # One array of bytes, not a million str: forked workers share it, for no reference count in it ever changes.
        self.paths = np.array([os.fsencode(path) for path in paths]) if isinstance(paths, list) else paths

    def path(self, index: int) -> Path:
        """The file of a sample."""
        return self.root / os.fsdecode(bytes(self.paths[index]))

    def read(self, index: int) -> bytes:
        with self.path(index).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_FILE_BYTES:
                raise UnreadableImageError(f"{self.where(index)}: {size} bytes are more than an image has")
            return file.read()

    def where(self, index: int) -> str:
        return str(self.path(index))

    def stamp(self, index: int) -> bytes:
        path = self.path(index)
        return bytes(self.paths[index]) + f" {path.stat().st_size if path.exists() else None}".encode()

    def name_of(self, index: int) -> bytes:
        return bytes(self.paths[index])

    def state(self, index: int) -> bytes:
        path = self.path(index)
        return state_of(path).encode() if path.exists() else b"gone"

    def identities(self) -> np.ndarray:
        return hashes_of_names(self.paths)


def list_images(root: Path, folder: Path, tops: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """All images below folder/<top>, for each top: paths relative to `folder`, (N,) bytes, and how many each top has.

    Raises:
        ValueError: a top has none, or the kept index is none of ours.
    """
    paths, folders, counts, others = ("paths", "folders", "counts", "others")

    def make() -> Arrays:
        found = [walk(folder / top) for top in tops]
        under = [(os.path.join(top, ""), one) if top else ("", one) for top, one in zip(tops, found, strict=True)]
        return {
            paths: _encoded([start + name for start, one in under for name in one.images]),
            folders: _encoded([start + name for start, one in under for name in one.folders]),
            counts: np.array([len(one.images) for one in found]),
            others: _encoded([start + name for start, one in under for name in one.others]),
        }

    def fingerprint(arrays: Arrays) -> str:
        looked_into = [folder / os.fsdecode(bytes(name)) for name in arrays[folders]]
        return "\n".join([*tops, fingerprint_of(looked_into)])

    index = kept_index(root, folder.name, fingerprint, (paths, folders, counts, others), make)
    # It may have come with the data, from anyone: what it names must lie in the folder.
    outside = np.char.find(index[paths], b"..") >= 0
    if any(b".." in bytes(path).split(b"/") for path in index[paths][outside]) or (
        np.char.startswith(index[paths], b"/").any() or index[counts].sum() != len(index[paths])
    ):
        raise ValueError(f"the index of {folder} names files outside of it; remove {root / '.mimir_fast'}")
    say_others(folder, [os.fsdecode(bytes(name)) for name in index[others]])
    if empty := [top for top, count in zip(tops, index[counts].tolist(), strict=False) if count == 0]:
        remedy = "add the images of this class or remove its folder" if empty[0] else "is it the folder you meant?"
        raise ValueError(f"{folder / empty[0]} holds no images (.jpg, .png, …); {remedy}")
    return index[paths], index[counts]


def _encoded(names: list[str]) -> np.ndarray:
    return np.array([os.fsencode(name) for name in names], dtype=bytes)
