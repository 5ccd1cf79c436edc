"""The one training loop: a task, a loader, an optimiser, and steps that are functions of (seed, step).

Everything that could differ between an uninterrupted run and a resumed one is either saved (weights, optimiser state,
stream position) or computed from the step (learning rate, masks, noise, drop path), so resuming is exact on CPU.
"""

import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mimir_fast.data.batch import Batch
from mimir_fast.data.loaders.base import Loader
from mimir_fast.training import checkpoint as ckpt
from mimir_fast.training.distributed import Strategy, World, agree, gradient_sync, mean_over_ranks, parallelize
from mimir_fast.training.ema import Ema
from mimir_fast.training.health import StepGuard, StopSignal
from mimir_fast.training.loggers import Logger
from mimir_fast.training.optimizer import OptimizerConfig, build_optimizer
from mimir_fast.training.task import Task


@dataclass
class RunConfig:
    """Length, size, precision and housekeeping of a run."""

    output_dir: str = ""
    """Folder of the run; runs/RECIPE when empty."""
    epochs: float = 800
    """Passes over the data."""
    max_steps: int | None = None
    """Optimiser steps; overrides epochs, the schedule fits it."""
    stop_after: int | None = None
    """Save and leave after this many steps of this start, as SIGTERM would; the schedule is not changed."""
    warmup_epochs: float = 40
    """Linear warm-up; with --max_steps it shrinks in proportion to epochs."""
    batch_size: int = 512
    """Global batch: images of one optimiser step over all ranks and accumulation steps."""
    accum_iter: int = 1
    """Micro-batches a rank accumulates for one optimiser step."""
    seed: int = 0
    """Of weights, sample order, augmentation, masks and noise."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    strategy: Strategy = "auto"
    """auto: one process or DDP. fsdp shards parameters and optimiser state over ranks (FSDP2)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on CUDA, fp32 on CPU. MI, losses and targets are fp32 always."""
    compile: bool = False
    """torch.compile each transformer block."""
    clip_grad: float | None = None
    """Largest norm of the gradient."""
    ema_decay: float = 0.0
    """Moving average of the weights; 0 is off."""
    log_every: int = 10
    """Steps between log lines."""
    picture_every: int = 0
    """Steps between pictures; 0 is only at the end."""
    save_every: int = 200
    """Steps between checkpoints."""
    keep_last: int = 3
    """Checkpoints to keep."""
    resume: bool = True
    """Go on from the newest checkpoint in output_dir, if there is one."""
    overwrite: bool = False
    """Delete the run in output_dir and start anew."""
    allow_changes: bool = False
    """Resume although the configuration changed."""
    max_bad_steps: int = 10
    """NaN/Inf steps in a row that stop the run."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "accum_iter", "log_every", "save_every", "keep_last", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}, wanted at least 1")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"max_steps={self.max_steps}, wanted at least 1 (or leave it out for --epochs)")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay}, wanted 0 (off) or a number below 1 such as 0.9999")

    def total_steps(self, samples_per_epoch: int) -> int:
        """Optimiser steps of the whole run."""
        if self.max_steps is not None:
            return self.max_steps
        return max(1, round(self.epochs * samples_per_epoch / self.batch_size))

    def warmup_steps(self, samples_per_epoch: int) -> int:
        """Steps of the linear warm-up; a run of fewer epochs than planned keeps the planned fraction."""
        wanted = round(self.warmup_epochs * samples_per_epoch / self.batch_size)
        if self.max_steps is None:
            return wanted
        planned = max(1, round(self.epochs * samples_per_epoch / self.batch_size))
        return min(wanted, round(self.max_steps * wanted / planned))


