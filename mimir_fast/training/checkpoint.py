"""Checkpoints that survive any kill and load without unpickling code.

A checkpoint is a folder: one safetensors file per rank, written by torch.distributed.checkpoint (so it can be read back
on another number of ranks), and `meta.json`, written last, which names every file and its size. It is written aside as
`NAME.partial`, synced to disk and renamed: a folder without `.partial` is whole.

Tensor names: `model/<parameter>`, `ema/<parameter>`, `optimizer/<parameter>/<state>`.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from mimir_fast.models.checkpoint_files import (
    FORMAT,
    VERSION,
    CheckpointError,
    checkpoints_of,
    quietly_alone,
    read_into,
    read_meta,
    read_tensors,
    resolve_checkpoint,
    root_cause,
    saved_tensors,
)
from mimir_fast.models.flat_names import flat_parameters
from mimir_fast.training.distributed import agree
from mimir_fast.training.ema import Ema

__all__ = [
    "CheckpointError", "checkpoints_of", "keep_last", "load_checkpoint", "make_room_for_optimizer", "read_meta",
    "read_tensors", "resolve_checkpoint", "save_checkpoint", "training_tensors",
]  # fmt: skip


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write `tensors` and `meta` as the checkpoint `folder`; collective over all ranks.

    Raises:
        OSError: on every rank, when any of them could not write (disk full, say); an older `folder` is intact then.
    """
    partial = folder.with_name(folder.name + ".partial")
    main = not dist.is_initialized() or dist.get_rank() == 0
    if main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _barrier()
    error: BaseException | None = None
    try:
        writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
        with quietly_alone():
            dcp.save(tensors, storage_writer=writer, no_dist=not dist.is_initialized())
    except (Exception, CheckpointException) as failure:  # the latter is what dcp makes of a rank's, and no Exception
        error = failure
    if error is None and main:
        try:
            files = {path.name: path.stat().st_size for path in sorted(partial.glob("*.safetensors"))}
            info = {"format": FORMAT, "version": VERSION, **meta, "files": files}
            (partial / "meta.json").write_text(json.dumps(info, indent=1))
            for path in [*partial.iterdir(), partial]:
                _fsync(path)
            _replace(partial, folder)
        except OSError as failure:
            error = failure
    failed = agree(error is not None)
    if failed:
        if main:
            shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"could not write checkpoint {folder}: {root_cause(error) or 'another rank failed'}") from error


def load_checkpoint(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` in place; each may be laid out over ranks otherwise than when it was saved.

    Raises:
        CheckpointError: names or shapes differ, so it is of another architecture.
    """
    read_meta(folder)
    saved = {name: tuple(info.size) for name, info in saved_tensors(folder).items()}
    missing = sorted(set(tensors) - set(saved))
    reshaped = [n for n, t in tensors.items() if n in saved and tuple(t.shape) != saved[n]]
    if missing or reshaped:
        detail = [f"{n}: {saved[n]} in the file, {tuple(tensors[n].shape)} wanted" for n in reshaped[:3]]
        detail += [f"{n}: not in the file" for n in missing[:3]]
        raise CheckpointError(
            f"{folder} is of another architecture ({len(reshaped)} shapes differ, {len(missing)} names are missing): "
            f"{'; '.join(detail)}. Use the recipe and --model options it was trained with"
        )
    read_into(folder, tensors, no_dist=not dist.is_initialized())


def keep_last(run: Path, count: int) -> None:
    """Delete all but the newest `count` step checkpoints, and what interrupted saves left behind."""
    for old in checkpoints_of(run)[:-count]:
        # Renamed first: a kill in the middle of deleting must not leave half a checkpoint under a whole one's name.
        doomed = old.with_name(old.name + ".partial")
        old.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None) -> dict[str, Tensor]:
    """Every tensor of a training state by its checkpoint name."""
    tensors = {f"model/{name}": t.detach() for name, t in model.state_dict().items()}
    if ema is not None:
        tensors |= {f"ema/{name}": t for name, t in ema.state_dict().items()}
    for name, parameter in flat_parameters(model):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{name}/{key}"] = value
    return tensors


def make_room_for_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Create the empty optimiser state a checkpoint will be loaded into, as the checkpoint names it."""
    saved = saved_tensors(folder)
    for name, parameter in flat_parameters(model):
        prefix = f"optimizer/{name}/"
        for full_name in (n for n in saved if n.startswith(prefix)):
            info, key = saved[full_name], full_name.removeprefix(prefix)
            scalar = len(info.size) == 0
            # Adam's step counter is a scalar beside the parameter; fused versions want it on the same device.
            empty = torch.zeros((), dtype=info.properties.dtype, device=parameter.device)
            optimizer.state[parameter][key] = empty if scalar else torch.zeros_like(parameter)


def _replace(partial: Path, folder: Path) -> None:
    old = folder.with_name(folder.name + ".old.partial")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    _fsync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
