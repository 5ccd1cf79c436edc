"""One decoded image to what a batch holds, as the geometry says; PIL's bicubic, and the same with every Pillow."""

import numpy as np
import torch

from mimir_fast.data.geometry import Geometry
from mimir_fast.ops.crop_resize import crop_resize


def to_plan(geometry: Geometry, sizes: np.ndarray, offsets: np.ndarray) -> torch.Tensor:
    """The geometry as `mimir_fast.ops.crop_resize` takes it: (B, 12) int64.

    Args:
        sizes: (B, 2) int64 height and width of the images.
        offsets: (B,) int64 where each begins in the buffer.
    """
    columns = (offsets[:, None], sizes, geometry.box, geometry.size, geometry.anchor, geometry.mirror[:, None])
    return torch.from_numpy(np.concatenate(columns, axis=1, dtype=np.int64))


def cut(pixels: np.ndarray, geometry: Geometry, row: int, side: int, channels: int) -> np.ndarray:
    """(channels, side, side) uint8: what row `row` of the geometry makes of one (H, W, C) image."""
    if pixels.shape[2] == 3 and channels == 1:
        pixels = to_grey(pixels)
    one = slice(row, row + 1)
    chosen = Geometry(geometry.box[one], geometry.size[one], geometry.anchor[one], geometry.mirror[one])
    plan = to_plan(chosen, np.array([pixels.shape[:2]]), np.zeros(1, np.int64))
    buffer = torch.from_numpy(np.require(pixels, requirements=["C", "W"]).reshape(-1))
    image = crop_resize(buffer, plan, side=side, channels=pixels.shape[2])[0].numpy()
    return image if len(image) == channels else np.repeat(image, channels, axis=0)


def to_grey(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 1) uint8 from (H, W, 3): ITU-R 601 luminance, rounded as PIL does."""
    weighed = pixels.astype(np.int32) @ np.array([19595, 38470, 7471], np.int32)
    return ((weighed + 0x8000) >> 16).astype(np.uint8)[:, :, None]
