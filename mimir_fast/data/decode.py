"""Encoded images to pixels, and the decision whether a file is an image at all.

One rule for all loaders: what PIL decodes completely is an image, everything else is skipped. JPEG files are decoded by
torchvision where it is installed: the same libjpeg-turbo and the same pixels in 0.7 of the time, since PIL keeps four
bytes a pixel and copies them to three. What torchvision refuses PIL judges (of 74,000 damaged files that PIL opened,
torchvision took none that PIL did not, and gave the same pixels of all that it took).
"""

import importlib.util
import io
import struct
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

_PLAIN = ("L", "RGB")  # PIL's modes that are kept as they are
_JPEG_START, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND"
_PNG_BIT_DEPTH = 24  # where it stands in the file
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # tags of TIFF
_CHANNELS_OF_FILE = 0  # torchvision.io.ImageReadMode.UNCHANGED
_TAIL = 64  # bytes at the end in which the end marker must stand; writers pad with a few zeros


MAX_PIXELS = 100_000_000  # ImageNet's largest has 61 million; PIL itself would go on up to 179 million
MAX_FILE_BYTES = 256 * 2**20


class UnreadableImageError(ValueError):
    """The bytes are no image, or only a part of one."""


def decode(content: bytes, where: str) -> np.ndarray:
    """(H, W, C) uint8, C = 1 for grey images and 3 (RGB) for all others; EXIF orientation is not applied.

    Raises:
        UnreadableImageError: with `where` (a path) and PIL's reason.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            _check_size(image)
            pixels = _decode_jpeg(content) if image.mode in _PLAIN and image.format == "JPEG" else None
            if pixels is None:
                pixels = _pixels(image)
    except _refusals() as error:
        raise UnreadableImageError(f"{where}: {_reason(error)}") from error
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def pixels_of(image: Any) -> np.ndarray:
    """Of an image that PIL has open: as `decode` gives them.

    Raises:
        UnreadableImageError: it is too large, or damaged, or of grey levels without a known range.
    """
    try:
        _check_size(image)
        pixels = _pixels(image)
    except _refusals() as error:
        raise UnreadableImageError(f"the image: {_reason(error)}") from error
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _pixels(image: Any) -> np.ndarray:
    return np.asarray(image if image.mode in _PLAIN else _in_bytes(image))


def _in_bytes(image: Any) -> Any:
    """Anything but grey or RGB of 8 bits as one of them, by PIL; of 16 bits the upper eight, as PIL takes of RGB.

    Raises:
        ValueError: grey levels without a known range, of which PIL would cut off what is above 255.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        tags = getattr(image, "tag_v2", {})  # of a TIFF, whose 12 bits and whose white 0 PIL leaves as they are
        bits, zero_is_white = tags.get(_BITS_PER_SAMPLE, (16,))[0], tags.get(_PHOTOMETRIC) == 0
        levels = (np.asarray(image).astype(np.uint32) >> (bits - 8)).astype(np.uint8)
        return 255 - levels if zero_is_white else levels
    if image.mode in ("I", "F"):
        raise ValueError(f"grey levels of PIL's mode {image.mode}, whose range no file says: save it with 8 or 16 bits")
    return image.convert("RGB")


def _decode_jpeg(content: bytes) -> np.ndarray | None:
    """(H, W, C) uint8 by torchvision; None: it is not there, or refuses."""
    decoder = jpeg_decoder()
    if decoder is None:
        return None
    try:
        pixels_CHW = decoder(torch.frombuffer(bytearray(content), dtype=torch.uint8), _CHANNELS_OF_FILE)
    except RuntimeError:
        return None
    return pixels_CHW.permute(1, 2, 0).numpy()


@cache
def jpeg_decoder() -> Callable[[torch.Tensor, int], torch.Tensor] | None:
    """torchvision's op, if installed: its library alone, for the package imports torch's compiler (2 s, 90 MB)."""
    package = importlib.util.find_spec("torchvision")
    for folder in (package and package.submodule_search_locations) or ():
        for library in Path(folder).glob("image*.so"):
            with suppress(OSError, AttributeError):  # built for another torch, or without libjpeg
                torch.ops.load_library(library)
                return torch.ops.image.decode_jpeg
    return None


def checked_file(content: bytes, where: str) -> tuple[bytes, int, int]:
    """The bytes as every decoder takes them, with the image's height and width; cheap for whole JPEG and PNG files.

    A grey or RGB file of 8 bits that ends as its format demands is passed on after a look at its header. Anything else
    (other formats, CMYK, a missing end, 16 bits, which DALI rounds otherwise) is decoded here and passed on as PNM.

    Raises:
        UnreadableImageError: as `decode`.
    """
    from PIL import Image

    tail = content[-_TAIL:]
    if (content.startswith(_JPEG_START) and _JPEG_END in tail) or (content.startswith(_PNG_START) and _PNG_END in tail):
        try:
            with Image.open(io.BytesIO(content)) as image:
                _check_size(image)
                deep = image.format == "PNG" and content[_PNG_BIT_DEPTH] == 16
                if image.mode in ("L", "RGB") and not deep:
                    return content, image.height, image.width
        except _refusals() as error:
            raise UnreadableImageError(f"{where}: {_reason(error)}") from error
    return plain_file(decode(content, where))


def plain_file(pixels: np.ndarray) -> tuple[bytes, int, int]:
    """(H, W, C) uint8 pixels as an uncompressed PNM file, with height and width."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(file, format="PPM")
    return file.getvalue(), pixels.shape[0], pixels.shape[1]


def _check_size(image: Any) -> None:
    """A header of a few bytes can ask for gigabytes."""
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}: is this an image bomb?")


def _refusals() -> tuple[type[Exception], ...]:
    """All that PIL raises on bytes that are no whole image."""
    from PIL import Image

    return (OSError, SyntaxError, ValueError, struct.error, MemoryError, Image.DecompressionBombError)


def _reason(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    return "not an image" if isinstance(error, UnidentifiedImageError) else str(error)
