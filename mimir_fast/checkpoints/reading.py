"""What is in a checkpoint, whether it is whole, and which one of a run to take."""

import json
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mimir_fast.checkpoints.durable import crc32

FORMAT = "mimir_fast.checkpoint"
VERSION = 2  # 1 had sizes only

# Without a process group dcp warns, also in its thread, that it works in a single process: as it was asked to.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class WeightsError(ValueError):
    """Weights that cannot be used; the message says why and what to do."""


class CheckpointError(WeightsError):
    """A checkpoint of ours that cannot be used."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint that is not what was written: cut, changed or incomplete. An older one may be whole."""


def read_meta(folder: Path) -> dict[str, Any]:
    """The meta data of a checkpoint, after checking that all its files are there in full.

    Raises:
        CheckpointError: not a checkpoint of ours.
        DamagedCheckpoint: truncated, or files are missing.
    """
    path = folder / "meta.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a mimir_fast checkpoint: it has no meta.json")
    try:
        meta = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise DamagedCheckpoint(f"{path} is damaged ({error}): use an older checkpoint") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise CheckpointError(f"{folder} is not a mimir_fast checkpoint: its meta.json is not of ours")
    if meta["version"] > VERSION:
        raise CheckpointError(f"{folder} was written by a newer mimir_fast (format {meta['version']}): upgrade")
    for name, (size, _) in described_files(meta).items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != size:
            state = "missing" if found is None else f"truncated ({found} of {size} bytes)"
            raise DamagedCheckpoint(f"{folder / name} is {state}: use an older checkpoint of the same run")
    return meta


def described_files(meta: dict[str, Any]) -> dict[str, tuple[int, str | None]]:
    """Name → (size in bytes, CRC-32 or None where an old version wrote none)."""
    files = meta["files"].items()
    return {n: (f, None) if isinstance(f, int) else (f["size"], f["crc32"]) for n, f in files}


def verify(folder: Path, share: slice = slice(None)) -> None:
    """Compare every byte with the checksums; `share` takes a part of the files, so that ranks can divide the work.

    Raises:
        CheckpointError: as `read_meta`.
        DamagedCheckpoint: other content than was written.
    """
    for name, (_, checksum) in sorted(described_files(read_meta(folder)).items())[share]:
        try:
            found = crc32(folder / name)
        except OSError as error:
            raise DamagedCheckpoint(f"{folder / name} cannot be read ({error}): use an older checkpoint") from error
        if checksum is not None and found != checksum:
            raise DamagedCheckpoint(
                f"{folder / name} was changed after it was written (CRC-32 {found}, written was {checksum}): "
                "use an older checkpoint of the same run"
            )


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


def read_tensors(folder: Path, prefix: str = "model/") -> dict[str, Tensor]:
    """Whole CPU tensors of a checkpoint whose names start with `prefix`, without it; works outside of any run.

    Raises:
        CheckpointError: not a checkpoint of ours, or damaged.
    """
    read_meta(folder)
    found = {n: info for n, info in saved_tensors(folder).items() if n.startswith(prefix)}
    tensors = {n: torch.empty(info.size, dtype=info.properties.dtype) for n, info in found.items()}
    _read_into(folder, tensors, no_dist=True)
    return {n.removeprefix(prefix): t for n, t in tensors.items()}


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
    """What the operating system said, dug out of what torch.distributed.checkpoint wrapped it in."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return f"{type(error).__name__}: {error}" if error is not None else ""


def step_of(folder: Path) -> int:
    """The optimiser step in a step checkpoint's name."""
    return int(folder.name.removeprefix("step-"))


def checkpoints_of(run: Path) -> list[Path]:
    """The whole step checkpoints of a run folder, oldest first."""
    found: Iterable[Path] = (run / "checkpoints").glob("step-*")
    return sorted((p for p in found if re.fullmatch(r"step-\d+", p.name) and p.is_dir()), key=step_of)


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
