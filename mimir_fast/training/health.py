"""Keeping a run alive: non-finite steps, exploding losses and signals.

A NaN or Inf makes the step a no-op on the device itself (fused AdamW takes a `found_inf` flag), so the host need not
wait for it; the flag is read when the next step has been queued. The batch that did it is saved for study, and after
`max_bad_steps` in a row the run stops with advice.
"""

import math
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from mimir_fast.checkpoints.tensor_files import save_tensors
from mimir_fast.data.batch import Batch
from mimir_fast.world import RunFailed, leave_at_once

MAX_SAVED_BATCHES = 20  # of a rank: enough to study, and a bad week does not fill the disk


class TrainingDiverged(RunFailed):
    """Too many non-finite steps in a row.

    Attributes:
        first_bad: the first of them; the checkpoint of that name holds the weights that led to it.
    """

    def __init__(self, message: str, first_bad: int = 0) -> None:
        super().__init__(message)
        self.first_bad = first_bad


class StepGuard:
    """Skips, counts and documents non-finite optimiser steps.

    Args:
        folder: where offending batches are saved.
        max_bad_steps: so many in a row stop the run.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, folder: Path, max_bad_steps: int, *, on_device: bool) -> None:
        self.optimizer, self.folder, self.max_bad_steps = optimizer, folder, max_bad_steps
        self.on_device = on_device
        self.skipped, self.in_a_row = 0, 0
        self._pending: tuple[int, Tensor, torch.cuda.Event | None, list[Batch]] | None = None

    def step(self, step: int, finite: Tensor, batches: list[Batch]) -> None:
        """optimizer.step(), unless the 0-d bool `finite` is false."""
        if self.on_device:
            optimizer: Any = self.optimizer
            optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()
            optimizer.step()
        elif bool(finite):
            self.optimizer.step()
        event = None
        flag = finite.to("cpu", non_blocking=True)
        if finite.is_cuda:
            event = torch.cuda.Event()
            event.record()
        self._pending = (step, flag, event, batches)

    def poll(self) -> None:
        """Look at the flag of the step before; costs no wait when another step has been queued since.

        Raises:
            TrainingDiverged: `max_bad_steps` in a row were not finite.
        """
        if self._pending is None:
            return
        (step, flag, event, batches), self._pending = self._pending, None
        if event is not None:
            event.synchronize()
        if bool(flag):
            self.in_a_row = 0
            return
        self.skipped += 1
        self.in_a_row += 1
        saved = self._save(step, batches)
        if self.in_a_row >= self.max_bad_steps:
            raise TrainingDiverged(
                f"loss or gradient was NaN or Inf in {self.in_a_row} steps in a row, last in step {step}. The weights "
                "are those before them. The MIMIR authors' advice is a tenth of the learning rate: resume with "
                f"--blr (or --lr) divided by 10 and --allow_changes. The last batch: {saved}",
                first_bad=step - self.in_a_row + 1,
            )

    @property
    def sound(self) -> bool:
        """False after a skipped step; it waits for the newest one.

        Raises:
            TrainingDiverged: see `poll`.
        """
        self.poll()
        return self.in_a_row == 0

    def _save(self, step: int, batches: list[Batch]) -> str:
        """Where the batch is; a disk that takes no more must not end what a skipped step did not."""
        from safetensors import SafetensorError

        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        path = self.folder / f"step-{step:08d}-rank{rank}.safetensors"
        tensors = {}
        for index, batch in enumerate(batches):
            for name in ("images", "labels", "samples", "epochs"):
                tensors[f"{index}/{name}"] = getattr(batch, name).cpu()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if len(list(self.folder.glob(f"*-rank{rank}.safetensors"))) >= MAX_SAVED_BATCHES:
                return f"not saved: {self.folder} has {MAX_SAVED_BATCHES} already"
            save_tensors(tensors, path)
        except (OSError, SafetensorError) as error:
            return f"not saved ({error})"
        return str(path)


class StopSignal:
    """Turns the signals of schedulers and terminals into a flag the loop looks at; a second SIGINT is immediate.

    LSF and submitit warn by SIGUSR2, a limit of processor time by SIGXCPU. Before `training` is set there is nothing to
    save, so the process leaves at once, with 0 like after saving.

    Made when the process group stands: Python's handlers wait for a C++ call to return, and joining may take long.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.training = False
        numbers = (
            signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU,
        )  # fmt: skip
        self._before = {s: signal.signal(s, self._handle) for s in numbers}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and (self.received == "SIGINT" or not self.training):
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
        if not self.training:
            print(f"{self.received} during the start: nothing to save yet, leaving", file=sys.stderr, flush=True)
            leave_at_once(0)

    def restore(self) -> None:
        """Give the signals back to their former handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


class LossWatch:
    """Tells a checkpoint of a healthy run from one whose weights have exploded while everything was still finite.

    Such a loss is worse than that of the untrained model, which the first readings give.
    """

    FACTOR = 2.0

    def __init__(self) -> None:
        self.first: float | None = None
        self.last: float | None = None

    def note(self, loss: float) -> None:
        """A mean over the last steps and all ranks."""
        self.last = loss
        if self.first is None and math.isfinite(loss):
            self.first = abs(loss)

    @property
    def healthy(self) -> bool:
        """False when the last reading is more than twice the first one's size."""
        if self.first is None or self.last is None:
            return self.last is None
        return math.isfinite(self.last) and self.last <= self.FACTOR * self.first
