"""A hang ends, with a record of it and a name.

A thread looks whether the loop still makes steps. When it has not for too long, each live process writes where all its
threads stand (and torch's flight recorder: the last collectives) into `hangs/`; who writes nothing there is stopped,
dead or cut off, and is named. Then the process ends, so that torchrun can start the group anew. Nothing is sent while
all is well.
"""

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

import torch.distributed as dist

from mimir_fast.world import World

EXIT_CODE = 75  # EX_TEMPFAIL: trying again may help
_GRACE = 5.0  # seconds for the others to write theirs


class Watchdog:
    """Started once; `beat` after each step, `allow` before something that may take longer.

    Args:
        folder: the run's `hangs/`; None keeps no record.
        minutes: without a step that are a hang; 0 never.
    """

    def __init__(self, world: World, folder: Path | None, minutes: float) -> None:
        self.world, self.folder, self.patience = world, folder, 60 * minutes
        self.step = 0
        self._deadline = time.monotonic() + 6 * self.patience  # the first step compiles
        self._over = threading.Event()
        if minutes:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, step: int) -> None:
        """Note that a step was done: the time until the next one counts from now."""
        self.step, self._deadline = step, time.monotonic() + self.patience

    def allow(self, factor: float = 6) -> None:
        """What comes now, an evaluation say, may take `factor` times longer."""
        self._deadline = time.monotonic() + factor * self.patience

    def close(self) -> None:
        """Stop looking; the thread ends."""
        self._over.set()

    def _watch(self) -> None:
        pause = min(1.0, self.patience / 10)
        asleep = time.monotonic()
        while not self._over.wait(pause):
            now = time.monotonic()
            if now - asleep > 10 * pause + 1:  # this process itself was stopped (Ctrl-Z): it has not had its time
                self._deadline += now - asleep
            asleep = now
            if now > self._deadline:
                self._end()

    def _end(self) -> None:
        stamp = f"step-{self.step:08d}"
        silent: list[str] = []
        if self.folder is not None:
            record = self.folder / stamp
            try:
                self._record(record)
                time.sleep(min(_GRACE, self.patience))
                silent = [str(r) for r in range(self.world.size) if not (record / f"rank-{r}.txt").exists()]
            except OSError as error:
                silent = [f"unknown, {record} cannot be written ({error})"]
        what = f"rank {', '.join(silent)} gives no sign (stopped, dead or cut off; environment.json says where it runs)"
        where = f"every rank is alive; {record}/rank-*.txt say where each one stands" if self.folder else "no record"
        print(
            f"error: no step for {self.patience / 60:.3g} minutes after step {self.step}, seen by {self.world.name}: "
            f"{what if silent else where}. Leaving, so that torchrun can start again; --hang_minutes waits longer",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        os._exit(EXIT_CODE)

    def _record(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"rank-{self.world.rank}.txt").open("w") as file:
            file.write(f"{self.world.name}, after step {self.step}\n")
            file.flush()
            faulthandler.dump_traceback(file)
        if dist.is_initialized():
            from torch._C import _distributed_c10d as c10d

            dump = getattr(c10d, "_dump_fr_trace_json", None)  # torch has no public name for it
            if dump is not None:
                (folder / f"rank-{self.world.rank}.collectives.json").write_bytes(dump())
