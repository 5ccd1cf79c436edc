"""A run's folder: who may work in it, what it was started with, and where this start goes on.

config.json        the resolved configuration     environment.json   versions, machine, commit, processes
metrics.jsonl      one line a logged step         checkpoints/       step-…/, best -> the best of them
.lock              who works here                 diverged.json      why it must not simply be started again
"""

import dataclasses
import json
import os
import socket
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from mimir_fast.checkpoints.durable import PARTIAL, move, point, remove, write_text
from mimir_fast.checkpoints.reading import (
    CheckpointError,
    DamagedCheckpoint,
    checkpoints_of,
    read_meta,
    step_of,
    verify,
)
from mimir_fast.training.health import TrainingDiverged
from mimir_fast.training.launch import launch_id, restarts
from mimir_fast.training.lock import Lock
from mimir_fast.versions import environment
from mimir_fast.world import World

# What a start may leave before it has a config.json; with anything else a folder is somebody else's.
OURS = frozenset({".lock", "config.json", "environment.json", "metrics.jsonl", "checkpoints", "diverged.json", "hangs"})

# What may differ between the parts of one run: it changes where and how fast, not what is computed.
FREE_TO_CHANGE = frozenset(
    {
        "recipe", "preset",
        "run.output_dir", "run.device", "run.strategy", "run.compile", "run.accum_iter", "run.micro_batch",
        "run.log_every", "run.save_every", "run.save_minutes", "run.picture_every", "run.keep_last", "run.keep_every",
        "run.resume", "run.overwrite", "run.allow_changes", "run.max_bad_steps", "run.stop_after", "run.hang_minutes",
        "run.profile", "run.dry_run", "run.wandb", "run.checkpoint_activations", "run.shard_ranks",
        "objective.attack.cuda_graph",
        "data.num_workers", "data.loader", "data.root", "data.resident_gib", "data.hw_decoder_load",
        "data.max_bad_files",
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


def defaults_of(config: Any, prefix: str = "") -> dict[str, Any]:
    """What each option of a (nested) dataclass is where nobody names it, as {"a.b": value}."""
    flat: dict[str, Any] = {}
    for option in dataclasses.fields(config):
        name, value = f"{prefix}{option.name}", getattr(config, option.name)
        if dataclasses.is_dataclass(value):
            flat |= defaults_of(value, name + ".")
        elif option.default is not dataclasses.MISSING:
            flat[name] = option.default
    return flat


def differences(old: dict[str, Any], new: dict[str, Any], defaults: dict[str, Any] | None = None) -> list[str]:
    """Lines `name: old -> new` for what matters and differs.

    Args:
        defaults: of options that an older version, which wrote `old`, did not have.
    """
    flat_old, flat_new = {**(defaults or {}), **flatten(old)}, flatten(new)
    return [
        f"{name}: {flat_old.get(name)} -> {flat_new.get(name)}"
        for name in sorted(set(flat_old) | set(flat_new))
        if name not in FREE_TO_CHANGE and flat_old.get(name) != flat_new.get(name)
    ]


class RunFolder:
    """The folder of a run that is being trained, open on all ranks, locked by the main one.

    Attributes:
        path: the folder.
        notes: what happened to it that a person should read, on the main rank.
    """

    def __init__(self, path: Path, world: World) -> None:
        self.path, self.world = path, world
        self.notes: list[str] = []
        self._lock = Lock(path / ".lock")

    @property
    def checkpoints(self) -> Path:
        """Where they are."""
        return self.path / "checkpoints"

    def open(self, config: Any, *, resume: bool, overwrite: bool, allow_changes: bool) -> None:
        """Take the folder for `config`; collective.

        Raises:
            FileExistsError: the folder holds another run, or files that are none of ours.
            FolderInUse: another process works in it.
            TrainingDiverged: it ended so, and nothing was changed since.
            OSError: it cannot be written, or the hosts do not share it.
        """
        wanted = json.loads(json.dumps(dataclasses.asdict(config)))
        defaults = defaults_of(config)
        nonce = self.world.on_main(lambda: self._take(wanted, defaults, resume, overwrite, allow_changes))
        try:
            processes = self.world.together(lambda: self._find(nonce))
        finally:
            if self.world.is_main:
                (self.path / nonce).unlink(missing_ok=True)
        about = {**environment(), "launch": launch_id(), "processes": processes}
        self.world.on_main(lambda: write_text(self.path / "environment.json", json.dumps(about, indent=1) + "\n"))

    def close(self) -> None:
        """Let others in."""
        self._lock.release()

    def choose(self) -> Path | None:
        """The newest whole checkpoint, the same on all ranks, or None in a new run; damaged newer ones are put aside.

        Every byte is read and compared with its checksum, files shared out over the ranks. Collective.

        Raises:
            CheckpointError: there are checkpoints and none of them is whole.
        """
        names = self.world.on_main(lambda: [p.name for p in checkpoints_of(self.path)])
        damaged: list[tuple[str, str]] = []
        for name in reversed(names):
            problem = self._problem(name)
            if problem is None:
                self.world.on_main(lambda: self._put_aside(damaged))
                return self.checkpoints / name
            damaged.append((name, problem))
        if damaged:
            raise CheckpointError(
                f"none of the {len(damaged)} checkpoints in {self.checkpoints} is whole; the newest: {damaged[0][1]}. "
                "Copy a whole one back there, or --overwrite to start anew"
            )
        return None

    def prune(self, keep_last: int, keep_every: int) -> None:
        """Delete step checkpoints, but not the newest, the best, the last healthy one, or every `keep_every`th step."""
        found = checkpoints_of(self.path)
        kept = {self.best(), *(p for p in found if keep_every and step_of(p) % keep_every == 0)}
        healthy = [p for p in found if _is_healthy(p)]
        kept |= set(found[-keep_last:]) | set(healthy[-1:])
        for old in found:
            if old not in kept:
                with suppress(OSError):  # the next save tries again
                    remove(old)

    def best(self) -> Path | None:
        """The checkpoint `best` stands for."""
        link = self.checkpoints / "best"
        return self.checkpoints / os.readlink(link) if link.is_symlink() else None

    def set_best(self, checkpoint: Path) -> None:
        """Let `best` stand for a whole checkpoint; it is never without one."""
        point(self.checkpoints / "best", checkpoint.name)

    def restore_best(self, step: int | None) -> bool:
        """Let `best` stand for that checkpoint again, where a kill or damage came between; False when it is gone.

        Without a step (older versions wrote none) it is whichever it stands for.
        """
        checkpoint = self.best() if step is None else self.checkpoints / f"step-{step:08d}"
        if checkpoint is None or not checkpoint.is_dir():
            return False
        if self.best() != checkpoint:
            self.set_best(checkpoint)
        return True

    def diverged(self, first_bad: int, config: dict[str, Any]) -> None:
        """Remember that training blew up, so that a restart does not do the same again for ever."""
        with suppress(OSError):  # what ended the run is more important than this note of it
            write_text(
                self.path / "diverged.json", json.dumps({"first_bad": first_bad, "config": config}, indent=1) + "\n"
            )

    def _take(
        self, wanted: dict[str, Any], defaults: dict[str, Any], resume: bool, overwrite: bool, allow_changes: bool
    ) -> str:  # fmt: skip
        recorded = self.path / "config.json"
        if not recorded.exists() and self.path.exists() and any(map(_is_strange, self.path.iterdir())):
            raise FileExistsError(
                f"{self.path} exists, is not empty and is no run of ours: choose another --output_dir"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        if self._lock.warning:
            self.notes.append(f"WARNING: {self._lock.warning}")
        if overwrite:
            self._overwrite()
        self._clean()
        # A start that failed before its first checkpoint has nothing to lose.
        begun = bool(checkpoints_of(self.path))
        changed = differences(self._recorded_config(), wanted, defaults) if begun else []
        fix = "choose another --output_dir, or --overwrite to start anew there"
        if changed and not allow_changes:
            raise FileExistsError(
                f"{self.path} holds a run with another configuration:\n  "
                + "\n  ".join(changed)
                + f"\nTo go on with the change, --allow_changes; otherwise {fix}"
            )
        if begun and not resume and not self._is_of_this_launch():
            raise FileExistsError(f"{self.path} already holds this run and --no_resume was given: {fix}")
        self._after_divergence(wanted)
        write_text(recorded, json.dumps(wanted, indent=1) + "\n")
        nonce = f".seen-{uuid.uuid4().hex}"
        (self.path / nonce).touch()
        return nonce

    def _find(self, nonce: str) -> str:
        """Prove that this host sees what rank 0 wrote a moment ago."""
        for _ in range(20):  # NFS clients may look again only after a while
            if (self.path / nonce).exists():
                return f"{self.world.name}, {self.world.device}"
            time.sleep(0.5)
        raise OSError(
            f"{self.path} on {socket.gethostname()} is not the folder that rank 0 writes to: checkpoints would be in "
            "pieces. Put --output_dir on storage that all hosts share (NFS, Lustre, …)"
        )

    def _overwrite(self) -> None:
        """Delete the run, unless a former start of this very launch made it."""
        if self._is_of_this_launch():
            self.notes.append(f"--overwrite: {self.path} was made by this launch ({launch_id()}); going on with it")
            return
        # config.json says that the folder is ours, so it goes last.
        for path in sorted(self.path.iterdir(), key=lambda path: path.name == "config.json"):
            if path.name != ".lock":
                remove(path)

    def _is_of_this_launch(self) -> bool:
        recorded = _read_json(self.path / "environment.json").get("launch")
        return restarts() > 0 or (recorded is not None and recorded == launch_id())

    def _clean(self) -> None:
        """Remove what a kill left half done."""
        for leftover in [
            *self.path.glob(f"*{PARTIAL}"),
            *self.path.glob(".seen-*"),
            *self.checkpoints.glob(f"*{PARTIAL}"),
        ]:
            remove(leftover)

    def _recorded_config(self) -> dict[str, Any]:
        """config.json, or the newest checkpoint's copy of it where that was cut."""
        found = _read_json(self.path / "config.json")
        if found:
            return found
        for checkpoint in reversed(checkpoints_of(self.path)):
            try:
                config: dict[str, Any] = read_meta(checkpoint)["config"]
            except (CheckpointError, KeyError):
                continue
            self.notes.append(f"WARNING: {self.path}/config.json was damaged; restored from {checkpoint.name}")
            return config
        return {}

    def _after_divergence(self, wanted: dict[str, Any]) -> None:
        """Refuse to repeat it; with a change, go on from the last healthy checkpoint."""
        mark = self.path / "diverged.json"
        found = _read_json(mark)
        if not found:
            return
        if not differences(found["config"], wanted):
            raise TrainingDiverged(
                f"the run in {self.path} diverged at step {found['first_bad']} and would do so again with the same "
                "options: resume with --blr (or --lr) divided by 10 and --allow_changes, or --overwrite to start anew"
            )
        for checkpoint in reversed(checkpoints_of(self.path)):
            if _is_healthy(checkpoint) and step_of(checkpoint) < found["first_bad"]:
                break
            move(checkpoint, checkpoint.with_name(checkpoint.name + ".diverged"))
            self.notes.append(
                f"{checkpoint.name} holds weights that exploded; it is kept as {checkpoint.name}.diverged"
            )
        remove(mark)

    def _problem(self, name: str) -> str | None:
        """What is wrong with a checkpoint; every rank reads its share of the files, all learn it."""

        def look() -> str | None:
            folder = self.checkpoints / name
            if not (folder / "meta.json").is_file():
                return f"{folder} has lost its meta.json"
            try:
                verify(folder, slice(self.world.rank, None, self.world.size))
            except DamagedCheckpoint as error:
                return str(error)
            return None

        return next((problem for problem in self.world.together(look) if problem is not None), None)

    def _put_aside(self, damaged: list[tuple[str, str]]) -> None:
        for name, problem in damaged:
            aside = self.checkpoints / f"{name}.damaged"
            remove(aside)
            move(self.checkpoints / name, aside)
            self.notes.append(f"WARNING: {problem}. Put aside as {aside.name}; going on from the one before it")


def _is_strange(path: Path) -> bool:
    return not (path.name in OURS or path.name.endswith(PARTIAL) or path.name.startswith(".seen-"))


def _is_healthy(checkpoint: Path) -> bool:
    try:
        return bool(read_meta(checkpoint).get("healthy", True))
    except CheckpointError:
        return False


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