class Trainer:
    """Runs a task to its end, or to the signal that stops it.

    Args:
        task: what is trained; its model is moved to the world's device.
        loader: endless stream of this rank's micro-batches.
        config: the whole configuration as plain values, for the checkpoint's meta data.
        folder: the run's folder.
        logger: the main rank's loggers, a no-op elsewhere.
    """

    def __init__(
        self, task: Task, loader: Loader, run: RunConfig, optim: OptimizerConfig, config: dict[str, Any], folder: Path,
        world: World, logger: Logger,
    ) -> None:  # fmt: skip
        self.task, self.loader, self.run, self.optim, self.config = task, loader, run, optim, config
        self.folder, self.world, self.logger = folder, world, logger
        cuda = world.device.type == "cuda"
        self.bf16 = run.precision == "bf16" or (run.precision == "auto" and cuda)
        task.model.to(world.device).train()
        self.model = parallelize(task.model, run.strategy, world, bf16=self.bf16, compile_blocks=run.compile)
        self.optimizer = build_optimizer(task.model, optim)
        self.ema = Ema(task.model, run.ema_decay) if run.ema_decay else None
        # Sharded gradients are DTensors, which the fused step's flag is not: there the host looks before it steps.
        on_device = cuda and optim.optimizer == "adamw" and run.strategy != "fsdp"
        self.guard = StepGuard(self.optimizer, folder / "bad_batches", run.max_bad_steps, on_device=on_device)
        self.total_steps = run.total_steps(loader.epoch_length)
        self.warmup_steps = run.warmup_steps(loader.epoch_length)
        self.step, self.best_score = 0, float("-inf")
        self._meter = Meter(run.batch_size)

    def resume(self) -> bool:
        """Load the newest checkpoint of the folder; False when there is none."""
        found = ckpt.checkpoints_of(self.folder)
        if not found:
            return False
        meta = ckpt.read_meta(found[-1])
        ckpt.make_room_for_optimizer(found[-1], self.task.model, self.optimizer)
        tensors = ckpt.training_tensors(self.task.model, self.optimizer, self.ema)
        ckpt.load_checkpoint(found[-1], tensors)
        self.loader.load_state_dict(meta["loader"])
        self.step, self.guard.skipped = meta["step"], meta["skipped"]
        self.best_score = float("-inf") if meta["best_score"] is None else meta["best_score"]
        return True

    def train(self) -> bool:
        """Train to the end. False when a signal (or `stop_after`) ended the run early; all work is saved either way."""
        stop = StopSignal()
        last = (
            self.total_steps if self.run.stop_after is None else min(self.total_steps, self.step + self.run.stop_after)
        )
        batches = iter(self.loader)
        saved_at = self.step
        micro: list[Batch] = []
        try:
            while self.step < last:
                micro = [next(batches) for _ in range(self.run.accum_iter)]
                metrics = self.train_step(micro)
                self.step += 1
                self._meter.add(metrics, self.loader.wait_seconds)
                if self.step % self.run.log_every == 0 or self.step == last:
                    self._log()
                if self._ends_epoch():
                    self._evaluate()
                if self.run.picture_every and self.step % self.run.picture_every == 0 and self.step < self.total_steps:
                    self._pictures(micro[0])
                if self.step % self.run.save_every == 0 and self.step < last:
                    saved_at = self.step if self.save() else saved_at
                if agree(stop.received is not None):
                    self.logger.say(f"{stop.received or 'a signal on another rank'}: saving and leaving")
                    break
            self.guard.poll()
            if micro and self.step == self.total_steps:
                self._pictures(micro[0])
            if saved_at != self.step and not self.save():
                self.save(last_chance=True)
        finally:
            stop.restore()
        return self.step == self.total_steps

    def train_step(self, micro: list[Batch]) -> dict[str, Tensor]:
        """One optimiser step on the micro-batches; returns detached scalars on the device."""
        lr = self.optim.lr_at(
            self.step, batch_size=self.run.batch_size, total_steps=self.total_steps, warmup_steps=self.warmup_steps
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        metrics: dict[str, Tensor] = {}
        for index, batch in enumerate(micro):
            with gradient_sync(self.model, index == len(micro) - 1):
                with self._autocast():
                    out = self.task.losses(self.model, batch, seed=self.run.seed, step=self.step)
                (out["loss"] / len(micro)).backward()
            for name, value in out.items():
                metrics[name] = metrics.get(name, 0) + value.detach() / len(micro)
        self.guard.poll()
        norm = self._clip_gradients()
        self.guard.step(self.step, torch.isfinite(norm), micro)
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update()
        return metrics | {"grad_norm": norm}

    def _clip_gradients(self) -> Tensor:
        """Norm of the whole gradient, before clipping."""
        parameters = [p for p in self.task.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.run.clip_grad is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.run.clip_grad, norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def save(self, name: str | None = None, *, last_chance: bool = False) -> bool:
        """Write a checkpoint; a full disk is said loudly and the run goes on, unless this was the last chance.

        Raises:
            OSError: it could not be written and `last_chance` is set.
        """
        meta = {
            "kind": self.task.kind,
            "step": self.step,
            "skipped": self.guard.skipped,
            "best_score": self.best_score if math.isfinite(self.best_score) else None,  # JSON has no infinity
            "loader": self.loader.state_dict(),
            "world_size": self.world.size,
            "architecture": self.task.architecture,
            "config": self.config,
        }
        tensors = ckpt.training_tensors(self.task.model, self.optimizer, self.ema)
        try:
            ckpt.save_checkpoint(self.folder / "checkpoints" / (name or f"step-{self.step:08d}"), tensors, meta)
        except OSError as error:
            if last_chance:
                raise
            self.logger.say(f"WARNING: {error}. Free some space: the next try is in {self.run.save_every} steps")
            return False
        if self.world.is_main and name is None:
            ckpt.keep_last(self.folder, self.run.keep_last)
        return True

    def _autocast(self) -> Any:
        return torch.autocast(self.world.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def _ends_epoch(self) -> bool:
        """True after the step in which a pass over the data was completed, and after the last."""
        per_epoch = self.loader.epoch_length
        done = self.step * self.run.batch_size
        return done // per_epoch > (done - self.run.batch_size) // per_epoch or self.step == self.total_steps

    def _evaluate(self) -> None:
        if self.ema is not None:
            self.ema.swap()
        with self._autocast():
            values = self.task.evaluate(self.model, step=self.step)
        if self.ema is not None:
            self.ema.swap()
        if not values:
            return
        self.logger.scalars(self.step - 1, values)
        if alarm := self.task.alarm():
            self.logger.say(f"WARNING: {alarm}")
        self._meter.restart(self.loader.wait_seconds)
        if values.get("score", float("-inf")) > self.best_score:
            self.best_score = values["score"]
            self.save("best")

    def _pictures(self, batch: Batch) -> None:
        with self._autocast():
            pictures = self.task.pictures(self.model, batch, seed=self.run.seed, step=self.step)
        for name, image in pictures.items():
            self.logger.picture(self.step, name, image)

    def _log(self) -> None:
        values = self._meter.read(self.world.device, self.loader.wait_seconds)
        values["lr"] = self.optimizer.param_groups[-1]["lr"]
        values["epoch"] = self.step * self.run.batch_size / self.loader.epoch_length
        values["eta_s"] = (self.total_steps - self.step) * self.run.batch_size / max(values["images_per_s"], 1e-9)
        if self.guard.skipped:
            values["skipped_steps"] = self.guard.skipped
        self.logger.scalars(self.step - 1, values)


class Meter:
    """Means of the scalars since the last reading, speed, waiting and memory. Only reading waits for the device."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.restart(0.0)

    def restart(self, wait_seconds: float) -> None:
        """Forget what was added; `wait_seconds` is the loader's total so far."""
        self._sums: dict[str, Tensor] = {}
        self._steps, self._since, self._waited = 0, time.perf_counter(), wait_seconds

    def add(self, metrics: dict[str, Tensor], wait_seconds: float) -> None:
        """The scalars of one step."""
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0) + value.float()
        self._steps += 1

    def read(self, device: torch.device, wait_seconds: float) -> dict[str, float]:
        """Means over the steps since the last call, over all ranks; collective."""
        steps = max(1, self._steps)
        stacked = mean_over_ranks(torch.stack(list(self._sums.values())) / steps).tolist() if self._sums else []
        elapsed = time.perf_counter() - self._since
        values = dict(zip(self._sums, stacked, strict=True))
        values["images_per_s"] = self._steps * self.batch_size / elapsed
        values["data_wait"] = (wait_seconds - self._waited) / elapsed
        values["memory_gib"] = _memory_bytes(device) / 2**30
        self.restart(wait_seconds)
        return values


def _memory_bytes(device: torch.device) -> int:
    """Peak memory: of the allocator on CUDA, of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
