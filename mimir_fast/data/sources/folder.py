"""Folders of image files: ImageNet's layout, root/{train,val}/<class>/<file>, and Tiny-ImageNet's.

Classes are the sorted names of the training folders (torchvision's ImageFolder numbers them so, too). Every file is a
sample; what is not an image shows when it is read, and is then skipped and reported by path.
"""

import os
from pathlib import Path

import numpy as np

from mimir_fast.data.config import DataConfig
from mimir_fast.data.decode import MAX_FILE_BYTES, UnreadableImageError
from mimir_fast.data.index import fingerprint_of, kept_index
from mimir_fast.data.registry import register
from mimir_fast.data.sources.base import EncodedSource, MissingDataError, existing_root

_TEST_FOLDERS = ("val", "validation", "test")


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


def build_folder(config: DataConfig, split: str) -> FileSource:
    """root/train/<class>/* to train on; root/val (or validation, test) to test on."""
    advice = "a folder with train/<class>/<images> and val/<class>/<images>"
    root = existing_root(config.root, config.source, advice)
    names = ("train",) if split == "train" else _TEST_FOLDERS
    folder = next((root / name for name in names if (root / name).is_dir()), None)
    if folder is None:
        raise MissingDataError(f"{root} has no folder {' or '.join(names)}: give --data.root {advice}")
    present = _class_folders(folder)
    # The training folders number the classes, so that a class without test images shifts no label.
    classes = _class_folders(root / "train") if (root / "train").is_dir() else present
    if unknown := sorted(set(present) - set(classes)):
        raise ValueError(
            f"{folder} has classes that {root / 'train'} lacks: {', '.join(unknown[:3])}; rename or remove"
        )
    paths, counts = list_files(root, folder, present)
    labels = np.repeat([classes.index(name) for name in present], counts)
    return FileSource(config.source, folder, paths, labels, classes)


def list_files(root: Path, folder: Path, classes: list[str], inner: str = "") -> tuple[np.ndarray, np.ndarray]:
    """All files of folder/<class>/<inner>: paths relative to `folder`, (N,) bytes, and how many each class has.

    Listed once and kept under `root` or in the user's cache (mimir_fast.data.index).
    """
    folders = [folder / name / inner for name in classes]

    def make() -> dict[str, np.ndarray]:
        files = [_files(each) for each in folders]
        prefixes = [os.path.join(name, inner, "") for name in classes]
        paths = [os.fsencode(prefix + file) for prefix, those in zip(prefixes, files, strict=True) for file in those]
        return {"paths": np.array(paths), "counts": np.array([len(those) for those in files])}

    missing = next((each for each in folders if not each.is_dir()), None)
    if missing is not None:
        raise ValueError(f"{missing} holds no files; add the images of this class or remove its folder")
    index = kept_index(root, folder.name, fingerprint_of(folders), ("paths", "counts"), make)
    # It may have come with the data, from anyone: what it names must lie in the folder.
    outside = np.char.find(index["paths"], b"..") >= 0
    if any(b".." in bytes(path).split(b"/") for path in index["paths"][outside]) or (
        np.char.startswith(index["paths"], b"/").any() or index["counts"].sum() != len(index["paths"])
    ):
        raise ValueError(f"the index of {folder} names files outside of it; remove {root / '.mimir_fast'}")
    return index["paths"], index["counts"]


def build_tiny_imagenet(config: DataConfig, split: str) -> FileSource:
    """Tiny-ImageNet-200: train/<wnid>/images/*.JPEG; the labelled val/ (val_annotations.txt) is the test split."""
    advice = "the unpacked tiny-imagenet-200 archive with train/<wnid>/images and val/val_annotations.txt"
    root = existing_root(config.root, "tiny_imagenet", advice)
    root = root / "tiny-imagenet-200" if (root / "tiny-imagenet-200").is_dir() else root
    if not (root / "train").is_dir():
        raise MissingDataError(f"{root} has no folder train: give --data.root {advice}")
    classes = _class_folders(root / "train")
    if split == "train":
        paths, counts = list_files(root, root / "train", classes, "images")
        labels = np.repeat(np.arange(len(classes)), counts)
        return FileSource("tiny_imagenet", root / "train", paths, labels, classes, size=64)
    listing = root / "val" / "val_annotations.txt"
    if not listing.is_file():
        raise MissingDataError(f"{listing} is missing; it holds the labels of the test split: give {advice}")
    rows = [line.split("\t")[:2] for line in listing.read_text().splitlines() if line.strip()]
    unknown = {row[-1] for row in rows} - set(classes)
    if unknown:
        raise ValueError(f"{listing} is damaged: it names classes that train/ lacks, such as {sorted(unknown)[:3]}")
    numbers = {name: label for label, name in enumerate(classes)}
    files, owners = [f"images/{file}" for file, _ in rows], [numbers[name] for _, name in rows]
    return FileSource("tiny_imagenet", root / "val", files, owners, classes, size=64)


def _class_folders(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise ValueError(f"{folder} has no class folders; put the images of each class into {folder}/<class>/")
    if len(names) == 1:
        raise ValueError(
            f"{folder} has one class only ({names[0]}); at least two are needed. Is the root one level too deep? "
            "It must be the folder that holds train/ and val/"
        )
    return names


def _files(folder: Path) -> list[str]:
    files = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith(".") and entry.is_file())
    if not files:
        raise ValueError(f"{folder} holds no files; add the images of this class or remove its folder")
    return files


register("tiny_imagenet", build_tiny_imagenet)
register("imagenet", build_folder)
register("folder", build_folder)
