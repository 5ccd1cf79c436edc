"""Which images are evaluated: a subset of a test split, chosen once, written down, decoded once, cut into shards.

A shard is what one process works on: images k, k + S, k + 2S, … of S shards. The cut is made when an evaluation starts
and kept on disk, so an interrupted evaluation goes on with any number of processes.

Shapes: N images, C channels, H × W pixels.
"""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mimir_fast.data.config import DataConfig
from mimir_fast.data.sources.base import ArraySource, ImageSource, subset
from mimir_fast.sizes import height_width, said, typed
from mimir_fast.validation import check_number


@dataclass
class EvaluationImages:
    """Decoded images in memory.

    Attributes:
        images: (N, C, H, W) uint8, on the CPU.
        labels: (N,) int64.
        samples: (N,) int64, the index of each in the whole split; random starts are functions of it.
        classes: one name a class.
        source: the data set's name.
        skipped: unreadable files that were left out, path → reason.
        digests: sample → what tells the labelled image from others, whatever size it was given.
    """

    images: Tensor
    labels: Tensor
    samples: Tensor
    classes: tuple[str, ...]
    source: str
    skipped: dict[str, str]
    digests: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def evenly(self, count: int) -> "EvaluationImages":
        """`count` images at equal distances, or all when there are no more."""
        return self if count >= len(self) else self.take(torch.arange(count) * len(self) // count)

    def take(self, index: Tensor) -> "EvaluationImages":
        """The images at `index`, in its order."""
        return replace(
            self, images=self.images[index], labels=self.labels[index], samples=self.samples[index], skipped={}
        )

    def batches(self, batch_size: int, device: torch.device, start: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(images (B, C, H, W) float in [0, 1], labels, samples) on the device, from image `start` on."""
        for begin in range(start, len(self), batch_size):
            cut = slice(begin, begin + batch_size)
            images = self.images[cut].to(device).float() / 255
            yield images, self.labels[cut].to(device), self.samples[cut].to(device)


def choose_indices(source: ImageSource, limit: int | None, index_file: str | None) -> np.ndarray:
    """(N,) int64 ascending positions in the source.

    Args:
        limit: that many at equal distances, so that a split sorted by class keeps its classes.
        index_file: a text file with one position, or one file name such as n01440764/ILSVRC2012_val_00000293.JPEG,
            a line: RobustBench's list of 5000 ImageNet images is such a file.
    Raises:
        ValueError: both are given, nothing is chosen, or a line names no image of this source.
        FileNotFoundError: no such file.
    """
    if limit is not None and index_file is not None:
        raise ValueError("give --limit or --index_file, not both")
    if limit is not None:
        check_number("limit", limit, at_least=1, hint="else there is no image to evaluate")
    if index_file is None:
        count = len(source) if limit is None else min(limit, len(source))
        return np.arange(count, dtype=np.int64) * len(source) // count
    path = robustbench_list() if index_file == "robustbench" else Path(index_file)
    if not path.is_file():
        raise FileNotFoundError(f"--index_file {index_file}: no such file; one position or file name a line")
    lines = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} is empty: it leaves no image to evaluate; write one position or file name a line")
    numbers = [int(line) for line in lines] if all(line.isdigit() for line in lines) else _by_name(source, lines, path)
    if max(numbers) >= len(source):
        raise ValueError(f"{path} asks for image {max(numbers)}, but {source.name} has {len(source)} (0 is the first)")
    return np.unique(np.asarray(numbers, dtype=np.int64))


def robustbench_list() -> Path:
    """The list of 5000 ImageNet validation images that RobustBench evaluates on, from the installed package."""
    from importlib.util import find_spec

    spec = find_spec("robustbench")
    for folder in spec.submodule_search_locations or [] if spec else []:
        path = Path(folder) / "helper_files" / "imagenet_test_image_ids.txt"
        if path.is_file():
            return path
    raise FileNotFoundError(
        "RobustBench's list of 5000 images comes with its package: pip install --no-deps robustbench==1.1.1, or give "
        "--index_file the path of helper_files/imagenet_test_image_ids.txt from its repository"
    )


def _by_name(source: ImageSource, names: list[str], path: Path) -> list[int]:
    known = {Path(source.where(i)).name: i for i in range(len(source))}
    missing = [name for name in names if Path(name).name not in known]
    if missing:
        raise ValueError(f"{path} names images that {source.name} lacks, {len(missing)} of them, such as {missing[0]}")
    return [known[Path(name).name] for name in names]


@dataclass(frozen=True)
class Fitting:
    """How image files come to the model's size: resize until size / crop is just covered, cut out the centre.

    Attributes:
        crop: side of the centre crop as a part of the resized image's, where the crop fits it tightly.
        interpolation: bicubic, bilinear or nearest.
    """

    crop: float = 0.875
    interpolation: str = "bicubic"

    def __call__(self, pixels: np.ndarray, config: DataConfig) -> np.ndarray:
        """(C, *config.image_size) uint8 of an image (H, W, 1 or 3) uint8."""
        from mimir_fast.data.crop import cut
        from mimir_fast.data.geometry import plan_geometry

        wanted, channels = height_width(config.image_size), config.channels
        if self == Fitting() or pixels.shape[:2] == wanted:  # as data/ does it, as every loader has it
            one, sizes = np.array([0]), np.array([pixels.shape[:2]])
            plan = plan_geometry(config, False, 0, one, one, sizes)
            return cut([pixels], plan, config.image_size, channels)[0].numpy()
        from PIL import Image

        from mimir_fast.data.loaders.base import to_channels

        image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
        size = self._resized(image.height, image.width, wanted)
        ways = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
        if size != (image.height, image.width):
            image = image.resize(size[::-1], ways.get(self.interpolation, Image.Resampling.NEAREST))
        top, left = round((image.height - wanted[0]) / 2), round((image.width - wanted[1]) / 2)
        array = np.asarray(image.crop((left, top, left + wanted[1], top + wanted[0])))
        array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
        return to_channels(torch.from_numpy(np.ascontiguousarray(array))[None], channels)[0].numpy()

    def _resized(self, height: int, width: int, wanted: tuple[int, int]) -> tuple[int, int]:
        """Height and width before the crop, as timm's preprocessing has them.

        For squares that is torchvision's Resize, where the long side is cut to an integer; else timm's ResizeKeepRatio,
        where both are rounded.
        """
        down, across = (int(side / self.crop) for side in wanted)
        if down == across:
            return (int(down * height / width), down) if width <= height else (down, int(down * width / height))
        ratio = min(height / down, width / across)
        return round(height / ratio), round(width / ratio)


def load_images(
    config: DataConfig, indices: np.ndarray | None = None, split: str = "test", fitting: Fitting | None = None
) -> EvaluationImages:
    """Decode images of a split as evaluation wants them: no augmentation, resize and centre crop if needed.

    Args:
        indices: (N,) positions in the split, ascending; None for all of it. `config.limit` is not looked at.
        fitting: how files of another size are resized and cut.
    Raises:
        ValueError: no image is left, the source's arrays have another size than `config.image_size`, or no labels.
    """
    from mimir_fast.data.sources import build_source

    source = build_source(replace(config, limit=None), split)
    return load_from(source, config, np.arange(len(source)) if indices is None else indices, fitting)


def load_from(
    source: ImageSource, config: DataConfig, indices: np.ndarray, fitting: Fitting | None = None, *,
    digests: bool = False,
) -> EvaluationImages:  # fmt: skip
    """Images of an open source, with their digests where these are asked for; see `load_images`."""
    from mimir_fast.data.loaders.base import to_channels

    if len(indices) == 0:
        raise ValueError(f"an empty subset of {source.name} was asked for: there is nothing to evaluate")
    own = source.image_size
    if isinstance(source, ArraySource) and own is not None and own != config.image_size:
        raise ValueError(
            f"{source.name} has images of {said(own)} pixels but image_size is "
            f"{typed(config.image_size)}; give --data.image_size {typed(own)}"
        )
    chosen = subset(source, indices)
    if (chosen.labels < 0).any():
        raise ValueError(f"{source.name} has images without labels: accuracy needs labels")
    known: dict[int, str] = {}
    pixels, bad = decode_source(chosen, config, fitting, known if digests else None)
    if len(bad) == len(chosen):
        raise ValueError(f"none of the {len(bad)} images of {source.name} is readable, such as {bad[0]}")
    images = EvaluationImages(
        to_channels(torch.from_numpy(pixels), config.channels),
        torch.from_numpy(chosen.labels),
        torch.from_numpy(indices.astype(np.int64)),
        chosen.classes,
        source.name,
        {},
        {str(indices[i]): known[i] for i in sorted(known)},
    )
    if not bad:
        return images
    readable = torch.tensor([i for i in range(len(chosen)) if i not in bad])
    return replace(images.take(readable), skipped={chosen.where(i): reason for i, reason in bad.items()})


def image_digest(pixels: np.ndarray, label: int) -> str:
    """Tells a labelled image (H, W, C) uint8, as its source has it, from others: 48 bits, hexadecimal."""
    return hashlib.blake2b(f"{pixels.shape} {label} ".encode() + pixels.tobytes(), digest_size=6).hexdigest()


def decode_source(
    source: ImageSource, config: DataConfig, fitting: Fitting | None = None, digests: dict[int, str] | None = None
) -> tuple[np.ndarray, dict[int, str]]:
    """((N, C, H, W) uint8, position → reason for unreadable files, whose pixels stay black).

    Args:
        digests: filled with those of the readable images by position.
    """
    if isinstance(source, ArraySource):
        if digests is not None:
            digests |= {i: image_digest(source.pixels(i), int(source.labels[i])) for i in range(len(source))}
        return np.ascontiguousarray(source.images), {}
    from mimir_fast.data.decode import UnreadableImageError

    fit, bad = fitting or Fitting(), {}
    images = np.zeros((len(source), config.channels, *height_width(config.image_size)), np.uint8)

    def fill(index: int) -> None:
        try:
            pixels = source.pixels(index)
        except (UnreadableImageError, OSError) as error:
            bad[index] = str(error)
            return
        if digests is not None:
            digests[index] = image_digest(pixels, int(source.labels[index]))
        images[index] = fit(pixels, config)

    with ThreadPoolExecutor(max(1, config.num_workers)) as pool:  # PIL decodes outside the interpreter's lock
        list(pool.map(fill, range(len(source))))
    return images, bad


MakeSet = Callable[["ImageSets", int], EvaluationImages]
"""(sets, shard) → images of the shard of a set that `ImageSets` does not know."""


class ImageSets:
    """The sets of images an evaluation measures on, a shard at a time.

    Args:
        indices: (N,) positions of the evaluated images.
    """

    def __init__(
        self, source: ImageSource, config: DataConfig, indices: np.ndarray, num_shards: int, fitting: Fitting
    ) -> None:  # fmt: skip
        self.source, self.config, self.indices = source, config, indices
        self.num_shards, self.fitting = num_shards, fitting
        self._kept: dict[tuple[str, int], EvaluationImages] = {}

    def shard(self, name: str, number: int, make: MakeSet | None = None) -> EvaluationImages:
        """Decoded images; the last two sets that were asked for stay in memory beside `all`.

        Args:
            name: `all`, `few:N`, or any other name of what `make` makes.
        """
        key = (name, number)
        if key not in self._kept:
            kept = [k for k in self._kept if k[0] != "all" or k[1] != number]
            for old in kept[:-1]:
                del self._kept[old]
            self._kept[key] = make(self, number) if make else self._make(name, number)
        return self._kept[key]

    def _make(self, name: str, number: int) -> EvaluationImages:
        if name == "all":
            mine = self.indices[number :: self.num_shards]
            return load_from(self.source, self.config, mine, self.fitting, digests=True)
        # Chosen among all evaluated images, so the same ones for any number of shards.
        count = min(int(name.removeprefix("few:")), len(self.indices))
        chosen = self.indices[np.arange(count) * len(self.indices) // count]
        whole = self.shard("all", number)
        return whole.take(torch.isin(whole.samples, torch.from_numpy(chosen)).nonzero()[:, 0])
