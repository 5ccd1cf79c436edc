"""Which images are evaluated: a subset of a test split, chosen once, written down, decoded once, cut into shards.

A shard is what one process works on: images k, k + S, k + 2S, … of S shards. The cut is made when an evaluation starts
and kept on disk, so an interrupted evaluation goes on with any number of processes.

Shapes: N images, C channels, H × W pixels.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mimir_fast.data.config import DataConfig
from mimir_fast.data.sources.base import ArraySource, ImageSource, evenly, subset
from mimir_fast.sizes import Size, height_width, said, typed
from mimir_fast.validation import check_number, counted


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
        """`count` images, evenly spaced as `data.sources.base.evenly` does it, or all when there are no more."""
        return self if count >= len(self) else self.take(torch.from_numpy(evenly(self.labels.numpy(), count)))

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
        limit: that many, evenly spaced so that each class has its share; see `data.sources.base.evenly`.
        index_file: a text file with one position, or one path such as n01440764/ILSVRC2012_val_00000293.JPEG, a line; a
            label behind it is not read. RobustBench's list of 5000 ImageNet images is such a file. A path may begin at
            any folder where it is the end of one image's only.
    Raises:
        ValueError: both are given, nothing is chosen, a line names no image of this source or several, or two lines
            name the same one.
        FileNotFoundError: no such file.
    """
    if limit is not None and index_file is not None:
        raise ValueError("give --limit or --index_file, not both")
    if limit is not None:
        check_number("limit", limit, at_least=1, hint="else there is no image to evaluate")
    if index_file is None:
        return evenly(source.labels, len(source) if limit is None else limit)
    path = Path(index_file)
    if index_file == "robustbench":
        from mimir_fast.evaluation.robustbench_zoo import image_list

        path = image_list()
    if not path.is_file():
        raise FileNotFoundError(f"--index_file {index_file}: no such file; one position or file name a line")
    lines = [re.sub(r"(\s+-?\d+)+$", "", line.strip()) for line in path.read_text().splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} is empty: it leaves no image to evaluate; write one position or file name a line")
    numbers = [int(line) for line in lines] if all(line.isdigit() for line in lines) else _by_path(source, lines, path)
    if max(numbers) >= len(source):
        raise ValueError(f"{path} asks for image {max(numbers)}, but {source.name} has {len(source)} (0 is the first)")
    first = {number: at for at, number in reversed(list(enumerate(numbers)))}
    if twice := [line for at, line in enumerate(lines) if first[numbers[at]] != at]:
        lines_name = counted(len(twice), "line names", "lines name")
        raise ValueError(f"{path}: {lines_name} an image that a line before names, such as {twice[0]}")
    return np.sort(np.asarray(numbers, dtype=np.int64))


def _by_path(source: ImageSource, lines: list[str], file: Path) -> list[int]:
    """Positions of the images whose paths end as the lines do."""
    wanted, known = {Path(line).name for line in lines}, dict[str, list[tuple[int, tuple[str, ...]]]]()
    for number in range(len(source)):
        parts = Path(source.where(number)).parts
        if parts[-1] in wanted:
            known.setdefault(parts[-1], []).append((number, parts))
    found = []
    for line in lines:
        parts = Path(line).parts
        named = known.get(parts[-1], [])
        fits = [number for number, path in named if path[-len(parts) :] == parts]
        if len(fits) != 1:
            said = f"which {len(fits)} images of {source.name} end in" if fits else f"which {source.name} lacks"
            near = ", ".join(source.where(number) for number in (fits or [n for n, _ in named])[:3])
            advice = f" ({near}): write as much of the path as tells them apart, such as CLASS/FILE" if near else ""
            raise ValueError(f"{file} names {line}, {said}{advice}")
        found += fits
    return found


