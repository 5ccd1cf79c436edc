"""NVIDIA DALI: image files decoded by the GPU's decoders, or by DALI's threads on the CPU.

Processes read the files and give DALI the bytes with the numbers of mimir_fast.data.geometry, so DALI draws nothing
and only what the crop needs is decoded:

    GPU: bytes, box --decoders.image_slice--> part --resize--> window --mirror, to CHW--> uint8 on the device
    CPU: bytes, box and margin --decoders.image_slice--> part --mimir_fast.data.crop--> uint8

On a GPU `device="mixed"` shares the files between the hardware JPEG decoder and nvJPEG's CUDA one, and a batch never
visits the host. On a CPU the fused crop takes a fifth of the time of DALI's resize, and the pixels are those of the
worker processes, bit for bit: DALI's libjpeg-turbo decodes as PIL's does.
"""

import gc
import logging
import multiprocessing
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from mimir_fast.data.batch import Batch
from mimir_fast.data.config import DataConfig
from mimir_fast.data.crop import cut, needed_part
from mimir_fast.data.decode import checked_file, decode, plain_file
from mimir_fast.data.geometry import Geometry, plan_geometry
from mimir_fast.data.loaders.base import Loader
from mimir_fast.data.loaders.skip import SkipLedger, first_readable
from mimir_fast.data.loaders.workers import Reader
from mimir_fast.data.order import BatchPlan, Key, KeyStream, MixedOrder, SampleOrder
from mimir_fast.data.sources.base import EncodedSource
from mimir_fast.sizes import height_width
from mimir_fast.versions import dali_package

_PIPELINE_DEPTH = 2
_PATIENCE = 3  # batches in a row that fail before the pipeline is built anew
_LOG = logging.getLogger(__name__)


def import_dali() -> Any:
    """`nvidia.dali`, if it is the real one.

    Raises:
        ImportError: absent, or the placeholder of the same name; the message says what to install.
    """
    advice = (
        f"install NVIDIA's wheel by its full name: pip install {dali_package()} (cuda120 with a torch of CUDA 12, "
        "cuda130 with one of CUDA 13); the package called nvidia-dali is an empty placeholder. Without DALI use "
        "--data.loader torch"
    )
    try:
        import nvidia.dali as dali
    except ImportError as error:
        raise ImportError(f"loader 'dali' needs NVIDIA DALI: {advice}") from error
    if not hasattr(dali, "pipeline_def"):
        raise ImportError(f"the installed nvidia.dali has no pipelines: {advice}")
    return dali


