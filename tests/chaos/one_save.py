"""One save of a run's checkpoint, by what saves in training: `python -m chaos.one_save RUN CHECKPOINT`.

Stops itself (SIGSTOP) when all is ready, so that a tracer sees the save and nothing else. The threads of the writer
become calls, one after the other as they wait for each other anyway: a tracer counts the system calls of a thread.
"""

import os
import signal
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint._async_thread_executor as torch_executor

from mimir_fast.checkpoints import saving
from mimir_fast.checkpoints.reading import read_meta, read_tensors
from mimir_fast.checkpoints.saving import ALONE
from mimir_fast.training.checkpointing import Checkpointing
from mimir_fast.training.loggers import Logger
from mimir_fast.training.run_config import RunConfig
from mimir_fast.training.run_folder import RunFolder


class AtOnce:
    """An executor that has no thread."""

    def __init__(self, *args: Any, **options: Any) -> None: ...

    def submit(self, fn: Any, *args: Any, **options: Any) -> Future[Any]:
        """The result, which is there."""
        done: Future[Any] = Future()
        try:
            done.set_result(fn(*args, **options))
        except BaseException as error:
            done.set_exception(error)
        return done

    def shutdown(self, wait: bool = True) -> None:
        """Nothing is left to do."""


def main(run: Path, checkpoint: Path) -> None:
    """Save what is in `checkpoint` into `run`, as the best one; the one before it is deleted after."""
    saving.ThreadPoolExecutor = torch_executor.ThreadPoolExecutor = AtOnce  # type: ignore[assignment,misc,attr-defined]
    tensors, meta = read_tensors(checkpoint, ""), read_meta(checkpoint)
    del meta["crc32"]
    checkpoints = Checkpointing(RunFolder(run, ALONE), ALONE, RunConfig(keep_last=1), Logger())
    checkpoints.scored(meta["step"], 1.0)
    os.kill(os.getpid(), signal.SIGSTOP)
    checkpoints.finish(meta["step"], tensors, meta)
    os._exit(0)  # what the interpreter does at its end is no part of a save


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
