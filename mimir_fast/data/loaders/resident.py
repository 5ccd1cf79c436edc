"""Resident: the whole uint8 data set on the device, batches cut out by a handful of tensor ops.

The host's part, order and augmentation numbers, is done for many batches at a time (a window), so that a step costs a
few slices, one row gather and one pixel gather: no Python a sample, no host sync.

Shapes: N samples in the set, M in a window, B in a micro-batch, C channels, H x W pixels.
"""

from collections.abc import Generator
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from mimir_fast.data.batch import Batch
from mimir_fast.data.config import DataConfig
from mimir_fast.data.geometry import draw_mirror, draw_shift
from mimir_fast.data.loaders.base import Loader, to_channels
from mimir_fast.data.order import BatchPlan, Key, KeyStream, MixedOrder, SampleOrder

_WINDOW = 64  # micro-batches whose numbers are drawn and sent to the device at a time: some tens of ms of host work


class ResidentLoader(Loader):
    """Batches of a data set that lies on the device.

    Args:
        images_NCHW: uint8, with `margin` pixels around; moved to `device` if it is not there.
        labels_N: int64.
        augment: shift (`config.augment == "pad_crop"`) and mirror.
        margin: pixels around the image that a shift brings in; where it reaches past them, zeros.
        readable_N: which sample stands in for each one, itself for those that could be read.
    """

    def __init__(
        self,
        images_NCHW: Tensor,
        labels_N: Tensor,
        config: DataConfig,
        plan: BatchPlan,
        order: SampleOrder | MixedOrder,
        device: torch.device,
        augment: bool,
        margin: int = 0,
        readable_N: np.ndarray | None = None,
    ) -> None:
        super().__init__(plan, order)
        if augment and config.augment == "resized_crop":
            raise ValueError("the resident loader cannot do resized_crop; use augment=pad_crop or loader=torch")
        self.config, self.device, self.augment, self.readable = config, device, augment, readable_N
        self.margin = margin
        self.images, self.labels = images_NCHW.to(device), labels_N.to(device)

    def _read(self, keys: KeyStream) -> Generator[Batch, None, None]:
        stream = iter(keys)
        while window := list(islice(stream, _WINDOW)):
            columns = self._draw(window)
            start = 0
            for samples, _ in window:
                yield self._cut(columns[:, start : start + len(samples)])
                start += len(samples)

    def _draw(self, window: list[Key]) -> Tensor:
        """(5, M) int64 on the device: sample, epoch, shift y, shift x, mirror."""
        samples, epochs = (np.concatenate(column) for column in zip(*window, strict=True))
        if self.readable is not None:
            samples = self.readable[samples]
        columns = np.zeros((5, len(samples)), np.int64)
        columns[0], columns[1] = samples, epochs
        if self.augment and self.config.augment == "pad_crop":
            columns[2:4] = draw_shift(self.order.seed, samples, epochs, self.config.crop_padding).T
        if self.augment and self.config.flip:
            columns[4] = draw_mirror(self.order.seed, samples, epochs)
        host = torch.from_numpy(columns)
        return host.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else host

    def _cut(self, columns_5B: Tensor) -> Batch:
        samples, epochs, shift_y, shift_x, mirror = columns_5B.unbind()
        images = self.images.index_select(0, samples)
        if self.augment:
            images = shift_and_mirror(images, shift_y, shift_x, mirror, self.margin)
        return Batch(to_channels(images, self.config.channels), self.labels[samples], samples, epochs)

    def close(self) -> None:
        self.images = self.images.new_empty((0, *self.images.shape[1:]))


def shift_and_mirror(
    images_BCHW: Tensor, shift_y_B: Tensor, shift_x_B: Tensor, mirror_B: Tensor, margin: int = 0
) -> Tensor:
    """Each image moved by its shift, zeros where it comes from outside, then mirrored where `mirror_B` is 1.

    y[b, :, i, j] = x[b, :, m + i + shift_y[b], m + j' + shift_x[b]],   j' = W - 2m - 1 - j where mirrored, else j.
    The same as padding with zeros and cropping at (padding + shift), without ever making the padded image. The result
    is smaller than the images by the margin m on each side.
    """
    batch, channels, height, width = images_BCHW.shape
    inner_height, inner_width = height - 2 * margin, width - 2 * margin
    rows_BH = torch.arange(margin, height - margin, device=images_BCHW.device) + shift_y_B[:, None]
    columns = torch.arange(margin, width - margin, device=images_BCHW.device)
    columns_BW = torch.where(mirror_B[:, None] > 0, columns.flip(0), columns) + shift_x_B[:, None]
    row_inside, column_inside = (rows_BH >= 0) & (rows_BH < height), (columns_BW >= 0) & (columns_BW < width)
    inside = row_inside[:, :, None] & column_inside[:, None, :]
    pixels_BHW = rows_BH.clamp(0, height - 1)[:, :, None] * width + columns_BW.clamp(0, width - 1)[:, None, :]
    ids = pixels_BHW.view(batch, 1, inner_height * inner_width).expand(-1, channels, -1)
    moved = torch.gather(images_BCHW.flatten(2), 2, ids).view(batch, channels, inner_height, inner_width)
    return moved * inside[:, None]
