"""Writing a checkpoint, beside training if wanted.

The step waits only while the tensors are copied to (pinned) host memory; torch.distributed.checkpoint writes the copy
in a thread, and `_finish` in another checks, describes, syncs and renames it. The thread's agreements go through a
process group of their own. torch.distributed.checkpoint takes long to import, so that is left until a run saves.
"""

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mimir_fast.checkpoints.checksums import block_checksums, seal
from mimir_fast.checkpoints.durable import PARTIAL, move, remove, sync
from mimir_fast.checkpoints.reading import FORMAT, VERSION, root_cause
from mimir_fast.world import FailedElsewhere, World

if TYPE_CHECKING:
    from torch.distributed.checkpoint.staging import DefaultStager

STAGES_AGAIN = torch.__version__ >= "2.14"
"""Whether a stager works twice: that of 2.11 closes itself behind the first save, and the second ends in a KeyError;
2.12 and 2.13 were not tried (findings/dcp-stager-works-once.sh)."""
ALONE = World(0, 1, torch.device("cpu"))


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], meta: dict[str, Any], world: World = ALONE) -> None:
    """Write `tensors` and `meta` as the checkpoint `folder` and wait for it; collective over all ranks.

    Raises:
        OSError: on every rank, when any of them could not write (disk full, say); an older `folder` is intact then.
    """
    saver = Saver(world)
    saver.start(folder, tensors, meta)
    saver.wait()
    saver.close()


class Saver:
    """Writes one checkpoint at a time while training goes on. All methods but `done` are collective."""

    def __init__(self, world: World) -> None:
        self.world = world.separate()
        self._stager = self._new_stager()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def start(
        self, folder: Path, tensors: dict[str, Tensor], meta: dict[str, Any], then: Callable[[], None] | None = None
    ) -> None:
        """Copy the tensors and return; the rest happens meanwhile, `then` on the main rank once `folder` is whole.

        Raises:
            OSError: the save before this one failed, or this one cannot begin.
        """
        import torch.distributed.checkpoint as dcp

        from mimir_fast.checkpoints.writer import Writer

        self.wait()
        if not STAGES_AGAIN:
            self._stager = self._new_stager()
        partial = folder.with_name(folder.name + PARTIAL)
        try:
            self.world.on_main(lambda: _make(partial))
            written = dcp.async_save(
                tensors, storage_writer=Writer(partial), process_group=self.world.group, async_stager=self._stager,
                no_dist=self.world.size == 1,
            )  # fmt: skip
        except (OSError, FailedElsewhere) as error:
            raise _failure(folder, error) from error
        self._pending = self._thread.submit(self._finish, written, partial, folder, meta, then)

    def _new_stager(self) -> "DefaultStager":
        """One for all saves, where it can: pinned memory is costly to get, so it keeps and reuses its copy."""
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        cuda = self.world.device.type == "cuda"
        return DefaultStager(StagingOptions(cuda, False, False, cuda))

    def done(self) -> bool:
        """True when `wait` would return (or raise) at once."""
        return self._pending is None or self._pending.done()

    def wait(self) -> None:
        """Until the save in progress is on the disk.

        Raises:
            OSError: it failed, on some rank.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Let the thread and the copy go."""
        self._thread.shutdown(wait=False)
        self._stager.close()

    def _finish(
        self, written: Any, partial: Path, folder: Path, meta: dict[str, Any], then: Callable[[], None] | None
    ) -> None:
        from torch.distributed.checkpoint.api import CheckpointException

        def describe() -> dict[str, dict[str, Any]]:
            try:
                written.result()
            except (Exception, CheckpointException) as failure:  # the latter is no Exception
                raise OSError(root_cause(failure)) from failure
            own = sorted(partial.glob(f"shard-{self.world.rank + 1:05d}-*.safetensors"))
            for path in own:
                sync(path)
            return {path.name: {"size": path.stat().st_size, "crc32": block_checksums(path)} for path in own}

        def commit() -> None:
            files = {name: info for described in descriptions for name, info in described.items()}
            _check_shared(partial, files)
            described = seal({"format": FORMAT, "version": VERSION, **meta, "files": files})
            (partial / "meta.json").write_text(json.dumps(described, indent=1))
            sync(partial / "meta.json")
            sync(partial)
            if folder.exists():
                remove(folder)
            move(partial, folder)
            if then is not None:
                then()

        try:
            descriptions = self.world.together(describe)
            self.world.on_main(commit)
        except (OSError, FailedElsewhere) as error:
            if self.world.is_main:
                remove(partial)
            raise _failure(folder, error) from error


def _make(partial: Path) -> None:
    remove(partial)
    partial.mkdir(parents=True)


def _check_shared(partial: Path, files: dict[str, dict[str, Any]]) -> None:
    """What the ranks say they wrote must be what rank 0 sees."""
    for name, info in files.items():
        path = partial / name
        if not path.is_file() or path.stat().st_size != info["size"]:
            raise OSError(f"{path} was written by another host and is not seen here: the folder must be shared")


def _failure(folder: Path, error: Exception) -> OSError:
    return OSError(f"could not write checkpoint {folder}: {error}")
