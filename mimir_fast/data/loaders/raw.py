"""Raw: uint8 images that lie mapped in memory; what a crop needs is copied out, and cut on the device by one fused op.

    shard --the box and a margin--> buffer (pinned, on CUDA) --> device --crop, resize, mirror--> uint8 (B, C, S, S)

Threads copy ahead, a micro-batch each; they wait for the disk side by side and hold no lock while they copy. Beside a
whole image, the margin saves bandwidth: it is as wide as the antialiasing filter, so that the pixels are the same up to
the last bit of a weight (an image begins at another coordinate): at most one level of 255, and that hardly ever.
"""

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from mimir_fast.data.batch import Batch
from mimir_fast.data.config import DataConfig
from mimir_fast.data.crop import to_plan
from mimir_fast.data.geometry import Geometry, plan_geometry
from mimir_fast.data.loaders.base import Loader, to_channels
from mimir_fast.data.order import BatchPlan, Key, KeyStream, MixedOrder, SampleOrder
from mimir_fast.data.sources.base import RawSource
from mimir_fast.ops.crop_resize import crop_resize

_AHEAD = 2  # micro-batches a thread


class RawLoader(Loader):
    """Batches of a prepared source (see `mimir_fast.data.prepare`)."""

    def __init__(
        self,
        source: RawSource,
        config: DataConfig,
        plan: BatchPlan,
        order: SampleOrder | MixedOrder,
        device: torch.device,
        augment: bool,
    ) -> None:
        super().__init__(plan, order)
        self.source, self.config, self.device, self.augment = source, config, device, augment
        self.labels = torch.from_numpy(source.labels)
        self._closed = False

    def _read(self, keys: KeyStream) -> Generator[Batch, None, None]:
        if self._closed:
            raise RuntimeError("this loader was closed; build a new one")
        threads = self.config.num_workers
        if threads == 0:
            for key in keys:
                yield self._finish(key, *self._copy_out(key))
            return
        stream = iter(keys)
        with ThreadPoolExecutor(threads, thread_name_prefix="mimir_fast raw") as pool:
            begun: deque[tuple[Key, Future[tuple[Tensor, Tensor]]]] = deque()
            try:
                while True:
                    for key in islice(stream, _AHEAD * threads - len(begun)):
                        begun.append((key, pool.submit(self._copy_out, key)))
                    if not begun:
                        return
                    key, future = begun.popleft()
                    yield self._finish(key, *future.result())
            finally:
                pool.shutdown(cancel_futures=True)

    def _copy_out(self, key: Key) -> tuple[Tensor, Tensor]:
        """What the crops of a micro-batch need, one after the other: (bytes,) uint8, and the plan of the crops."""
        samples, epochs = key
        sizes = self.source.sizes[samples]
        geometry = plan_geometry(self.config, self.augment, self.order.seed, samples, epochs, sizes)
        corner, extent = needed_part(geometry, sizes)
        num_bytes = extent.prod(1) * self.source.channels
        offsets = np.cumsum(num_bytes) - num_bytes
        buffer = torch.empty(int(num_bytes.sum()), dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        to = buffer.numpy()
        for sample, (y, x), (height, width), start, count in zip(
            samples.tolist(), corner.tolist(), extent.tolist(), offsets.tolist(), num_bytes.tolist(), strict=True
        ):
            part = self.source.pixels(sample)[y : y + height, x : x + width]
            to[start : start + count].reshape(part.shape)[...] = part
        box = np.concatenate([geometry.box[:, :2] - corner, geometry.box[:, 2:]], axis=1)
        plan = to_plan(Geometry(box, geometry.size, geometry.anchor, geometry.mirror), extent, offsets)
        return buffer, plan

    def _finish(self, key: Key, buffer: Tensor, plan: Tensor) -> Batch:
        samples, epochs = (torch.from_numpy(column) for column in key)
        pixels = buffer.to(self.device, non_blocking=True)
        images = crop_resize(pixels, plan, side=self.config.image_size, channels=self.source.channels)
        columns = (column.to(self.device, non_blocking=True) for column in (self.labels[samples], samples, epochs))
        return Batch(to_channels(images, self.config.channels), *columns)

    def close(self) -> None:
        self._closed = True


def needed_part(geometry: Geometry, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corner and extent, both (B, 2) int64, of the part of each image that its crop can see: the box and a margin."""
    corner, extent = geometry.box[:, :2], geometry.box[:, 2:]
    margin = np.ceil(2 * np.maximum(extent / geometry.size, 1)).astype(np.int64) + 1  # the filter's reach
    first, last = np.maximum(corner - margin, 0), np.minimum(corner + extent + margin, sizes)
    return first, last - first
