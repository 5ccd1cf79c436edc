"""A run's folder: who may work in it, what it was started with, and where this start goes on.

`open` only looks, and takes the lock; `choose` finds the checkpoint to go on from; `begin`, when data, model and task
have been built, writes. A command line that fails before leaves the folder as it was.

config.json        the resolved configuration     environment.json   versions, machine, commit, processes of each start
metrics.jsonl      one line a logged step         checkpoints/       step-…/, best -> the best of them
log.txt            all that was said, with times  diverged.json      why it must not simply be started again
.lock              who works here
"""

import dataclasses
import json
import socket
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from mimir_fast.checkpoints.durable import move, point, pointed_at, remove, write_text
from mimir_fast.checkpoints.reading import (
    BEST,
    CheckpointError,
    DamagedCheckpoint,
    UnreadableCheckpoint,
    checkpoints_of,
    read_meta,
    step_of,
    verify,
)
from mimir_fast.checkpoints.trial import try_storage
from mimir_fast.training.health import TrainingDiverged
from mimir_fast.training.launch import agent, goes_on, launch_id
from mimir_fast.training.lock import FolderInUse, Lock
from mimir_fast.training.ownership import (
    MARK,
    TRIAL,
    delete_half_checkpoints,
    delete_leftovers,
    delete_run,
    read_json,
    refuse_strangers_folder,
)
from mimir_fast.versions import environment, software
from mimir_fast.world import World

# What may differ between the parts of one run: it changes where and how fast, not what is computed, which
# tests/training/test_free_to_change.py shows for each.
FREE_TO_CHANGE = frozenset(
    {
        "format", "recipe", "preset", "imports",
        "run.output_dir", "run.device", "run.strategy", "run.compile", "run.accum_iter", "run.micro_batch",
        "run.log_every", "run.save_every", "run.save_minutes", "run.picture_every", "run.keep_last", "run.keep_every",
        "run.resume", "run.overwrite", "run.allow_changes", "run.max_bad_steps", "run.stop_after", "run.hang_minutes",
        "run.profile", "run.dry_run", "run.wandb", "run.checkpoint_activations", "run.shard_ranks",
        "data.num_workers", "data.loader", "data.root", "data.resident_gib", "data.hw_decoder_load",
        "data.max_bad_files", "model.head_std",
    }
)  # fmt: skip


_MAX_STARTS = 100  # that environment.json remembers

# What may be another on each host.
_OF_A_HOST = frozenset({"run.device", "data.root", "data.num_workers", "data.hw_decoder_load"})


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """A (nested) dataclass or dict as {"a.b": value}."""
    items = dataclasses.asdict(config) if dataclasses.is_dataclass(config) and not isinstance(config, type) else config
    flat: dict[str, Any] = {}
    for key, value in items.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, name + ".") if isinstance(value, dict) else {name: value}
    return flat


def defaults_of(config: Any, prefix: str = "") -> dict[str, Any]:
    """What each option of a (nested) dataclass is where nobody names it, as {"a.b": value} of JSON."""
    flat: dict[str, Any] = {}
    for option in dataclasses.fields(config):
        name, value = f"{prefix}{option.name}", getattr(config, option.name)
        if dataclasses.is_dataclass(value):
            flat |= defaults_of(value, name + ".")
        elif option.default is not dataclasses.MISSING:
            flat[name] = list(option.default) if isinstance(option.default, tuple) else option.default
    return flat


