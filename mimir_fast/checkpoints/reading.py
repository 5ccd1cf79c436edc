"""What is in a checkpoint, whether it is whole, and which one of a run to take."""

import errno
import json
import re
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from mimir_fast.checkpoints.checksums import block_checksums, crc32, is_intact
from mimir_fast.checkpoints.durable import pointed_at

FORMAT = "mimir_fast.checkpoint"
BEST = "best"  # stands for the best checkpoint of a run, beside it
VERSION = 3  # 2 had one checksum a file and none of meta.json, 1 sizes only

# Files that a checkpoint has: of ours, of torch.distributed.checkpoint, of transformers' Trainer and of accelerate.
_OF_A_CHECKPOINT = ("meta.json", ".metadata", "trainer_state.json", "optimizer.pt", "optimizer.bin")

T = TypeVar("T")

# Without a process group dcp warns, also in its thread, that it works in a single process: as it was asked to.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class WeightsError(ValueError):
    """Weights that cannot be used; the message says why and what to do."""


class CheckpointError(WeightsError):
    """A checkpoint of ours that cannot be used."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint that is not what was written: cut, changed or incomplete. An older one may be whole."""


class UnreadableCheckpoint(CheckpointError):
    """The storage does not give it now; whether it is whole, nobody knows."""


def read_meta(folder: Path) -> dict[str, Any]:
    """The meta data of a checkpoint, after checking that they are as written and that all files are there in full.

    Raises:
        CheckpointError: not a checkpoint of ours.
        DamagedCheckpoint: changed or truncated, or files are missing.
        UnreadableCheckpoint: the storage fails, also when asked again.
    """
    path = folder / "meta.json"
    if _patiently(path, lambda: _size(path)) is None:
        raise CheckpointError(f"{folder} is not a mimir_fast checkpoint: it has no meta.json")
    content = _patiently(path, path.read_bytes)
    try:
        meta = json.loads(content)
    except ValueError as error:
        raise DamagedCheckpoint(f"{path} is damaged ({error}): use an older checkpoint") from error
    changed = DamagedCheckpoint(f"{path} was changed after it was written: use an older checkpoint of the same run")
    if isinstance(meta, dict) and "crc32" in meta and not is_intact(meta):
        raise changed  # before its words are believed
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise CheckpointError(f"{folder} is not a mimir_fast checkpoint: its meta.json is not of ours")
    version = meta.get("version")
    if isinstance(version, int) and version > VERSION:
        raise CheckpointError(f"{folder} was written by a newer mimir_fast (format {version}): upgrade")
    if version not in (1, 2) and "crc32" not in meta:
        raise changed
    if not isinstance(meta.get("files"), dict):
        raise DamagedCheckpoint(f"{path} names no files: use an older checkpoint of the same run")
    for name, (size, _) in described_files(meta).items():
        found = _patiently(folder / name, partial(_size, folder / name))
        if found != size:
            state = "missing" if found is None else f"truncated ({found} of {size} bytes)"
            raise DamagedCheckpoint(f"{folder / name} is {state}: use an older checkpoint of the same run")
    return meta


def described_files(meta: dict[str, Any]) -> dict[str, tuple[int, str | list[str] | None]]:
    """Name → (size in bytes, CRC-32 of each block; older versions wrote one of the whole file, or None)."""
    files = meta["files"].items()
    return {n: (f, None) if isinstance(f, int) else (f["size"], f["crc32"]) for n, f in files}


def verify(folder: Path, share: slice = slice(None)) -> None:
    """Compare every byte with the checksums (two cores read 7 GB/s); `share` takes a part of the files, so that ranks
    can divide the work.

    Raises:
        CheckpointError: as `read_meta`.
        DamagedCheckpoint: other content than was written.
        UnreadableCheckpoint: the storage fails, also when asked again.
    """
    for name, (_, written) in sorted(described_files(read_meta(folder)).items())[share]:
        if written is None:
            continue
        path = folder / name
        read = partial(block_checksums, threads=8) if isinstance(written, list) else crc32
        found = _patiently(path, partial(read, path))
        if found != written:
            raise DamagedCheckpoint(
                f"{path} was changed after it was written (its CRC-32 is another): use an older checkpoint of the same "
                "run"
            )


