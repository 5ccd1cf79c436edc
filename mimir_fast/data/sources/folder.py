"""Folders of image files with labels: ImageNet's layout, root/{train,val}/<class>/<file>, or a folder and a list.

Classes are the sorted names of the training folders (torchvision's ImageFolder numbers them so, too), and all images
below a class folder are of its class. A folder without class folders needs a list of labels: see
`mimir_fast.data.sources.label_lists`. What is called like an image but is none shows when it is read, and is then
skipped and reported by path.
"""

import os
from pathlib import Path

import numpy as np

from mimir_fast.data.config import DataConfig
from mimir_fast.data.registry import register
from mimir_fast.data.sources.base import MissingDataError, existing_root
from mimir_fast.data.sources.files import FileSource, list_images
from mimir_fast.data.sources.label_lists import LABEL_LISTS, LabelList, find_list, number_labels
from mimir_fast.data.sources.walk import is_image, say_others

_TEST_FOLDERS = ("val", "validation", "test")
_ADVICE = "a folder with train/<class>/<images> and val/<class>/<images>"


def build(config: DataConfig, split: str) -> FileSource:
    """root/train/<class>/** to train on; root/val (or validation, test) to test on.

    Raises:
        MissingDataError: no such folder.
        ValueError: no labels, or labels of classes that the training images lack.
    """
    root = existing_root(config.root, config.source, f"{_ADVICE}; --data.source images takes any folder, unlabelled")
    folder = split_folder(root, split)
    if folder is None and split == "train" and find_list(root, root) and not _is_split(root):
        folder = root  # one folder with its list, all of it to train on
    if folder is None:
        names = " or ".join(_names_of(split))
        raise MissingDataError(f"{root} has no folder {names}: give --data.root {_ADVICE}")
    train = folder if split == "train" else root / "train"
    if found := find_list(folder, root):
        return _from_list(config.source, root, folder, found, _classes_of(train, root) if split != "train" else None)
    present = class_folders(folder)
    # The training folders number the classes, so that a class without test images shifts no label.
    classes = (_classes_of(train, root) if split != "train" else None) or present
    if unknown := sorted(set(present) - set(classes)):
        raise ValueError(f"{folder} has classes that {train} lacks: {', '.join(unknown[:3])}; rename or remove")
    paths, counts = list_images(root, folder, present)
    say_others(folder, _beside(folder, present))
    labels = np.repeat([classes.index(name) for name in present], counts)
    return FileSource(config.source, folder, paths, labels, classes)


def split_folder(root: Path, split: str) -> Path | None:
    """root/train, or the first there is of root/val, validation, test; None without one."""
    return next((root / name for name in _names_of(split) if (root / name).is_dir()), None)


def class_folders(folder: Path) -> list[str]:
    """Names of the class folders, sorted; hidden ones are none.

    Raises:
        ValueError: fewer than two.
    """
    names = _folders(folder)
    if not names:
        raise ValueError(
            f"{folder} has no class folders; put the images of each class into {folder}/<class>/, or a list of labels "
            f"beside them ({', '.join(LABEL_LISTS[:3])}, …). Pre-training needs no labels: --data.source images"
        )
    if len(names) == 1:
        raise ValueError(
            f"{folder} has one class only ({names[0]}); at least two are needed. Is the root one level too deep? "
            "It must be the folder that holds train/ and val/. Pre-training needs no classes: --data.source images"
        )
    return names


def _names_of(split: str) -> tuple[str, ...]:
    return ("train",) if split == "train" else _TEST_FOLDERS


def _is_split(root: Path) -> bool:
    return any((root / name).is_dir() for name in ("train", *_TEST_FOLDERS))


def _classes_of(train: Path, root: Path) -> list[str] | None:
    """The classes of the training images; None where there are no such."""
    if not train.is_dir():
        return None
    found = find_list(train, root)
    return number_labels(found.labels, None, found.path)[1] if found else class_folders(train)


def _from_list(name: str, root: Path, folder: Path, found: LabelList, classes: list[str] | None) -> FileSource:
    """The images of the folder that the list names, or as many as it has lines, in order."""
    labels, classes = number_labels(found.labels, classes, found.path)
    if found.files is not None:
        paths = [os.path.relpath(found.path.parent / file, folder) for file in found.files]
        if outside := [path for path in paths if path.startswith("..")]:
            raise ValueError(f"{found.path} names {outside[0]!r}, which is not in {folder}; refused")
        there = {bytes(path) for path in list_images(root, folder, [""])[0]}
        if missing := [path for path in paths if os.fsencode(path) not in there]:
            raise ValueError(f"{found.path} names {len(missing)} images that {folder} lacks, first {missing[0]}")
        if len(there) > len(set(paths)):
            say_others(found.path, sorted(os.fsdecode(path) for path in there - {os.fsencode(path) for path in paths}))
        return FileSource(name, folder, paths, labels, classes)
    listed, _ = list_images(root, folder, [""])
    if len(listed) != len(labels):
        raise ValueError(f"{found.path} has {len(labels)} labels, but {folder} holds {len(listed)} images")
    return FileSource(name, folder, listed, labels, classes)


def _folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _beside(folder: Path, classes: list[str]) -> list[str]:
    """Images that lie beside the class folders, and hidden folders."""
    known = set(classes)
    return sorted(
        entry.name for entry in os.scandir(folder)
        if entry.name not in known and (is_image(entry.name) or (entry.name.startswith(".") and entry.is_dir()))
    )  # fmt: skip


register("imagenet", build)
register("folder", build)