@dataclass(frozen=True)
class Fitting:
    """How image files come to the model's size: they are resized, then cut or filled up around the centre.

    Attributes:
        crop: side of the centre crop as a part of the resized image's.
        interpolation: of the resize, one of PIL's filters: bicubic, bilinear, nearest, box, hamming or lanczos.
        mode: `center` resizes until size / crop is just covered, `squash` to size / crop exactly, `border` until the
            image lies just inside of it, `cut` not at all: all four with timm's and torchvision's rounding. `loader` is
            `center`, but where crop and interpolation are the usual ones it rounds and resizes as every loader does.
        fill: colour of what is outside of the image, 0 … 255: one number, or one a channel.
        native: an image that has the model's size already stays as it is.
    """

    crop: float = 0.875
    interpolation: str = "bicubic"
    mode: Literal["loader", "center", "squash", "border", "cut"] = "loader"
    fill: tuple[int, ...] = (0,)
    native: bool = True

    def __call__(self, pixels: np.ndarray, config: DataConfig) -> np.ndarray:
        """(C, *config.image_size) uint8 of an image (H, W, 1 or 3) uint8."""
        from mimir_fast.data.crop import cut
        from mimir_fast.data.geometry import plan_geometry

        wanted, channels = height_width(config.image_size), config.channels
        if self == Fitting() or (self.native and pixels.shape[:2] == wanted):
            one, sizes = np.array([0]), np.array([pixels.shape[:2]])
            plan = plan_geometry(config, False, 0, one, one, sizes)
            return cut([pixels], plan, config.image_size, channels)[0].numpy()
        from PIL import Image

        from mimir_fast.data.loaders.base import to_channels

        image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
        size = self._resized(image.height, image.width, wanted)
        if size != (image.height, image.width):
            image = image.resize(size[::-1], Image.Resampling[self.interpolation.upper()])
        if len(self.fill) > 1:
            image = image.convert("RGB")
        array = np.asarray(image).reshape(*size, -1)
        canvas = np.empty((*wanted, array.shape[2]), np.uint8)
        canvas[:] = self.fill
        (from_top, to_top), (from_left, to_left) = map(_centred, size, wanted)
        canvas[to_top, to_left] = array[from_top, from_left]
        return to_channels(torch.from_numpy(canvas.transpose(2, 0, 1).copy())[None], channels)[0].numpy()

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: crop, interpolation, and what differs from how loaders do it."""
        usual = asdict(Fitting())
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
            if name in ("crop", "interpolation") or value != usual[name]
        }

    def _resized(self, height: int, width: int, wanted: tuple[int, int]) -> tuple[int, int]:
        """Height and width before the crop.

        For squares `center` is torchvision's Resize, where the long side is cut to an integer; else, and for `border`,
        timm's ResizeKeepRatio, where both are rounded.
        """
        down, across = (int(side / self.crop) for side in wanted)
        if self.mode in ("cut", "squash"):
            return (height, width) if self.mode == "cut" else (down, across)
        if down == across and self.mode != "border":
            return (int(down * height / width), down) if width <= height else (down, int(down * width / height))
        ratio = (max if self.mode == "border" else min)(height / down, width / across)
        return round(height / ratio), round(width / ratio)


def fitting_for(
    made_for: Mapping[str, Any], image_size: Size, crop: float | None = None, interpolation: str = "auto"
) -> Fitting:
    """As a model says how images are prepared for it, to the pixel where they come to its own size.

    Args:
        made_for: `image_size`, and fields of `Fitting`; empty where it does not say.
        crop, interpolation: what is asked for in their place; None and `auto` ask for nothing.
    """
    how = {name: value for name, value in made_for.items() if name != "image_size"}
    how |= {} if crop is None else {"crop": crop}
    how |= {} if interpolation == "auto" else {"interpolation": interpolation}
    return Fitting(**how, native="mode" not in how or image_size != made_for.get("image_size"))


def _centred(have: int, wanted: int) -> tuple[slice, slice]:
    """(what is taken of an axis with `have` pixels, where it is put on one with `wanted`), as torchvision rounds."""
    if have >= wanted:
        first = round((have - wanted) / 2)
        return slice(first, first + wanted), slice(None)
    first = (wanted - have) // 2
    return slice(None), slice(first, first + have)


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
        raise ValueError(f"{source.name}: {counted(len(bad), 'image')}, and none is readable, such as {bad[0]}")
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
        chosen = self.indices[evenly(self.source.labels[self.indices], int(name.removeprefix("few:")))]
        whole = self.shard("all", number)
        return whole.take(torch.isin(whole.samples, torch.from_numpy(chosen)).nonzero()[:, 0])
