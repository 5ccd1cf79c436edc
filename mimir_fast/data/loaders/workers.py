"""Torch DataLoader workers: PIL decoding and cropping in processes; works for every source.

One item of the DataLoader is a whole micro-batch: its sampler hands out (samples, epochs) from the counter-based order,
a worker reads and crops them all. The worker draws nothing: the crops come from mimir_fast.data.geometry.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mimir_fast.data.batch import Batch
from mimir_fast.data.config import DataConfig
from mimir_fast.data.geometry import Geometry, plan_geometry
from mimir_fast.data.loaders.base import Loader
from mimir_fast.data.loaders.skip import SkipLedger, first_readable
from mimir_fast.data.order import BatchPlan, Cursor, MixedOrder, SampleOrder
from mimir_fast.data.sources.base import ImageSource

_PREFETCHED_BATCHES = 4  # a worker
Key = tuple[np.ndarray, np.ndarray]  # samples, epochs


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
        self._keys = _Keys(plan, order)
        self._ledger = SkipLedger(source, config.max_bad_files, self.skipped)
        parallel: dict[str, Any] = {}
        if config.num_workers:
            # Forked workers share the source's arrays and memory maps; a spawned one would pickle its own copy.
            parallel = {
                "persistent_workers": True,
                "prefetch_factor": _PREFETCHED_BATCHES,
                "multiprocessing_context": "fork",
            }
        self._loader: DataLoader[Any] | None = DataLoader(
            _Reader(source, config, order.seed, augment),
            sampler=self._keys,
            batch_size=None,
            num_workers=config.num_workers,
            collate_fn=_unchanged,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # else its base seed is drawn from torch's global generator
            **parallel,
        )

    def _batches(self, cursor: Cursor) -> Iterator[Batch]:
        if self._loader is None:
            raise RuntimeError("this loader was closed; build a new one")
        self._keys.cursor = cursor
        for images, wanted, samples, epochs in self._loader:
            self._ledger.compare(wanted.numpy(), samples.numpy())
            yield Batch(*(self._send(column) for column in (images, self.labels[samples], samples, epochs)))

    def _send(self, column: Tensor) -> Tensor:
        return column.to(self.device, non_blocking=True)

    def close(self) -> None:
        self._loader = None  # its workers end with it


class _Keys(Sampler[Key]):
    """What is asked of the workers: the micro-batches' samples and epochs from `cursor` on."""

    def __init__(self, plan: BatchPlan, order: SampleOrder | MixedOrder) -> None:
        self.plan, self.order, self.cursor = plan, order, Cursor()

    def __iter__(self) -> Iterator[Key]:
        for span in self.plan.spans(self.cursor):
            yield self.order.at(*span)


class _Reader(Dataset[Any]):
    """The worker's part: samples and epochs in, images out."""

    def __init__(self, source: ImageSource, config: DataConfig, seed: int, augment: bool) -> None:
        self.source, self.config, self.seed, self.augment = source, config, seed, augment

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Images (B, C, S, S) uint8, samples asked for, samples read (-1: none to be had), epochs."""
        wanted, epochs = key
        limit, side = self.config.max_bad_files, self.config.image_size
        found = [first_readable(int(index), len(self.source), self.source.pixels, limit) for index in wanted]
        samples = np.array([index for index, _ in found], np.int64)
        pictures = [np.zeros((side, side, 1), np.uint8) if pixels is None else pixels for _, pixels in found]
        sizes = np.array([picture.shape[:2] for picture in pictures], np.int64)
        geometry = plan_geometry(self.config, self.augment, self.seed, samples, epochs, sizes)
        images = [cut(picture, geometry, row, side, self.config.channels) for row, picture in enumerate(pictures)]
        columns = (np.stack(images), wanted, samples, epochs)
        return tuple(torch.from_numpy(column) for column in columns)  # type: ignore[return-value]


def cut(pixels: np.ndarray, geometry: Geometry, row: int, side: int, channels: int) -> np.ndarray:
    """(channels, side, side) uint8: what row `row` of the geometry makes of one (H, W, C) image; PIL's bicubic."""
    from PIL import Image

    image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
    image = image.convert("RGB" if channels == 3 else "L")
    y, x, height, width = geometry.box[row].tolist()
    new_height, new_width = geometry.size[row].tolist()
    image = image.resize((new_width, new_height), Image.Resampling.BICUBIC, box=(x, y, x + width, y + height))

    top, left = geometry.anchor[row].tolist()
    window = image.crop((left, top, left + side, top + side))  # zeros where it reaches outside
    result = np.asarray(window).reshape(side, side, channels).transpose(2, 0, 1)
    return np.ascontiguousarray(result[:, :, ::-1] if geometry.mirror[row] else result)


def _unchanged(item: Any) -> Any:
    return item
