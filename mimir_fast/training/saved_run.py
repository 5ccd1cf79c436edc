"""What a run's folder says of the run: its config.json, also for what starts from the run or judges it."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from mimir_fast.data.config import DataConfig


def find_saved_run(path: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """(folder, configuration) of the run that a path is the folder of or lies in, such as a checkpoint; None for other
    paths, and for a config.json that is somebody else's."""
    if not str(path) or not Path(path).exists():
        return None
    for folder in (Path(path), *Path(path).parents[:2]):
        try:
            found = json.loads((folder / "config.json").read_text())
        except (OSError, ValueError):
            continue
        whole = isinstance(found, dict) and all(isinstance(found.get(part), dict) for part in ("data", "model", "run"))
        return (folder, found) if whole else None
    return None


def values_of(kind: type, saved: Mapping[str, Any], leave_out: Iterable[str] = ()) -> dict[str, Any]:
    """The fields of a dataclass that a part of a configuration has, with tuples where JSON has lists."""
    names = {field.name for field in fields(kind)} - set(leave_out)
    return {name: tuple(v) if isinstance(v, list) else v for name, v in saved.items() if name in names}


def data_of(path: str | Path) -> DataConfig:
    """The data that a run was trained on, for what judges the run; the defaults for other paths."""
    found = find_saved_run(path)
    saved = found[1]["data"] if found else {}
    return DataConfig(**values_of(DataConfig, saved, leave_out=("limit", "generated", "hold_out")))
