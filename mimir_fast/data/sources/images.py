"""Images without labels, for pre-training: any folder, at any depth, or a zip or tar file.

root/train and root/val (validation, test) are the splits where they exist; otherwise all there is is to train on.
"""

from pathlib import Path

import numpy as np

from mimir_fast.data.config import DataConfig
from mimir_fast.data.registry import register
from mimir_fast.data.sources.archives import open_archive
from mimir_fast.data.sources.base import EncodedSource, MissingDataError, existing_root
from mimir_fast.data.sources.files import FileSource, list_images
from mimir_fast.data.sources.folder import split_folder


def build(config: DataConfig, split: str) -> EncodedSource:
    """All images of the split, labels -1.

    Raises:
        MissingDataError: nothing is there, or nothing to test on.
        ValueError: it holds no images.
    """
    root = existing_root(config.root, "images", "any folder of images, or a zip or tar file of them")
    source = open_archive("images", root, split) if root.is_file() else _open_folder(root, split)
    if source is None:
        raise MissingDataError(
            f"{root} has no folder {'train' if split == 'train' else 'val, validation or test'}: with `--data.source "
            "images` all images are to train on, unless root/train and root/val say which are to test on"
        )
    return source


def _open_folder(root: Path, split: str) -> FileSource | None:
    folder = split_folder(root, split)
    if folder is None:
        if split != "train" or split_folder(root, "test"):
            return None
        folder = root
    paths, _ = list_images(root, folder, [""])
    return FileSource("images", folder, paths, np.full(len(paths), -1), [])


register("images", build)
