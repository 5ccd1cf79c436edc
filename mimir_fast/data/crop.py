"""Decoded images of any sizes to what a batch holds, as the geometry says, by one fused op on any device.

What a crop needs, the box and a margin as wide as the antialiasing filter reaches, is copied into one buffer; the op
(mimir_fast.ops.crop_resize) makes the batch of it. The pixels are those of PIL's bicubic `resize` with the box, up to
the last bit of a weight, since a copied part begins at another coordinate: at most one level of 255, and hardly ever.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mimir_fast.data.geometry import Geometry
from mimir_fast.ops.crop_resize import crop_resize_directly
from mimir_fast.sizes import Size


def pack(
    pictures: Sequence[np.ndarray], geometry: Geometry, channels: int, pinned: bool = False
) -> tuple[Tensor, Tensor]:
    """What the crops need, one after the other: (bytes,) uint8, and the plan for `crop_resize`, (B, 12) int64.

    Args:
        pictures: B images, (H, W, 1 or 3) uint8.
        channels: of the buffer; grey is repeated to colour, colour weighed to grey.
        pinned: in page-locked memory, from which a GPU copies without waiting.
    """
    sizes = np.array([picture.shape[:2] for picture in pictures], np.int64).reshape(-1, 2)
    corner, extent = needed_part(geometry, sizes)
    num_bytes = extent.prod(1) * channels
    offsets = np.cumsum(num_bytes) - num_bytes
    buffer = torch.empty(int(num_bytes.sum()), dtype=torch.uint8, pin_memory=pinned)
    to = buffer.numpy()
    for picture, (y, x), (height, width), start in zip(
        pictures, corner.tolist(), extent.tolist(), offsets.tolist(), strict=True
    ):
        part = picture[y : y + height, x : x + width]
        if part.shape[2] > channels:
            part = to_grey(part)
        to[start : start + height * width * channels].reshape(height, width, channels)[...] = part
    box = np.concatenate([geometry.box[:, :2] - corner, geometry.box[:, 2:]], axis=1)
    columns = (offsets[:, None], extent, box, geometry.size, geometry.anchor, geometry.mirror[:, None])
    return buffer, torch.from_numpy(np.concatenate(columns, axis=1, dtype=np.int64))


def cut(pictures: Sequence[np.ndarray], geometry: Geometry, size: Size, channels: int) -> Tensor:
    """(B, channels, height, width) uint8 on the CPU."""
    return crop_resize_directly(*pack(pictures, geometry, channels), side=size, channels=channels)


def needed_part(geometry: Geometry, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corner and extent, both (B, 2) int64, of the part of each image that its crop can see: the box and a margin."""
    corner, extent = geometry.box[:, :2], geometry.box[:, 2:]
    margin = np.ceil(2 * np.maximum(extent / geometry.size, 1)).astype(np.int64) + 1  # the filter's reach
    first, last = np.maximum(corner - margin, 0), np.minimum(corner + extent + margin, sizes)
    return first, last - first


def to_grey(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 1) uint8 from (H, W, 3): ITU-R 601 luminance, rounded as PIL does."""
    weighed = pixels.astype(np.int32) @ np.array([19595, 38470, 7471], np.int32)
    return ((weighed + 0x8000) >> 16).astype(np.uint8)[:, :, None]