def _patiently(path: Path, read: Callable[[], T]) -> T:
    """What `read` returns. Storage that fails for a moment (a stale NFS handle, a mount) is asked again."""
    pauses = [0.5, 2.0, 5.0]
    while True:
        try:
            return read()
        except FileNotFoundError as error:
            raise DamagedCheckpoint(f"{path} is missing: use an older checkpoint of the same run") from error
        except OSError as error:
            if not pauses or error.errno in (errno.EACCES, errno.EPERM):
                raise UnreadableCheckpoint(f"{path} cannot be read ({error.strerror or error})") from error
            time.sleep(pauses.pop(0))


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def saved_tensors(folder: Path) -> dict[str, Any]:
    """Name → torch.distributed.checkpoint's description (`size`, `properties.dtype`) of every tensor.

    Raises:
        DamagedCheckpoint: the files cannot be read, or do not cover a tensor.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    try:
        found: dict[str, Any] = dict(HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata)
    except Exception as error:  # dcp and safetensors raise many types for a damaged file
        raise DamagedCheckpoint(
            f"{folder} cannot be read ({error}): use an older checkpoint of the same run"
        ) from error
    for name, info in found.items():
        covered, wanted = sum(chunk.sizes.numel() for chunk in info.chunks), info.size.numel()
        if covered != wanted:
            raise DamagedCheckpoint(
                f"{folder} holds {covered} of the {wanted} numbers of {name}: files of other ranks are missing, as "
                "when each host wrote into its own folder; put all files into one folder, or use an older checkpoint"
            )
    return found


def read_tensors(folder: Path, *prefixes: str) -> dict[str, Tensor]:
    """Whole CPU tensors of a checkpoint, after comparing every byte with the checksums; works outside of any run.

    Args:
        prefixes: only those whose names start so, without it (default "model/"); a later prefix wins.

    Raises:
        CheckpointError: not a checkpoint of ours, or damaged.
    """
    verify(folder)
    saved = saved_tensors(folder)
    found = {prefix: [name for name in saved if name.startswith(prefix)] for prefix in prefixes or ("model/",)}
    wanted = sorted({name for names in found.values() for name in names})
    tensors = {n: torch.empty(saved[n].size, dtype=saved[n].properties.dtype) for n in wanted}
    _read_into(folder, tensors, no_dist=True)
    return {name.removeprefix(prefix): tensors[name] for prefix, names in found.items() for name in names}


def load_checkpoint(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` in place; each may be laid out over ranks otherwise than when it was saved. Collective.

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
    _read_into(folder, tensors, no_dist=not torch.distributed.is_initialized())


def _read_into(folder: Path, tensors: dict[str, Tensor], *, no_dist: bool) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    try:
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=no_dist)
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        raise DamagedCheckpoint(f"{folder} cannot be read ({root_cause(error)}): use an older checkpoint") from error


def root_cause(error: BaseException | None) -> str:
    """What the operating system said, dug out of what torch.distributed.checkpoint wrapped it in.

    Raises:
        SystemExit, KeyboardInterrupt: that is what it wrapped. It catches even these, so a process that was asked to
            leave would go on to call its checkpoint damaged.
    """
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
        if isinstance(error, SystemExit | KeyboardInterrupt):
            raise error
    return f"{type(error).__name__}: {error}" if error is not None else ""


def step_of(folder: Path) -> int:
    """The optimiser step in a step checkpoint's name."""
    return int(folder.name.removeprefix("step-"))


def checkpoints_of(run: Path) -> list[Path]:
    """The whole step checkpoints of a run folder, oldest first."""
    found: Iterable[Path] = (run / "checkpoints").glob("step-*")
    return sorted((p for p in found if re.fullmatch(r"step-\d+", p.name) and p.is_dir()), key=step_of)


def refuse_checkpoints(folder: Path) -> None:
    """Return for a folder into which something else may be written.

    Raises:
        FileExistsError: it is a checkpoint of ours, of torch.distributed.checkpoint or of a Hugging Face trainer, or
            the folder of a run's checkpoints.
    """
    what = "is a checkpoint" if any((folder / name).exists() for name in _OF_A_CHECKPOINT) else ""
    if not what and folder.name == "checkpoints" and checkpoints_of(folder.parent):
        what = "holds the checkpoints of a run"
    if what:
        raise FileExistsError(f"{folder} {what}, which another file would damage: choose another --output")


def follow_best(path: Path) -> Path:
    """The checkpoint that `checkpoints/best` stands for where that is a text file; any other path as it is.

    Raises:
        UnreadableCheckpoint: the storage does not say, also when asked again.
    """
    target = _patiently(path, lambda: pointed_at(path) if path.is_file() else None) if path.name == BEST else None
    return target or path


def resolve_checkpoint(path: Path, which: Literal["auto", "last", "best"] = "auto") -> Path:
    """A checkpoint folder itself, or what `best` stands for; of a run folder the newest one, the best one, or the best
    where it was kept (auto).

    Raises:
        CheckpointError: there is none, or a checkpoint folder was given and another one asked for.
    """
    path = follow_best(path)
    if (path / "meta.json").is_file():
        if which != "auto":
            raise CheckpointError(f"{path} is one checkpoint: give the run's folder to choose its {which} one")
        return path
    best = follow_best(path / "checkpoints" / BEST)
    if which != "last" and (best / "meta.json").is_file():
        return best
    if which == "best":
        raise CheckpointError(f"{path} kept no best checkpoint (a probe chooses it): take the last one")
    found = checkpoints_of(path)
    if not found:
        raise CheckpointError(f"no checkpoint in {path}: wanted a run folder with checkpoints/step-…, or one of these")
    return found[-1]
