"""Run folders made by hand, for tests: opened as a start opens them, with checkpoints of one small tensor."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from mimir_fast.checkpoints.saving import save_checkpoint
from mimir_fast.pretrain import config_from
from mimir_fast.training.run_folder import RunFolder
from mimir_fast.world import World

ALONE = World(0, 1, torch.device("cpu"))


def opened(
    path: Path, *flags: str, resume: bool = True, overwrite: bool = False, allow_changes: bool = False
) -> RunFolder:
    """A start of a run as far as its first writes."""
    folder = looked(path, *flags, resume=resume, overwrite=overwrite, allow_changes=allow_changes)
    folder.begin()
    return folder


def looked(path: Path, *flags: str, **options: bool) -> RunFolder:
    """A start as far as its look at the folder."""
    folder = RunFolder(path, ALONE)
    try:
        folder.open(config_from(list(flags)), **{"resume": True, "overwrite": False, "allow_changes": False} | options)
    except BaseException:
        folder.close()
        raise
    return folder


def save(run: Path, step: int, **meta: Any) -> Path:
    target = run / "checkpoints" / f"step-{step:08d}"
    config = json.loads((run / "config.json").read_text()) if (run / "config.json").exists() else {}
    save_checkpoint(target, {"model/x": torch.full((64,), float(step))}, {"step": step, "config": config, **meta})
    return target


def damage(checkpoint: Path) -> None:
    (file,) = checkpoint.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)


def names(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir())


def contents(folder: Path) -> dict[str, str]:
    """Path → text of every file below."""
    found = {}
    for parent, _, files in os.walk(folder, followlinks=True):
        for name in files:
            path = Path(parent) / name
            found[str(path.relative_to(folder))] = path.read_bytes().decode(errors="replace")
    return found