class DaliLoader(Loader):
    """Batches out of a DALI pipeline fed with a source's files."""

    def __init__(
        self,
        source: EncodedSource,
        config: DataConfig,
        plan: BatchPlan,
        order: SampleOrder | MixedOrder,
        device: torch.device,
        augment: bool,
    ) -> None:
        super().__init__(plan, order)
        import_dali()
        self.source, self.config, self.device, self.augment = source, config, device, augment
        self.labels = torch.from_numpy(source.labels)
        self._ledger = SkipLedger(source, config.max_bad_files, self.skipped)
        self._on_gpu = device.type == "cuda"
        self._feed_depth = max(2, config.num_workers)
        self._pipeline: Any = None
        self._used_up_from: KeyStream | None = None  # where the finished pass began
        self._suspects: frozenset[int] = frozenset()

    def _read(self, keys: KeyStream) -> Generator[Batch, None, None]:
        if self._pipeline is not None and self._used_up_from == keys:
            self._pipeline.reset()  # another evaluation pass: keep its processes
        else:
            self._build(keys)
        begun_at, started = 0, keys  # where the pipeline's own count of micro-batches begins
        failures = 0  # in a row
        self._used_up_from = None
        for number, (wanted, epochs) in enumerate(keys):
            result = self._run(number - begun_at)
            failures = failures % _PATIENCE + 1 if result is None else 0
            if result is None and self._on_gpu:
                # Neither is said which file it was. So let PIL decode all that may be in the pipeline, and begin anew
                # from here; if that fails, too, the files are not to blame.
                begun_at, started = number, keys.after(number)
                self._suspects |= self._in_flight(started)
                self._build(started)
                if (result := self._run(0)) is None:
                    raise RuntimeError(
                        "DALI failed again with files that PIL had decoded; --data.loader torch does without DALI"
                    )
            elif result is None:
                # On a CPU it goes on with the next batch, so this one alone is read without it.
                result = self._read_here((wanted, epochs))
                if failures == _PATIENCE:  # an older DALI that does not
                    begun_at, started = number + 1, keys.after(number + 1)
                    self._build(started)
            images, samples = result
            self._ledger.compare(wanted, samples)
            columns = self.labels[samples], torch.from_numpy(samples), torch.from_numpy(epochs)
            yield Batch(images, *(column.to(self.device, non_blocking=True) for column in columns))
        with suppress(StopIteration):
            self._pipeline.run()  # DALI starts over only after it has run into the end
        self._used_up_from = started

    def _run(self, number: int) -> tuple[torch.Tensor, np.ndarray] | None:
        """Images and samples of the pipeline's micro-batch `number`; None if it failed."""
        try:
            images, received = self._pipeline.run()
        except RuntimeError as failure:
            _LOG.warning("DALI could not decode a file (%s); PIL judges its batch", _last_line(failure))
            return None
        numbers = np.array(received.as_tensor())
        if self._on_gpu:
            return self._to_device(images), numbers.reshape(-1)
        if numbers[0, -2] != number:
            _LOG.warning("DALI gave batch %d for %d; PIL decodes it", numbers[0, -2], number)
            return None
        return self._cut(images, numbers), np.ascontiguousarray(numbers[:, -1])

    def _read_here(self, key: Key) -> tuple[torch.Tensor, np.ndarray]:
        config = self.config
        slot = np.empty((len(key[0]), config.channels, *height_width(config.image_size)), np.uint8)
        _, samples, _ = Reader(self.source, config, self.order.seed, self.augment)(key, slot)
        return torch.from_numpy(slot), samples

    def _to_device(self, images: Any) -> torch.Tensor:
        from nvidia.dali.plugin.pytorch import feed_ndarray

        tensor = images.as_tensor()
        result = torch.empty(tuple(tensor.shape()), dtype=torch.uint8, device=self.device)
        stream = torch.cuda.current_stream(self.device)
        feed_ndarray(tensor, result, cuda_stream=stream)  # device to device, asynchronous in this stream
        return result

    def _cut(self, pictures: Any, numbers: np.ndarray) -> torch.Tensor:
        geometry = Geometry(numbers[:, :4], numbers[:, 4:6], numbers[:, 6:8], numbers[:, 8])
        decoded = [np.asarray(pictures[row]) for row in range(len(pictures))]  # DALI's memory, not copied
        return cut(decoded, geometry, self.config.image_size, self.config.channels)

    def _build(self, keys: KeyStream) -> None:
        self.close()
        config, decoder, device_id = self.config, dict[str, Any](device="cpu"), None
        if self._on_gpu:
            decoder = {"device": "mixed", "hw_decoder_load": config.hw_decoder_load}
            device_id = torch.cuda.current_device() if self.device.index is None else self.device.index
        feed = _Feed(self.source, config, keys, self.augment, self._suspects, self._on_gpu)
        self._pipeline = _define_pipeline(feed, self._feed_depth, decoder)(
            batch_size=self.plan.batch_size,
            num_threads=max(1, config.num_workers),
            device_id=device_id,
            prefetch_queue_depth=_PIPELINE_DEPTH,
            py_num_workers=max(1, config.num_workers),
            # A process cannot be forked once CUDA is in use.
            py_start_method="spawn" if self._on_gpu or torch.cuda.is_initialized() else "fork",
        )
        self._pipeline.build()

    def _in_flight(self, keys: KeyStream) -> frozenset[int]:
        """Samples of all batches that DALI may have begun when the first of `keys` failed."""
        begun = islice(keys, self._feed_depth + 2 * _PIPELINE_DEPTH)
        return frozenset(np.concatenate([samples for samples, _ in begun]).tolist())

    def close(self) -> None:
        self._pipeline = self._used_up_from = None  # its processes end with it


