"""Tiny-ImageNet-200 as its archive unpacks: train/<wnid>/images/*.JPEG; the labelled val/ is the test split."""

import numpy as np

from mimir_fast.data.config import DataConfig
from mimir_fast.data.registry import register
from mimir_fast.data.sources.base import MissingDataError, existing_root
from mimir_fast.data.sources.files import FileSource, list_images
from mimir_fast.data.sources.folder import class_folders


def build(config: DataConfig, split: str) -> FileSource:
    """100,000 images to train on, 10,000 of val/ (val_annotations.txt) to test on, all of 64 x 64 pixels."""
    advice = "the unpacked tiny-imagenet-200 archive with train/<wnid>/images and val/val_annotations.txt"
    root = existing_root(config.root, "tiny_imagenet", advice)
    root = root / "tiny-imagenet-200" if (root / "tiny-imagenet-200").is_dir() else root
    if not (root / "train").is_dir():
        raise MissingDataError(f"{root} has no folder train: give --data.root {advice}")
    classes = class_folders(root / "train")
    if split == "train":
        paths, counts = list_images(root, root / "train", [f"{name}/images" for name in classes])
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


register("tiny_imagenet", build)
