"""Worker processes: files are read, decoded and cut by the fused crop; works for every source.

A worker reads and cuts a whole micro-batch. It draws nothing: the samples come from the counter-based order, the crops
from mimir_fast.data.geometry.
"""

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from mimir_fast.data.batch import Batch
from mimir_fast.data.config import DataConfig
from mimir_fast.data.crop import cut
from mimir_fast.data.geometry import plan_geometry
from mimir_fast.data.loaders.base import Loader
from mimir_fast.data.loaders.processes import Workers
from mimir_fast.data.loaders.skip import SkipLedger, first_readable
from mimir_fast.data.order import BatchPlan, Key, KeyStream, MixedOrder, SampleOrder
from mimir_fast.data.sources.base import ImageSource
from mimir_fast.sizes import height_width

Found = tuple[np.ndarray, np.ndarray, np.ndarray]  # samples asked for, samples read (-1: none to be had), epochs


class WorkerLoader(Loader):
    """Batches read by `config.num_workers` processes, or by this one if that is 0."""

    def __init__(
        self,
        source: ImageSource,
        config: DataConfig,
        plan: BatchPlan,
        order: SampleOrder | MixedOrder,
        device: torch.device,
        augment: bool,
    ) -> None:
        super().__init__(plan, order)
        self.device, self.labels = device, torch.from_numpy(source.labels)
        self._ledger = SkipLedger(source, config.max_bad_files, self.skipped)
        self._shape = (plan.batch_size, config.channels, *height_width(config.image_size))
        self._reader = Reader(source, config, order.seed, augment)
        self._num_workers = config.num_workers
        self._workers: Workers | None = None
        self._closed = False

    def _read(self, keys: KeyStream) -> Generator[Batch, None, None]:
        if self._closed:
            raise RuntimeError("this loader was closed; build a new one")
        if self._num_workers and self._workers is None:
            self._workers = Workers(self._reader, self._shape, self._num_workers)
        for slot, (wanted, samples, epochs) in self._workers.read(keys) if self._workers else self._here(keys):
            self._ledger.compare(wanted, samples)
            images = torch.empty((len(samples), *slot.shape[1:]), dtype=torch.uint8, pin_memory=self._pinned)
            images.copy_(torch.from_numpy(slot[: len(samples)]))
            columns = images, self.labels[samples], torch.from_numpy(samples), torch.from_numpy(epochs)
            yield Batch(*(column.to(self.device, non_blocking=True) for column in columns))

    def _here(self, keys: KeyStream) -> Generator[tuple[np.ndarray, Found], None, None]:
        slot = np.empty(self._shape, np.uint8)
        for key in keys:
            yield slot, self._reader(key, slot)

    @property
    def _pinned(self) -> bool:
        return self.device.type == "cuda"

    def close(self) -> None:
        self._closed = True
        if self._workers is not None:
            self._workers.close()
            self._workers = None


class Reader:
    """The worker's part: samples and epochs in, images out."""

    def __init__(self, source: ImageSource, config: DataConfig, seed: int, augment: bool) -> None:
        self.source, self.config, self.seed, self.augment = source, config, seed, augment
        self._pool: ThreadPoolExecutor | None = None

    def __call__(self, key: Key, slot: np.ndarray) -> Found:
        """Fill the first rows of the slot, (B, C, H, W) uint8."""
        wanted, epochs = key
        limit, size, channels = self.config.max_bad_files, self.config.image_size, self.config.channels
        found = list(
            self._map(lambda index: first_readable(index, len(self.source), self.source.pixels, limit), wanted.tolist())
        )
        samples = np.array([index for index, _ in found], np.int64)
        pictures = [np.zeros((*height_width(size), 1), np.uint8) if pixels is None else pixels for _, pixels in found]
        sizes = np.array([picture.shape[:2] for picture in pictures], np.int64)
        geometry = plan_geometry(self.config, self.augment, self.seed, samples, epochs, sizes)
        slot[: len(pictures)] = cut(pictures, geometry, size, channels).numpy()
        return wanted, samples, epochs

    def _map(self, function: Callable[[int], Any], indices: list[int]) -> Iterable[Any]:
        """In order; several at a time where files are slow to come."""
        if self.config.read_threads == 1:
            return map(function, indices)
        if self._pool is None:  # made here and not earlier: threads do not survive a fork
            self._pool = ThreadPoolExecutor(self.config.read_threads)
        return self._pool.map(function, indices)
