"""IDX files, the format of MNIST and Fashion-MNIST, plain or gzipped.

A header (two zero bytes, type code 8 = uint8, number of dimensions, the big-endian sizes), then the values. The 28x28
images are padded with zeros to the wanted size: 2 pixels a side make 32, which patches of 2 and 4 divide.
"""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from mimir_fast.data.config import DataConfig
from mimir_fast.data.registry import register
from mimir_fast.data.sources.base import ArraySource, MissingDataError, existing_root
from mimir_fast.sizes import Size, height_width, typed

FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
FASHION_ROOTS = ("/usr/share/datasets/fashion-mnist", "data/FashionMNIST/raw")
ADVICE = (
    "install Debian's package (apt-get install dataset-fashion-mnist), or let torchvision fetch it "
    "(torchvision.datasets.FashionMNIST('data', download=True)) and give --data.root data"
)
MAX_BYTES = 2**32  # of a file; EMNIST, the largest of the kind, has half a GB
_PREFIX = {"train": "train", "test": "t10k"}


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array of an IDX file.

    Raises:
        ValueError: the file is not IDX of uint8, or is cut short.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            head = file.read(4)
            if len(head) < 4 or head[:3] != b"\0\0\x08":
                raise ValueError(f"{path} is not an IDX file of uint8 (first bytes {head.hex(' ')}, expected 00 00 08)")
            sizes = file.read(4 * head[3])
            shape = tuple(int(size) for size in np.frombuffer(sizes[: len(sizes) // 4 * 4], dtype=">i4"))
            count = math.prod(shape)
            if min(shape, default=0) < 0 or count > MAX_BYTES:
                raise ValueError(f"{path} claims the shape {shape}, which no such file has; fetch it again")
            content = file.read(count + 1)  # no more than that: a few KB of gzip can be gigabytes
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is no complete gzip file ({error}); fetch it again") from error
    if len(content) != count:
        there = "more" if len(content) > count else len(content)
        raise ValueError(f"{path} is cut short or damaged: {there} values for the shape {shape}; fetch it again")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def build(config: DataConfig, split: str) -> ArraySource:
    """IDX files under `config.root`: {train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]."""
    folder = existing_root(config.root, "idx", "a folder with train-images-idx3-ubyte[.gz] and its companions")
    images, labels = _read_split(folder, split, "the four files of the MNIST layout are expected")
    classes = [str(label) for label in range(int(labels.max()) + 1)]
    return ArraySource("idx", _pad(images, config.image_size)[:, None], labels, classes)


def build_fashion_mnist(config: DataConfig, split: str) -> ArraySource:
    """Fashion-MNIST (Xiao, Rasul and Vollgraf 2017) from Debian's package, torchvision's download or `config.root`."""
    if config.root is not None:
        folder = existing_root(config.root, "fashion_mnist", ADVICE)
        if (folder / "FashionMNIST" / "raw").is_dir():
            folder = folder / "FashionMNIST" / "raw"
    else:
        found = [Path(root) for root in FASHION_ROOTS if Path(root).is_dir()]
        if not found:
            raise MissingDataError(f"Fashion-MNIST is in none of {', '.join(FASHION_ROOTS)}: {ADVICE}")
        folder = found[0]
    images, labels = _read_split(folder, split, ADVICE)
    return ArraySource("fashion_mnist", _pad(images, config.image_size)[:, None], labels, FASHION_CLASSES)


def _read_split(folder: Path, split: str, advice: str) -> tuple[np.ndarray, np.ndarray]:
    images = read_idx(_find(folder, f"{_PREFIX[split]}-images-idx3-ubyte", advice))
    labels = read_idx(_find(folder, f"{_PREFIX[split]}-labels-idx1-ubyte", advice))
    if images.ndim != 3 or labels.ndim != 1:
        raise ValueError(f"{folder}: images need 3 dimensions and labels 1, got {images.shape} and {labels.shape}")
    return images, labels


def _find(folder: Path, name: str, advice: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise MissingDataError(f"neither {name} nor {name}.gz in {folder}: {advice}")


def _pad(images: np.ndarray, size: Size) -> np.ndarray:
    height, width = images.shape[1:]
    down, across = height_width(size)
    if down < height or across < width:
        raise ValueError(
            f"image_size {typed(size)} is smaller than the {height} x {width} images; give --data.image_size 32"
        )
    top, left = (down - height) // 2, (across - width) // 2
    return np.pad(images, ((0, 0), (top, down - height - top), (left, across - width - left)))


register("fashion_mnist", build_fashion_mnist)
register("idx", build)
