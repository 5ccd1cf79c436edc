"""A run's folder: what it was started with, and whether this start may go on in it.

config.json        the resolved configuration     environment.json   versions, machine, commit
metrics.jsonl      one line a logged step         checkpoints/       step-…/
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from mimir_fast.versions import environment

# What may differ between the parts of one run: it changes where and how fast, not what is computed.
FREE_TO_CHANGE = frozenset(
    {
        "recipe", "preset",
        "run.output_dir", "run.device", "run.strategy", "run.compile", "run.accum_iter", "run.log_every",
        "run.save_every", "run.picture_every", "run.keep_last", "run.resume", "run.overwrite", "run.allow_changes",
        "run.max_bad_steps", "run.stop_after", "data.num_workers", "data.loader", "data.root", "data.resident_gib",
        "data.hw_decoder_load", "data.max_bad_files",
    }
)  # fmt: skip


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """A (nested) dataclass or dict as {"a.b": value}."""
    items = dataclasses.asdict(config) if dataclasses.is_dataclass(config) and not isinstance(config, type) else config
    flat: dict[str, Any] = {}
    for key, value in items.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, name + ".") if isinstance(value, dict) else {name: value}
    return flat


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines `name: old -> new` for what matters and differs."""
    flat_old, flat_new = flatten(old), flatten(new)
    return [
        f"{name}: {flat_old.get(name)} -> {flat_new.get(name)}"
        for name in sorted(set(flat_old) | set(flat_new))
        if name not in FREE_TO_CHANGE and flat_old.get(name) != flat_new.get(name)
    ]


def open_run(folder: Path, config: Any, *, resume: bool, overwrite: bool, allow_changes: bool) -> None:
    """Make the folder ready for `config`, on the main rank.

    Raises:
        FileExistsError: the folder holds another run, or files that are none of ours.
    """
    wanted = json.loads(json.dumps(dataclasses.asdict(config)))
    recorded = folder / "config.json"
    if overwrite and recorded.exists():
        shutil.rmtree(folder)
    if recorded.exists():
        # A start that failed before its first checkpoint has nothing to lose.
        begun = any((folder / "checkpoints").glob("step-*"))
        changed = differences(json.loads(recorded.read_text()), wanted) if begun else []
        fix = "choose another --output_dir, or --overwrite to start anew there"
        if changed and not allow_changes:
            raise FileExistsError(
                f"{folder} holds a run with another configuration:\n  "
                + "\n  ".join(changed)
                + f"\nTo go on with the change, --allow_changes; otherwise {fix}"
            )
        if begun and not resume:
            raise FileExistsError(f"{folder} already holds this run and --no_resume was given: {fix}")
    elif folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} exists, is not empty and is no run of ours: choose another --output_dir")
    folder.mkdir(parents=True, exist_ok=True)
    recorded.write_text(json.dumps(wanted, indent=1) + "\n")
    (folder / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")