def _define_pipeline(feed: "_Feed", feed_depth: int, decoder: dict[str, Any]) -> Any:
    """The pipeline of the module's docstring: what makes one, given batch size, threads and device."""
    dali = import_dali()
    fn, types, config = dali.fn, dali.types, feed.config
    color = types.GRAY if config.channels == 1 and feed.dali_cuts else types.RGB
    feed_options: dict[str, Any] = {"parallel": False}
    if config.num_workers:
        feed_options = {"parallel": True, "prefetch_queue_depth": feed_depth}

    @dali.pipeline_def
    def pipeline() -> Any:
        encoded, corner, extent, numbers, *cuts = fn.external_source(
            feed, num_outputs=feed.num_outputs, batch=True, **feed_options
        )
        images = fn.decoders.image_slice(
            encoded, start=corner, shape=extent, axes=(0, 1), output_type=color, adjust_orientation=False, **decoder
        )
        if not feed.dali_cuts:
            return images, numbers
        size, mirror, *anchor = cuts
        images = fn.resize(images, size=size, interp_type=types.INTERP_CUBIC)
        if feed.needs_window:
            images = fn.slice(
                images,
                start=anchor[0],
                shape=height_width(config.image_size),
                axes=(0, 1),
                out_of_bounds_policy="pad",
                fill_values=0,
            )
        mean, std = [0.0] * config.channels, [1.0] * config.channels
        images = fn.crop_mirror_normalize(
            images, dtype=types.UINT8, output_layout="CHW", mirror=mirror, mean=mean, std=std
        )
        return images, numbers

    return pipeline


@dataclass
class _Feed:
    """What DALI calls, in its own processes: the number of a micro-batch in, bytes and numbers out.

    Attributes:
        keys: the stream of micro-batches.
        suspects: samples that PIL must decode, because DALI failed with one of them.
        dali_cuts: whether DALI does all (on a GPU), or only decodes.
    """

    source: EncodedSource
    config: DataConfig
    keys: KeyStream
    augment: bool
    suspects: frozenset[int]
    dali_cuts: bool

    @property
    def needs_window(self) -> bool:
        """Whether the resized part can be larger than the image wanted; a resized_crop never is."""
        return not (self.augment and self.config.augment == "resized_crop")

    @property
    def num_outputs(self) -> int:
        return 4 + self.dali_cuts * (2 + self.needs_window)

    def __call__(self, number: int) -> tuple[Any, ...]:
        """Files, corner and extent of the parts to decode, numbers; what DALI needs to cut: size, mirror, anchor.

        The numbers are the samples, (B,), or (B, 11) if DALI does not cut: a `Geometry` within the parts, `number`,
        the samples.
        """
        if multiprocessing.parent_process() is not None:
            torch.set_num_threads(1)  # a forked process cannot use its parent's OpenMP threads: it would hang
            gc.enable()  # in its parent it is off while a run trains
        if not self.keys.has(number):
            raise StopIteration
        wanted, epochs = self.keys[number]
        limit = self.config.max_bad_files
        found = [first_readable(int(index), len(self.source), self._read, limit) for index in wanted]
        samples = np.array([index for index, _ in found], np.int64)
        files = [plain_file(np.zeros((1, 1, 1), np.uint8)) if file is None else file for _, file in found]
        sizes = np.array([(height, width) for _, height, width in files], np.int64)
        geometry = plan_geometry(self.config, self.augment, self.keys.order.seed, samples, epochs, sizes)
        encoded = [np.frombuffer(content, np.uint8) for content, _, _ in files]
        if self.dali_cuts:
            corner, extent, numbers = geometry.box[:, :2], geometry.box[:, 2:], samples
            cuts = [geometry.size.astype(np.float32), geometry.mirror.astype(np.int32)]
            cuts += [geometry.anchor.astype(np.int32)] * self.needs_window
        else:
            corner, extent = needed_part(geometry, sizes)
            geometry.box[:, :2] -= corner
            row = geometry.box, geometry.size, geometry.anchor, geometry.mirror, np.full(len(samples), number), samples
            numbers = np.column_stack(row)
            cuts = []
        return encoded, corner.astype(np.int32), extent.astype(np.int32), numbers, *cuts

    def _read(self, index: int) -> tuple[bytes, int, int]:
        content, where = self.source.read(index), self.source.where(index)
        return plain_file(decode(content, where)) if index in self.suspects else checked_file(content, where)


def _last_line(error: Exception) -> str:
    """DALI's messages are pages long; what happened stands in the line with the C++ error."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "no longer valid" not in line), type(error).__name__)
