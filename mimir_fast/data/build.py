"""From a configuration to a loader: source, order, plan, and the loader that suits them."""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch

from mimir_fast.data.config import DataConfig
from mimir_fast.data.crop import cut
from mimir_fast.data.geometry import plan_geometry
from mimir_fast.data.identity import DataIdentity
from mimir_fast.data.loaders.base import Loader
from mimir_fast.data.loaders.dali import DaliLoader, import_dali
from mimir_fast.data.loaders.raw import RawLoader
from mimir_fast.data.loaders.resident import ResidentLoader
from mimir_fast.data.loaders.skip import SkipLedger, first_readable
from mimir_fast.data.loaders.workers import WorkerLoader
from mimir_fast.data.order import BatchPlan, MixedOrder, SampleOrder
from mimir_fast.data.sources import ArraySource, EncodedSource, ImageSource, RawSource, part_of, whole_source
from mimir_fast.data.sources.edm import MixedSource, open_npz
from mimir_fast.sizes import area, height_width, said, typed

_LOG = logging.getLogger(__name__)


def build_loader(
    config: DataConfig,
    *,
    split: str,
    batch_size: int,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    accum_iter: int = 1,
    global_batch: int | None = None,
    shuffle: bool | None = None,
    augment: bool | None = None,
) -> Loader:
    """A loader of one split for one rank.

    Args:
        split: "train" or "test" ("val" is another name of it).
        batch_size: samples in a rank's micro-batch; the global batch is batch_size * world_size * accum_iter.
        device: where the batches are wanted.
        seed: of order and augmentation.
        accum_iter: micro-batches of an optimiser step; without effect on an evaluation pass.
        global_batch: of all ranks and accumulation steps, where they do not divide it; `batch_size` is rounded up then.
        shuffle: an endless shuffled stream (True) or one pass in order (False); the default is True for "train".
        augment: crop and mirror as configured; the default is True for "train".
    Raises:
        ValueError, MissingDataError, ImportError: see `build_source` and the loaders; the message names the fix.
    """
    device = torch.device(device)
    shuffle = split == "train" if shuffle is None else shuffle
    augment = split == "train" if augment is None else augment
    whole = whole_source(config, split)
    source = part_of(whole, config, split)
    block = source.block if config.shuffle_block is None else config.shuffle_block
    order: SampleOrder | MixedOrder = SampleOrder(len(source), seed, shuffle, block=block, window=source.window)
    if config.generated is not None and split == "train" and shuffle:
        generated = open_npz(config.generated, source.num_classes)
        order = MixedOrder(len(source), len(generated), config.generated_ratio, seed, block, source.window)
        source = MixedSource(source, generated)
    total, stop = (global_batch, None) if shuffle else (None, len(source))
    plan = BatchPlan(batch_size, rank, world_size, accum_iter if shuffle else 1, stop=stop, total=total)

    loader = _build(source, config, plan, order, device, augment)
    loader.identity = DataIdentity(whole)
    return loader


def _build(
    source: ImageSource, config: DataConfig, plan: BatchPlan, order: SampleOrder | MixedOrder, device: torch.device,
    augment: bool,
) -> Loader:  # fmt: skip
    kind = choose_loader(source, config, device, augment)
    _check_size(source, config, kind)
    if kind == "resident":
        margin = _margin(source, config, augment)
        images, readable = decoded(source, config, margin)
        labels = torch.from_numpy(source.labels)
        loader = ResidentLoader(
            torch.from_numpy(images), labels, config, plan, order, device, augment, margin or 0, readable
        )
        if readable is not None:
            SkipLedger(source, config.max_bad_files, loader.skipped).compare(np.arange(len(readable)), readable)
        return loader
    if kind == "dali":
        if not isinstance(source, EncodedSource):
            raise ValueError(
                f"loader 'dali' decodes image files, but {source.name} holds decoded arrays; use --data.loader resident"
            )
        return DaliLoader(source, config, plan, order, device, augment)
    if kind == "raw":
        if not isinstance(source, RawSource):
            raise ValueError(
                f"loader 'raw' reads prepared images, but {source.name} is not prepared: python -m "
                "mimir_fast.data.prepare writes them for --data.source raw"
            )
        return RawLoader(source, config, plan, order, device, augment)
    return WorkerLoader(source, config, plan, order, device, augment)


