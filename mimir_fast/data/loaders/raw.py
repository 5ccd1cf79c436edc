"""Raw: uint8 images that lie mapped in memory; what a crop needs is copied out, and cut on the device by one fused op.

    shard --the box and a margin--> buffer (pinned, on CUDA) --> device --crop, resize, mirror--> uint8 (B, C, H, W)

Threads copy ahead, a micro-batch each; they wait for the disk side by side and hold no lock while they copy.
"""

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

import torch
from torch import Tensor

from mimir_fast.data.batch import Batch
from mimir_fast.data.config import DataConfig
from mimir_fast.data.crop import pack
from mimir_fast.data.geometry import plan_geometry
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
        """See `mimir_fast.data.crop.pack`."""
        samples, epochs = key
        sizes = self.source.sizes[samples]
        geometry = plan_geometry(self.config, self.augment, self.order.seed, samples, epochs, sizes)
        pictures = [self.source.pixels(sample) for sample in samples.tolist()]
        return pack(pictures, geometry, self.source.channels, pinned=self.device.type == "cuda")

    def _finish(self, key: Key, buffer: Tensor, plan: Tensor) -> Batch:
        samples, epochs = (torch.from_numpy(column) for column in key)
        pixels = buffer.to(self.device, non_blocking=True)
        images = crop_resize(pixels, plan, side=self.config.image_size, channels=self.source.channels)
        columns = (column.to(self.device, non_blocking=True) for column in (self.labels[samples], samples, epochs))
        return Batch(to_channels(images, self.config.channels), *columns)

    def close(self) -> None:
        self._closed = True
