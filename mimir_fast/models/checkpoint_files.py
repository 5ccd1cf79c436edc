"""Reading our own checkpoints; mimir_fast.training.checkpoint writes them and says what is in them.

Kept here, below training, because models are built from checkpoints by people who train nothing.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

FORMAT = "mimir_fast.checkpoint"
VERSION = 1


class WeightsError(ValueError):
    """Weights that cannot be used; the message says why and what to do."""


class CheckpointError(WeightsError):
    """A checkpoint of ours that cannot be used."""


def read_meta(folder: Path) -> dict[str, Any]:
    """The meta data of a checkpoint, after checking that all its files are there in full.

    Raises:
        CheckpointError: not a checkpoint of ours, or truncated.
    """
    path = folder / "meta.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a mimir_fast checkpoint: it has no meta.json")
    try:
        meta = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}): use an older checkpoint") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise CheckpointError(f"{folder} is not a mimir_fast checkpoint: its meta.json is not of ours")
    if meta["version"] > VERSION:
        raise CheckpointError(f"{folder} was written by a newer mimir_fast (format {meta['version']}): upgrade")
    for name, size in meta["files"].items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            state = "missing" if found is None else f"truncated ({found} of {size} bytes)"
            raise CheckpointError(f"{folder / name} is {state}: use an older checkpoint of the same run")
    return meta


def saved_tensors(folder: Path) -> dict[str, Any]:
    """Name → torch.distributed.checkpoint's description (`size`, `properties.dtype`) of every tensor.

    Raises:
        CheckpointError: the files cannot be read.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    try:
        return dict(HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata)
    except Exception as error:  # dcp and safetensors raise many types for a damaged file
        raise CheckpointError(f"{folder} cannot be read ({error}): use an older checkpoint of the same run") from error


def read_tensors(folder: Path, prefix: str = "model/") -> dict[str, Tensor]:
    """Whole CPU tensors of a checkpoint whose names start with `prefix`, without it; works outside of any run.

    Raises:
        CheckpointError: not a checkpoint of ours, or damaged.
    """
    read_meta(folder)
    found = {n: info for n, info in saved_tensors(folder).items() if n.startswith(prefix)}
    tensors = {n: torch.empty(info.size, dtype=info.properties.dtype) for n, info in found.items()}
    read_into(folder, tensors, no_dist=True)
    return {n.removeprefix(prefix): t for n, t in tensors.items()}


def read_into(folder: Path, tensors: dict[str, Tensor], *, no_dist: bool) -> None:
    """Fill `tensors` in place; collective over all ranks unless `no_dist`.

    Raises:
        CheckpointError: the files cannot be read.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    try:
        with quietly_alone():
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=no_dist)
    except (Exception, CheckpointException) as error:
        raise CheckpointError(f"{folder} cannot be read ({root_cause(error)}): use an older checkpoint") from error


@contextmanager
def quietly_alone() -> Iterator[None]:
    """Without a process group dcp warns that it works in a single process, which is what we asked it to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def root_cause(error: BaseException | None) -> str:
    """What the operating system said, dug out of what torch.distributed.checkpoint wrapped it in."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return f"{type(error).__name__}: {error}" if error is not None else ""


def checkpoints_of(run: Path) -> list[Path]:
    """The whole step checkpoints of a run folder, oldest first."""
    return sorted(p for p in (run / "checkpoints").glob("step-*") if p.suffix != ".partial" and p.is_dir())


def resolve_checkpoint(path: Path, which: Literal["auto", "last", "best"] = "auto") -> Path:
    """A checkpoint folder itself; of a run folder the newest one, the best one, or the best where it was kept (auto).

    Raises:
        CheckpointError: there is none, or a checkpoint folder was given and another one asked for.
    """
    if (path / "meta.json").is_file():
        if which != "auto":
            raise CheckpointError(f"{path} is one checkpoint: give the run's folder to choose its {which} one")
        return path
    best = path / "checkpoints" / "best"
    if which != "last" and (best / "meta.json").is_file():
        return best
    if which == "best":
        raise CheckpointError(f"{path} kept no best checkpoint (a probe chooses it): take the last one")
    found = checkpoints_of(path)
    if not found:
        raise CheckpointError(f"no checkpoint in {path}: wanted a run folder with checkpoints/step-…, or one of these")
    return found[-1]