def choose_loader(source: ImageSource, config: DataConfig, device: torch.device, augment: bool) -> str:
    """The configured loader, or what `auto` stands for: see `DataConfig.loader`."""
    if config.loader != "auto":
        return config.loader
    gibibytes = len(source) * config.channels * area(config.image_size) / 2**30
    fixed = source.image_size == config.image_size and not (augment and config.augment == "resized_crop")
    if fixed and gibibytes <= config.resident_gib:
        return "resident"
    if isinstance(source, RawSource):
        return "raw"
    if device.type != "cuda" or not isinstance(source, EncodedSource):
        return "torch"
    try:
        import_dali()
    except ImportError as error:
        _LOG.warning("decoding on the CPU: %s", error)
        return "torch"
    return "dali"


def _margin(source: ImageSource, config: DataConfig, augment: bool) -> int | None:
    """Pixels that `pad_crop` may shift in from outside of the central window; None where it does not crop so.

    An image of another shape than the window's has pixels there, which the other loaders bring in.
    """
    if not augment or config.augment != "pad_crop":
        return None
    return 0 if source.image_size == config.image_size else config.crop_padding


def decoded(source: ImageSource, config: DataConfig, margin: int | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """All images, (N, C, H, W) uint8, and for encoded ones the sample that stands in for each, (N,) int64.

    Encoded images of another size than `config.image_size` are resized and centre-cropped: as for evaluation, or, with
    a `margin`, as `pad_crop` does before it shifts, and with so many pixels around the result.
    """
    if isinstance(source, ArraySource):
        return np.ascontiguousarray(source.images), None
    if isinstance(source, MixedSource):
        images, readable = decoded(source.real, config, margin)
        if readable is not None:
            readable = np.concatenate([readable, np.arange(len(images), len(source))])
        if images.shape[1] != source.generated.images.shape[1]:
            raise ValueError(
                f"the generated images have {source.generated.images.shape[1]} channels, those of {source.real.name} "
                f"{images.shape[1]}; mix images of one kind, or use --data.loader torch, which converts each"
            )
        return np.concatenate([images, source.generated.images]), readable
    height, width = (side + 2 * (margin or 0) for side in height_width(config.image_size))
    plain = replace(config, augment="none" if margin is None else "pad_crop", crop_padding=0, flip=False)
    images = np.empty((len(source), config.channels, height, width), np.uint8)
    readable = np.empty(len(source), np.int64)

    def fill(index: int) -> None:
        readable[index], pixels = first_readable(index, len(source), source.pixels, config.max_bad_files)
        if pixels is not None:
            one, sizes = np.array([index]), np.array([pixels.shape[:2]])
            geometry = plan_geometry(plain, True, 0, one, one, sizes)
            geometry.anchor -= margin or 0
            images[index] = cut([pixels], geometry, (height, width), config.channels)[0].numpy()

    with ThreadPoolExecutor(max(1, config.num_workers)) as pool:  # PIL decodes outside the interpreter's lock
        list(pool.map(fill, range(len(source))))
    return images, readable


def _check_size(source: ImageSource, config: DataConfig, kind: str) -> None:
    """Arrays of another size than the model's are more likely a slip than a wish to resize."""
    resizes = config.augment == "resized_crop" and kind != "resident"
    own = source.image_size
    if isinstance(source, (EncodedSource, RawSource)) or resizes or own is None or own == config.image_size:
        return
    raise ValueError(
        f"{source.name} has images of {said(own)} pixels but image_size is {typed(config.image_size)}; "
        f"give --data.image_size {typed(own)}, or resize with --data.augment resized_crop "
        "--data.loader torch"
    )
