"""Whose folder it is: how a run of ours is recognised, and which names in its folder are ours to delete.

A folder that is named by mistake may hold a Hugging Face model, which has a config.json too, or notes beside a run.
Only names that a run writes are ever deleted or replaced; the rest stays, also behind symbolic links.
"""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mimir_fast.checkpoints.durable import remove
from mimir_fast.checkpoints.reading import FORMAT as CHECKPOINT
from mimir_fast.checkpoints.reading import checkpoints_of

MARK = {"format": "mimir_fast.run"}
"""Stands first in the config.json of a run."""

TRIAL = ".trial-"
"""Begins the name of the folder in which the storage is tried."""

_FOLDERS = "checkpoints|hangs|tensorboard|pictures|bad_batches|profile|evaluation"
# What a kill leaves half written or half deleted, in a run's folder and in its checkpoints/.
_LEFTOVER = (
    rf"\.(seen|trial)-[0-9a-f]*(\.old\.partial)?|(config|environment|diverged)\.json\.partial|metrics\.jsonl\.partial|({_FOLDERS})\.old\.partial",
    r"(step-\d{8}.*|best.*)\.partial",
)
# A pattern of names → None for what is ours with all that is in it, or the names that are ours inside.
_NAMES: Mapping[str, Any] = {
    rf"environment\.json|weights\.json|metrics\.jsonl|log\.txt|diverged\.json|curves\.png|{_LEFTOVER[0]}": None,
    r"checkpoints": {rf"step-\d{{8}}(\.damaged|\.diverged)?|best|{_LEFTOVER[1]}": None},
    r"hangs": {r"step-\d{8}": None},
    r"tensorboard": {r"events\.out\.tfevents\..*": None},
    r"pictures": {r".*-\d{8}\.png": None},
    r"bad_batches": {r"step-\d{8}-rank\d+\.safetensors": None},
    r"profile": {r"rank-\d+\.(json\.gz|txt)": None},
}
_EVALUATION: Mapping[str, Any] = {r"results\.json|weights\.json|report\.html|adversarial|progress": None}


def is_run(folder: Path) -> bool:
    """True for the folder of a run: by the mark in its config.json, the keys that older versions wrote there, a
    checkpoint of ours, or, where its config.json is damaged, the names of all that is in it."""
    found = read_json(folder / "config.json")
    run = found.get("run")
    if found.get("format") == MARK["format"] or (isinstance(run, dict) and {"output_dir", "save_every"} <= set(run)):
        return True
    if any(read_json(path / "meta.json").get("format") == CHECKPOINT for path in checkpoints_of(folder)):
        return True
    if found or not (folder / "config.json").is_file():
        return False
    # A config.json that was cut short before the first checkpoint: told by the names beside it, all of them a run's.
    beside = {path.name for path in folder.iterdir()} - {"config.json", ".lock"}
    return bool(beside) and all(re.fullmatch("|".join([*_NAMES, _FOLDERS]), name) for name in beside)


def refuse_strangers_folder(folder: Path) -> None:
    """Return for a folder that a run may take: one of a run, an empty one, or one that is not there.

    Raises:
        FileExistsError: it holds something else.
    """
    if not folder.exists() or is_run(folder):
        return
    strange = sorted(
        path.name
        for path in folder.iterdir()
        if path.name not in (".lock", "hangs") and not re.fullmatch(_LEFTOVER[0], path.name)
    )
    if strange:
        raise FileExistsError(
            f"{folder} is not empty and is no run of ours ({', '.join(strange[:5])}{', …' * (len(strange) > 5)}): "
            "choose another --output_dir"
        )


def delete_run(folder: Path) -> list[str]:
    """Delete the run in a folder and its evaluations; returns the paths of what stays, because no run writes it."""
    for plan in folder.glob("evaluation/*/progress/plan.json"):
        _delete(plan.parents[1], _EVALUATION)
        _remove_empty(plan.parents[1])
    _delete(folder, _NAMES)
    _remove_empty(folder / "evaluation")
    remove(folder / "config.json")  # it says that the folder is ours, so it goes last
    rest = [path for path in folder.iterdir() if path.name != ".lock"]
    inside = [p for path in rest for p in (path.iterdir() if re.fullmatch(_FOLDERS, path.name) else [path])]
    return sorted(str(path.relative_to(folder)) for path in inside)


def delete_leftovers(folder: Path) -> None:
    """Delete what a kill left half written or half deleted."""
    _delete(folder, {_LEFTOVER[0]: None})
    delete_half_checkpoints(folder)


def delete_half_checkpoints(folder: Path) -> None:
    """Delete the checkpoints in a run's folder that a kill or the storage left half written or half deleted."""
    if (folder / "checkpoints").is_dir():
        _delete(folder / "checkpoints", {_LEFTOVER[1]: None})


def _delete(folder: Path, names: Mapping[str, Any]) -> None:
    for path in list(folder.iterdir()):
        for pattern, inside in names.items():
            if re.fullmatch(pattern, path.name) is None:
                continue
            if inside is None:
                remove(path)
            elif path.is_dir():  # perhaps a link to another disk: the link is the user's, what it holds is the run's
                _delete(path, inside)
                _remove_empty(path)


def _remove_empty(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink():
        with suppress(OSError):  # something is left in it
            folder.rmdir()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where it cannot be read or holds something else."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
