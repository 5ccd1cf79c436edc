"""A few forked processes that fill batches ahead of time, each in its own slots of shared memory.

Instead of torch's DataLoader, for three reasons: that makes and maps a new shared-memory file for each batch, it needs
room in /dev/shm, of which a container has 64 MB, and a worker that is killed raises an error anywhere in the training
step. Here the memory is mapped once and anonymous (no /dev/shm), and a killed worker is started again on the batches it
owed: they are functions of their numbers, so nothing is lost.
"""

import gc
import logging
import mmap
import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from mimir_fast.data.order import Key, KeyStream

SLOTS = 4  # batches a worker may be ahead
MAX_RESTARTS = 3  # of one worker
_LOG = logging.getLogger(__name__)
_PATIENCE = 5.0  # seconds after which an idle worker looks whether its parent still lives

Fill = Callable[[Key, np.ndarray], Any]
"""(key, slot (B, …) uint8 to write into) → anything small that can be pickled."""


class WorkerKilledError(OSError):
    """A worker process died again and again."""


class Workers:
    """Processes that run `fill` on the keys of a stream, in order.

    Args:
        fill: runs in the workers, which are forked: they see the memory that this process has now.
        shape: of a slot, uint8.
        count: processes.
    """

    def __init__(self, fill: Fill, shape: tuple[int, ...], count: int) -> None:
        self._workers = [_Worker(fill, shape) for _ in range(count)]

    def read(self, keys: KeyStream) -> Generator[tuple[np.ndarray, Any], None, None]:
        """(slot, what `fill` returned) for each key; the slot may be overwritten once the next one is asked for."""
        asked = done = 0
        more = True
        for worker in self._workers:
            worker.forget()
        while more or done < asked:
            while more and asked - done < SLOTS * len(self._workers):
                more = keys.has(asked)
                if more:
                    self._workers[asked % len(self._workers)].ask(keys, asked)
                    asked += 1
            if done < asked:
                yield self._workers[done % len(self._workers)].answer()
                done += 1

    def close(self) -> None:
        """End the worker processes and free their shared memory."""
        for worker in self._workers:
            worker.end()
        self._workers = []


class _Worker:
    """One process, its end of the pipe, its slots, and the numbers it was asked for."""

    def __init__(self, fill: Fill, shape: tuple[int, ...]) -> None:
        self._fill, self._restarts = fill, 0
        size = int(np.prod(shape))
        self._memory = mmap.mmap(-1, max(SLOTS * size, 1))  # shared with forked processes, and in no file system
        self._slots = np.frombuffer(self._memory, np.uint8, SLOTS * size).reshape(SLOTS, *shape)
        self._owed: deque[tuple[KeyStream, int, int]] = deque()
        self._next_slot = 0
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        arguments = (self._fill, self._slots, theirs, self._pipe, os.getpid())
        self._process = context.Process(target=_work, args=arguments, daemon=True, name="mimir_fast loader")
        self._process.start()
        theirs.close()

    def ask(self, keys: KeyStream, number: int) -> None:
        task = (keys, number, self._next_slot)
        self._next_slot = (self._next_slot + 1) % SLOTS
        self._owed.append(task)
        with suppress(OSError):  # it is dead: `answer` will see, and send all that is owed to the next one
            self._pipe.send(task)

    def answer(self) -> tuple[np.ndarray, Any]:
        while True:
            try:
                error, result = self._pipe.recv()
                break
            except (EOFError, OSError):
                self._restart()
        _, _, slot = self._owed.popleft()
        if error is not None:
            raise error
        return self._slots[slot], result

    def _restart(self) -> None:
        self._process.join()
        code, self._restarts = self._process.exitcode, self._restarts + 1
        how = f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
        if self._restarts > MAX_RESTARTS:
            raise WorkerKilledError(
                f"a loader process ended {how}, {self._restarts} times: signal 9 mostly means that the machine ran out "
                "of memory; use fewer processes (--data.num_workers), or none (0)"
            )
        _LOG.warning("a loader process ended %s; starting it again (%d of %d times)", how, self._restarts, MAX_RESTARTS)
        self._pipe.close()
        self._start()
        for task in self._owed:
            self._pipe.send(task)

    def forget(self) -> None:
        """Wait for what was asked for and is not wanted any more (a pass that was broken off)."""
        while self._owed:
            try:
                self.answer()
            except WorkerKilledError:
                raise
            except Exception as error:  # of a batch that nobody asks for any more
                _LOG.info("a batch that is not wanted any more: %s", error)

    def end(self) -> None:
        self._pipe.close()
        self._process.kill()
        self._process.join()
        self._process.close()


def _work(fill: Fill, slots: np.ndarray, pipe: Any, parents: Any, parent: int) -> None:
    """The life of a worker: a task, a filled slot, an answer."""
    parents.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # These go to all processes of a job or terminal: the parent's affair.
    for warning in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGXCPU):
        signal.signal(warning, signal.SIG_IGN)
    gc.enable()  # in its parent it is off while a run trains (training/garbage.py)
    torch.set_num_threads(1)  # a forked process cannot use its parent's OpenMP threads: it would hang
    while True:
        while not pipe.poll(_PATIENCE):
            if os.getppid() != parent:  # the pipe alone does not tell: sisters hold copies of its other end
                os._exit(1)
        try:
            keys, number, slot = pipe.recv()
        except (EOFError, OSError):
            os._exit(0)
        try:
            answer: tuple[Exception | None, Any] = None, fill(keys[number], slots[slot])
        except Exception as error:
            error.add_note("in a loader process:\n" + traceback.format_exc())
            answer = error, None
        pipe.send(answer)
