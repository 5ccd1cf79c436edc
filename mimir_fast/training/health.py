"""Keeping a run alive: non-finite steps and signals.

A NaN or Inf makes the step a no-op on the device itself (fused AdamW takes a `found_inf` flag), so the host need not
wait for it; the flag is read when the next step has been queued. The batch that did it is saved for study, and after
`max_bad_steps` in a row the run stops with advice.
"""

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from mimir_fast.data.batch import Batch


class TrainingDiverged(RuntimeError):
    """Too many non-finite steps in a row."""


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
                f"--blr (or --lr) divided by 10 and --allow_changes. The last batch is in {saved}"
            )

    def _save(self, step: int, batches: list[Batch]) -> Path:
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        path = self.folder / f"step-{step:08d}-rank{rank}.safetensors"
        tensors = {}
        for index, batch in enumerate(batches):
            for name in ("images", "labels", "samples", "epochs"):
                tensors[f"{index}/{name}"] = getattr(batch, name).cpu().contiguous()
        save_file(tensors, path)
        return path


class StopSignal:
    """Turns SIGTERM, SIGINT and SIGUSR1 into a flag the loop looks at between steps; a second SIGINT is immediate."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == "SIGINT":
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def restore(self) -> None:
        """Give the signals back to their former handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
