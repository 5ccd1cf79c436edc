"""NVIDIA DALI: JPEG decoding, cropping and resizing as one pipeline, on the GPU's decoders or on the CPU.

Processes read the files and give DALI the bytes with the numbers of mimir_fast.data.geometry, so DALI draws nothing
and only the crop is decoded:

    bytes, box --decoders.image_slice--> part --resize--> window --mirror, to CHW--> uint8 on the device

On a GPU `device="mixed"` shares the files between the hardware JPEG decoder and nvJPEG's CUDA one, and a batch never
visits the host. On a machine without one the same pipeline runs with `device_id=None`.
"""

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
from mimir_fast.data.decode import checked_file, decode, plain_file
from mimir_fast.data.geometry import plan_geometry
from mimir_fast.data.loaders.base import Loader
from mimir_fast.data.loaders.skip import SkipLedger, first_readable
from mimir_fast.data.order import BatchPlan, KeyStream, MixedOrder, SampleOrder
from mimir_fast.data.sources.base import EncodedSource

_PIPELINE_DEPTH = 2
_LOG = logging.getLogger(__name__)


def import_dali() -> Any:
    """`nvidia.dali`, if it is the real one.

    Raises:
        ImportError: absent, or the placeholder of the same name; the message says what to install.
    """
    advice = (
        "install NVIDIA's wheel by its full name: pip install nvidia-dali-cuda130 (or nvidia-dali-cuda120); the "
        "package called nvidia-dali is an empty placeholder. Without DALI use --data.loader torch"
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
        self._feed_depth = max(2, config.num_workers)
        self._pipeline: Any = None
        self._used_up_from: KeyStream | None = None  # where the finished pass began
        self._suspects: frozenset[int] = frozenset()

    def _read(self, keys: KeyStream) -> Generator[Batch, None, None]:
        if self._pipeline is not None and self._used_up_from == keys:
            self._pipeline.reset()  # another evaluation pass: keep its processes
        else:
            self._build(keys)
        started_at = keys
        self._used_up_from = None
        for number, (wanted, epochs) in enumerate(keys):
            try:
                images, received = self._pipeline.run()
            except RuntimeError as failure:
                # DALI neither says which file it was nor goes on. So let PIL decode all that may be in the pipeline,
                # and begin anew from here; if that fails, too, the files are not to blame.
                started_at = keys.after(number)
                self._suspects |= self._in_flight(started_at)
                _LOG.warning("DALI stopped (%s); PIL looks at the files it was working on", _last_line(failure))
                self._build(started_at)
                try:
                    images, received = self._pipeline.run()
                except RuntimeError as error:
                    error.add_note(
                        "it failed again with files that PIL had decoded; --data.loader torch does without DALI"
                    )
                    raise
            samples = np.array(received.as_tensor()).reshape(-1)
            self._ledger.compare(wanted, samples)
            yield self._to_batch(images, torch.from_numpy(samples), torch.from_numpy(epochs))
        with suppress(StopIteration):
            self._pipeline.run()  # DALI starts over only after it has run into the end
        self._used_up_from = started_at

    def _to_batch(self, images: Any, samples: torch.Tensor, epochs: torch.Tensor) -> Batch:
        from nvidia.dali.plugin.pytorch import feed_ndarray

        tensor = images.as_tensor()
        result = torch.empty(tuple(tensor.shape()), dtype=torch.uint8, device=self.device)
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        feed_ndarray(tensor, result, cuda_stream=stream)  # device to device, asynchronous in this stream
        labels, samples, epochs = (
            column.to(self.device, non_blocking=True) for column in (self.labels[samples], samples, epochs)
        )
        return Batch(result, labels, samples, epochs)

    def _build(self, keys: KeyStream) -> None:
        self.close()
        config, on_gpu = self.config, self.device.type == "cuda"
        feed = _Feed(self.source, config, keys, self.augment, self._suspects)
        device_id = None
        if on_gpu:
            device_id = torch.cuda.current_device() if self.device.index is None else self.device.index
        self._pipeline = _define_pipeline(feed, self._feed_depth, on_gpu)(
            batch_size=self.plan.batch_size,
            num_threads=max(1, config.num_workers),
            device_id=device_id,
            prefetch_queue_depth=_PIPELINE_DEPTH,
            py_num_workers=max(1, config.num_workers),
            # A process cannot be forked once CUDA is in use.
            py_start_method="spawn" if on_gpu or torch.cuda.is_initialized() else "fork",
        )
        self._pipeline.build()

    def _in_flight(self, keys: KeyStream) -> frozenset[int]:
        """Samples of all batches that DALI may have begun when the first of `keys` failed."""
        begun = islice(keys, self._feed_depth + 2 * _PIPELINE_DEPTH)
        return frozenset(np.concatenate([samples for samples, _ in begun]).tolist())

    def close(self) -> None:
        self._pipeline = self._used_up_from = None  # its processes end with it


def _define_pipeline(feed: "_Feed", feed_depth: int, on_gpu: bool) -> Any:
    """The pipeline of the module's docstring: what makes one, given batch size, threads and device."""
    dali = import_dali()
    fn, types, config, side = dali.fn, dali.types, feed.config, feed.config.image_size
    decoder_options: dict[str, Any] = {"device": "cpu"}
    if on_gpu:
        decoder_options = {"device": "mixed", "hw_decoder_load": config.hw_decoder_load}
    feed_options: dict[str, Any] = {"parallel": False}
    if config.num_workers:
        feed_options = {"parallel": True, "prefetch_queue_depth": feed_depth}

    @dali.pipeline_def
    def pipeline() -> Any:
        encoded, corner, extent, size, mirror, samples, *anchor = fn.external_source(
            feed, num_outputs=7 if feed.needs_window else 6, batch=True, **feed_options
        )
        images = fn.decoders.image_slice(
            encoded,
            start=corner,
            shape=extent,
            axes=(0, 1),
            output_type=types.RGB if config.channels == 3 else types.GRAY,
            adjust_orientation=False,
            **decoder_options,
        )
        images = fn.resize(images, size=size, interp_type=types.INTERP_CUBIC)
        if feed.needs_window:
            images = fn.slice(
                images, start=anchor[0], shape=(side, side), axes=(0, 1), out_of_bounds_policy="pad", fill_values=0
            )
        mean, std = [0.0] * config.channels, [1.0] * config.channels
        images = fn.crop_mirror_normalize(
            images, dtype=types.UINT8, output_layout="CHW", mirror=mirror, mean=mean, std=std
        )
        return images, samples

    return pipeline


@dataclass
class _Feed:
    """What DALI calls, in its own processes: the number of a micro-batch in, bytes and numbers out.

    Attributes:
        keys: the stream of micro-batches.
        suspects: samples that PIL must decode, because DALI failed with one of them.
    """

    source: EncodedSource
    config: DataConfig
    keys: KeyStream
    augment: bool
    suspects: frozenset[int]

    @property
    def needs_window(self) -> bool:
        """Whether the resized part can be larger than the image wanted; a resized_crop never is."""
        return not (self.augment and self.config.augment == "resized_crop")

    def __call__(self, number: int) -> tuple[list[np.ndarray], ...]:
        if multiprocessing.parent_process() is not None:
            torch.set_num_threads(1)  # a forked process cannot use its parent's OpenMP threads: it would hang
        if not self.keys.has(number):
            raise StopIteration
        wanted, epochs = self.keys[number]
        limit = self.config.max_bad_files
        found = [first_readable(int(index), len(self.source), self._read, limit) for index in wanted]
        samples = np.array([index for index, _ in found], np.int64)
        files = [plain_file(np.zeros((1, 1, 1), np.uint8)) if file is None else file for _, file in found]
        sizes = np.array([(height, width) for _, height, width in files], np.int64)
        geometry = plan_geometry(self.config, self.augment, self.keys.order.seed, samples, epochs, sizes)
        box = geometry.box.astype(np.int32)
        columns: list[Any] = [
            [np.frombuffer(content, np.uint8) for content, _, _ in files],
            box[:, :2],
            box[:, 2:],
            geometry.size.astype(np.float32),
            geometry.mirror.astype(np.int32),
            samples,
        ]
        if self.needs_window:
            columns.append(geometry.anchor.astype(np.int32))
        return tuple([np.asarray(row) for row in column] for column in columns)

    def _read(self, index: int) -> tuple[bytes, int, int]:
        content, where = self.source.read(index), self.source.where(index)
        return plain_file(decode(content, where)) if index in self.suspects else checked_file(content, where)


def _last_line(error: Exception) -> str:
    """DALI's messages are pages long; what happened stands in the line with the C++ error."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "no longer valid" not in line), type(error).__name__)