def differences(
    old: dict[str, Any], new: dict[str, Any], defaults: dict[str, Any] | None = None,
    free: frozenset[str] = FREE_TO_CHANGE,
) -> list[str]:  # fmt: skip
    """Lines `name: old -> new` for what matters and differs.

    Args:
        defaults: of options that an older version, which wrote `old`, did not have.
        free: options that do not matter; nor do numbers that a start derived from its options and ranks.
    """
    flat_old, flat_new = {**(defaults or {}), **flatten(old)}, flatten(new)
    return [
        f"{name}: {flat_old.get(name)} -> {flat_new.get(name)}"
        for name in sorted(set(flat_old) | set(flat_new))
        if name not in free and not name.startswith("derived.") and flat_old.get(name) != flat_new.get(name)
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
        self._overwrites = self._begun = False
        self._wanted: dict[str, Any] = {}
        self._processes: list[str] = []
        self._agents: list[str] = []
        self._about: dict[str, Any] = {}
        self._first_bad: int | None = None  # where the run diverged before

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def open(self, config: Any, *, resume: bool, overwrite: bool, allow_changes: bool) -> None:
        """Take the folder for `config`; collective.

        Raises:
            RunFailed: ranks were started with other options or versions.
            FileExistsError: the folder holds another run, or files that are none of ours.
            FolderInUse: another process works in it.
            TrainingDiverged: it ended so, and nothing was changed since.
            OSError: it cannot be written, its storage cannot do what a run needs, or the hosts do not share it.
        """
        self._wanted = json.loads(json.dumps(dataclasses.asdict(config)))
        same = {f"--{name}": value for name, value in flatten(self._wanted).items() if name not in _OF_A_HOST}
        self.world.agree(lambda: same | software())
        self._agents = sorted({name for name in self.world.together(agent) if name is not None})
        free = FREE_TO_CHANGE | {f"objective.{name}" for name in config.objective.free_to_change}
        nonce = self.world.on_main(lambda: self._take(defaults_of(config), free, resume, overwrite, allow_changes))
        try:
            self._processes = self.world.together(lambda: self._find(nonce))
        finally:
            if self.world.is_main:
                (self.path / nonce).unlink(missing_ok=True)

    def begin(self, derived: dict[str, Any] | None = None) -> None:
        """Write who starts what here, after deleting what is overwritten and what a kill left; collective.

        Args:
            derived: what options and ranks come to; stands in config.json and is not compared when the run goes on.
        """
        self.world.on_main(lambda: self._begin({"derived": derived} if derived else {}))

    def end(self, how: str) -> None:
        """Note how the start that began ends; a start that does not come here ended abnormally. On the main rank."""
        self._about["ended"] = how
        with suppress(OSError):  # a full disk: what was trained is saved
            write_text(self.path / "environment.json", json.dumps(self._about, indent=1) + "\n")

    def close(self) -> None:
        """Let others in. A folder that was made for a start which never began goes."""
        self._lock.release(forget=not self._begun)

    def choose(self) -> Path | None:
        """The newest whole checkpoint, the same on all ranks, or None in a new run; damaged newer ones are put aside.

        Every byte is read and compared with its checksum, files shared out over the ranks. One that the storage does
        not give is passed over and stays where it is. Collective.

        Raises:
            CheckpointError: there are checkpoints and none of them is whole.
        """
        names = self.world.on_main(self._candidates)
        problems: dict[str, CheckpointError] = {}
        for name in reversed(names):
            problem = self._problem(name)
            if problem is None:
                self.world.on_main(lambda: self._pass_over(problems))
                return self.checkpoints / name
            problems[name] = problem
        if problems:
            raise CheckpointError(
                f"none of the {len(names)} checkpoints in {self.checkpoints} can be used; the newest: "
                f"{problems[names[-1]]}. Copy a whole one back there, or --overwrite to start anew"
            )
        return None

    def prune(self, keep_last: int, keep_every: int) -> None:
        """Delete step checkpoints, but not the newest, the best, the last healthy one, or every `keep_every`th step.

        And what earlier deletions and saves have left, so that a disk does not fill with it. No save is in progress.
        """
        try:
            found, best = checkpoints_of(self.path), self.best()
        except OSError:  # what must stay is not known now
            return
        kept = {best, *(p for p in found if keep_every and step_of(p) % keep_every == 0)}
        healthy = [p for p in found if _is_healthy(p)]
        kept |= set(found[-keep_last:]) | set(healthy[-1:])
        for old in found:
            if old not in kept:
                with suppress(OSError):  # the next save tries again
                    remove(old)
        with suppress(OSError):
            delete_half_checkpoints(self.path)

    def best(self) -> Path | None:
        """The checkpoint `best` stands for."""
        return pointed_at(self.checkpoints / BEST)

    def set_best(self, checkpoint: Path) -> None:
        """Let `best` stand for a whole checkpoint; it is never without one."""
        point(self.checkpoints / BEST, checkpoint.name)

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
        self, defaults: dict[str, Any], free: frozenset[str], resume: bool, overwrite: bool, allow_changes: bool
    ) -> str:  # fmt: skip
        refuse_strangers_folder(self.path)
        trial = self.path / f"{TRIAL}{uuid.uuid4().hex}"
        try:
            self._lock.acquire()
        except FolderInUse:
            raise
        except OSError:
            if self.path.is_dir():
                try_storage(trial)  # says more than which call failed
            raise
        if self._lock.warning:
            self.notes.append(f"WARNING: {self._lock.warning}")
        own = goes_on(read_json(self.path / "environment.json"), self._agents)
        self._overwrites = overwrite and not own
        fix = "choose another --output_dir, or --overwrite to start anew there"
        if overwrite and own:
            self.notes.append(f"--overwrite: {self.path} was made by this launch ({self._launch}); going on with it")
            fix = (
                f"this launch ({self._launch}) made it and has not finished, so --overwrite keeps it. Choose another "
                "--output_dir, or delete the folder"
            )
        if not self._overwrites:
            self._check_former(defaults, free, own or resume, allow_changes, fix)
        try_storage(trial)
        nonce = f".seen-{uuid.uuid4().hex}"
        (self.path / nonce).touch()
        return nonce

    def _check_former(
        self, defaults: dict[str, Any], free: frozenset[str], resume: bool, allow_changes: bool, fix: str
    ) -> None:  # fmt: skip
        """Refuse to go on with another configuration, or with what would diverge again."""
        # A start that failed before its first checkpoint has nothing to lose.
        begun = bool(checkpoints_of(self.path))
        changed = differences(self._recorded_config(), self._wanted, defaults, free) if begun else []
        if changed and not allow_changes:
            raise FileExistsError(
                f"{self.path} holds a run with another configuration:\n  "
                + "\n  ".join(changed)
                + f"\nTo go on with the change, --allow_changes; otherwise {fix}"
            )
        if begun and not resume:
            raise FileExistsError(f"{self.path} already holds this run and --no_resume was given: {fix}")
        found = read_json(self.path / "diverged.json")
        if not found:
            return
        if not differences(found["config"], self._wanted, None, free):
            raise TrainingDiverged(
                f"the run in {self.path} diverged at step {found['first_bad']} and would do so again with the same "
                "options: resume with --blr (or --lr) divided by 10 and --allow_changes, or --overwrite to start anew"
            )
        self._first_bad = found["first_bad"]

    def _candidates(self) -> list[str]:
        """Names of the checkpoints to choose from; those whose weights exploded are put aside."""
        if self._overwrites:
            return []
        found = checkpoints_of(self.path)
        while self._first_bad is not None and found:
            if _is_healthy(found[-1]) and step_of(found[-1]) < self._first_bad:
                break
            checkpoint = found.pop()
            move(checkpoint, checkpoint.with_name(checkpoint.name + ".diverged"))
            self.notes.append(
                f"{checkpoint.name} holds weights that exploded; it is kept as {checkpoint.name}.diverged"
            )
        return [path.name for path in found]

    def _begin(self, derived: dict[str, Any]) -> None:
        if self._overwrites and (kept := delete_run(self.path)):
            self.notes.append(f"--overwrite: {self.path} keeps what no run of ours writes: {', '.join(kept)}")
        delete_leftovers(self.path)
        self._begun = True
        write_text(self.path / "config.json", json.dumps(MARK | self._wanted | derived, indent=1) + "\n")
        remove(self.path / "diverged.json")
        former = read_json(self.path / "environment.json")
        earlier = [*former.pop("earlier", []), former][-_MAX_STARTS:] if former else []
        self._about = {
            **environment(), "started": time.strftime("%Y-%m-%d %H:%M:%S"), "launch": launch_id(),
            "agents": self._agents, "processes": self._processes, "earlier": earlier,
        }  # fmt: skip
        write_text(self.path / "environment.json", json.dumps(self._about, indent=1) + "\n")

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

    @property
    def _launch(self) -> str:
        return launch_id() or "restarted by torchrun"

    def _recorded_config(self) -> dict[str, Any]:
        """config.json, or the newest checkpoint's copy of it where that was cut."""
        found = read_json(self.path / "config.json")
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

    def _problem(self, name: str) -> CheckpointError | None:
        """What is wrong with a checkpoint; every rank reads its share of the files, all learn it."""

        def look() -> CheckpointError | None:
            folder = self.checkpoints / name
            if not folder.joinpath("meta.json").exists():
                return DamagedCheckpoint(f"{folder} has lost its meta.json")
            try:
                verify(folder, slice(self.world.rank, None, self.world.size))
            except (DamagedCheckpoint, UnreadableCheckpoint) as error:
                return error
            return None

        return next((problem for problem in self.world.together(look) if problem is not None), None)

    def _pass_over(self, problems: dict[str, CheckpointError]) -> None:
        for name, problem in problems.items():
            if isinstance(problem, UnreadableCheckpoint):
                self.notes.append(f"WARNING: {problem}. It stays where it is; going on from the one before it")
                continue
            aside = self.checkpoints / f"{name}.damaged"
            remove(aside)
            move(self.checkpoints / name, aside)
            self.notes.append(f"WARNING: {problem}. Put aside as {aside.name}; going on from the one before it")


def _is_healthy(checkpoint: Path) -> bool:
    try:
        return bool(read_meta(checkpoint).get("healthy", True))
    except UnreadableCheckpoint:  # nobody knows, so it stays
        return True
    except CheckpointError:
        return False
