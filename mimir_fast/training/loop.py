"""The one training loop: a task, a loader, an optimiser, and steps that are functions of (seed, step).

Everything that could differ between an uninterrupted run and a resumed one is either saved (weights, optimiser state,
stream position) or computed from the step (learning rate, masks, noise, drop path), so resuming is exact on CPU.
"""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimir_fast.data.batch import Batch
from mimir_fast.data.loaders.base import Loader
from mimir_fast.layers.borrowing import training_pass
from mimir_fast.methods.registry import restore_state, saved_state
from mimir_fast.training.agreement import Agreement
from mimir_fast.training.checkpointing import Checkpointing
from mimir_fast.training.distributed import parallelize
from mimir_fast.training.ema import Ema
from mimir_fast.training.garbage import collect_after
from mimir_fast.training.health import LossWatch, StepGuard, StopSignal, TrainingDiverged
from mimir_fast.training.loggers import Logger
from mimir_fast.training.meter import Meter
from mimir_fast.training.optimizer import OptimizerConfig, build_optimizer, clip_gradients
from mimir_fast.training.precision import Choice
from mimir_fast.training.run_config import RunConfig
from mimir_fast.training.run_folder import RunFolder
from mimir_fast.training.state import group_steps, load_training, set_group_steps, training_tensors
from mimir_fast.training.statistics import StatisticsGuard
from mimir_fast.training.task import Task
from mimir_fast.training.watchdog import Watchdog
from mimir_fast.world import World

__all__ = ["RunConfig", "Trainer"]


class Trainer:
    """Runs a task to its end, or to the signal that stops it.

    Args:
        task: what is trained; its model is moved to the world's device.
        loader: endless stream of this rank's micro-batches.
        config: the whole configuration as plain values, for the checkpoint's meta data.
        logger: the main rank's loggers, a no-op elsewhere.
        accum_iter: micro-batches of a step on this rank.
    """

    def __init__(
        self, task: Task, loader: Loader, run: RunConfig, optim: OptimizerConfig, config: dict[str, Any],
        folder: RunFolder, world: World, logger: Logger, *, precision: Choice, accum_iter: int,
    ) -> None:  # fmt: skip
        self.task, self.loader, self.run, self.optim, self.config = task, loader, run, optim, config
        self.folder, self.world, self.logger = folder, world, logger
        self.precision, self.accum_iter = precision, accum_iter
        task.model.to(world.device).train()
        self.model = parallelize(
            task.model, run.strategy, world, bf16=precision.bf16, compiled=run.compile,
            checkpoint_activations=run.checkpoint_activations, shard_ranks=run.shard_ranks,
        )  # fmt: skip
        self.optimizer = build_optimizer(task.model, optim)
        self.ema = Ema(task.model, run.ema_decay) if run.ema_decay else None
        self.statistics = StatisticsGuard(task.model)
        # Sharded gradients are DTensors, which the fused step's flag is not: there the host looks before it steps.
        on_device = world.device.type == "cuda" and optim.optimizer == "adamw" and run.strategy != "fsdp"
        bad = folder.path / "bad_batches"
        self.guard = StepGuard(self.optimizer, bad, run.max_bad_steps, on_device=on_device)
        self.losses, self.checkpoints = LossWatch(), Checkpointing(folder, world, run, logger)
        self.total_steps = run.total_steps(loader.epoch_length)
        self.warmup_steps = run.warmup_steps(loader.epoch_length)
        self.micro_batch = -(-run.batch_size // (world.size * accum_iter))
        self.step, self.skipped_files = 0, 0
        self._position, self._whole = loader.state_dict(), True  # as of the last step, which a run may stop after
        self._meter = Meter(run.batch_size, world, loader)
        self.ideal_seconds: float | None = None
        """Of a step, were every device at its peak (flops.py); None where that is not known."""

    def restore(self, checkpoint: Path, meta: dict[str, Any]) -> None:
        """Go on from a checkpoint; another optimizer than its own starts without state. Collective.

        Raises:
            ValueError: it is beyond the steps of this run.
        """
        if meta["step"] > self.total_steps:
            raise ValueError(
                f"{checkpoint} is at step {meta['step']}, and this run has {self.total_steps}: give more --max_steps "
                "(or --epochs), or another --output_dir"
            )
        same = meta["config"]["optim"]["optimizer"] == self.optim.optimizer
        load_training(checkpoint, self.task.model, self.optimizer if same else None, self.ema)
        if same:
            set_group_steps(self.optimizer, meta.get("group_steps", []))
        self.loader.load_state_dict(meta["loader"])
        self._position, self.step = self.loader.state_dict(), meta["step"]
        self.guard.skipped, self.guard.in_a_row = meta["skipped"], meta.get("skipped_in_a_row", 0)
        self.losses.first = meta.get("first_loss")
        restore_state(self.task.method, meta.get("method", {}), self.world.device)
        self.checkpoints.restore(self.step, meta)

    def train(self, stop: StopSignal, watchdog: Watchdog, after_step: Callable[[], None] = lambda: None) -> bool:
        """Train to the end. False when a signal (or `stop_after`) ended the run early; all work is saved either way."""
        agreement = Agreement(self.world, self.step)
        replays, last = self.task.replays, self.total_steps
        if self.run.stop_after is not None:
            last = min(last, -(-(self.step + self.run.stop_after) // replays) * replays)
        batches = iter(self.loader)
        micro: list[Batch] = []
        stopping = False
        try:
            while self.step < last:
                if not micro or self.step % replays == 0:
                    micro = [next(batches) for _ in range(self.accum_iter)]
                self._meter.add(self.train_step(micro))
                watchdog.beat(self.step)
                self._report(watchdog, logs=self.step in (1, last) or self.step % self.run.log_every == 0)
                timed = self.checkpoints.time_is_up()
                asked, timed = agreement.ask(self.step, stop=stop.received is not None, save=timed)
                stopping = stopping or asked
                due = self.checkpoints.due(self.step, last, timed=timed)
                # Skipped steps mean trouble: what was saved before it stays the newest.
                if due and self.guard.sound and self._whole:
                    self.checkpoints.save(self.step, *self._state())
                if self.run.picture_every and self.step % self.run.picture_every == 0 and self.step < self.total_steps:
                    self._pictures(micro[0])
                collect_after(self.step)
                after_step()
                if stopping and self._whole:
                    self.logger.say(f"{stop.received or 'a signal on another rank'}: saving and leaving")
                    break
            self.guard.poll()
            watchdog.allow()
            self.checkpoints.finish(self.step, *self._state())
        except TrainingDiverged as error:
            self.checkpoints.settle()
            if self.world.is_main:
                self.folder.diverged(error.first_bad, self.config)
            raise
        except Exception as error:
            self._rescue(error)
            raise
        if micro and self.step == self.total_steps:
            self._pictures(micro[0])
        return self.step == self.total_steps

    def train_step(self, micro: list[Batch]) -> dict[str, Tensor]:
        """One optimiser step on the micro-batches; returns detached scalars on the device."""
        lr = self.optim.lr_at(
            self.step, batch_size=self.run.batch_size, total_steps=self.total_steps, warmup_steps=self.warmup_steps
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        metrics: dict[str, Tensor] = {}
        self.statistics.before_step()
        with self._autocast():
            passes = self.task.passes(self.model, micro, seed=self.run.seed, step=self.step)
        for index, (batch, losses) in enumerate(zip(micro, passes, strict=True)):
            # Gradients are averaged over ranks; micro-batches of other sizes count by their images.
            weight = len(batch.images) * self.world.size / self.run.batch_size
            with training_pass(self.model, reduces=index == len(micro) - 1):
                with self._autocast():
                    out = losses()
                (out["loss"] * weight).backward()
            for name, value in out.items():
                metrics[name] = metrics.get(name, 0) + value.detach() * weight
        self.guard.poll()
        norm = clip_gradients(self.task.model, self.run.clip_grad)
        self._whole = False
        finite = torch.isfinite(norm)
        self.guard.step(self.step, finite, micro)
        self.statistics.after_step(finite)
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update()
        self.step, self._position = self.step + 1, self.loader.state_dict()
        # What a method takes from one step on a batch to the next is not saved.
        self._whole = self.step % self.task.replays == 0 or self.step == self.total_steps
        return metrics | {"grad_norm": norm}

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint of the last whole step holds: tensors, and meta data as JSON knows them."""
        meta = {
            "kind": self.task.kind,
            "step": self.step,
            "loader": self._position,
            "skipped": self.guard.skipped,
            "skipped_in_a_row": self.guard.in_a_row,
            "healthy": self.losses.healthy,
            "first_loss": self.losses.first,
            "method": saved_state(self.task.method),
            "group_steps": group_steps(self.optimizer),
            "precision": self.precision.name,
            "world_size": self.world.size,
            "micro_batch": self.micro_batch,
            "architecture": self.task.architecture,
            "config": self.config,
        }
        return training_tensors(self.task.model, self.optimizer, self.ema), meta

    def _rescue(self, error: Exception) -> None:
        """Save the last whole step, if this process can do so alone: its peers do not know of the error."""
        if self.world.size == 1 and self._whole and self.step not in (0, self.checkpoints.saved):
            self.logger.say(f"{type(error).__name__}: saving step {self.step} before leaving")
            self.checkpoints.save(self.step, *self._state())
            self.checkpoints.settle()

    def _autocast(self) -> Any:
        return torch.autocast(self.world.device.type, torch.bfloat16) if self.precision.bf16 else nullcontext()

    def _ends_epoch(self) -> bool:
        """True after the steps on a batch in which a pass over the data was completed, and after the last."""
        per_epoch, done = self.loader.epoch_length, self.step * self.run.batch_size
        before = (self.step - 1) // self.task.replays * self.task.replays * self.run.batch_size
        return (self._whole and done // per_epoch > before // per_epoch) or self.step == self.total_steps

    def _report(self, watchdog: Watchdog, *, logs: bool) -> None:
        """Log the numbers of a step, those of an evaluation with them."""
        values = self._read() if logs else {}
        try:
            if self._ends_epoch():
                values |= self._evaluate(watchdog)
        finally:
            if values:
                self.logger.scalars(self.step - 1, values)

    def _evaluate(self, watchdog: Watchdog) -> dict[str, float]:
        watchdog.allow()
        with self.ema.swapped() if self.ema is not None else nullcontext(), self._autocast():
            values = self.task.evaluate(self.model, step=self.step)
        watchdog.beat(self.step)
        if values:
            self.logger.evaluated(self.step - 1, values)
            self._meter.restart()
        if alarm := self.task.alarm():
            self.logger.say(f"WARNING: {alarm}")
        if "score" in values:
            self.checkpoints.scored(self.step, values["score"])
        return values

    def _pictures(self, batch: Batch) -> None:
        """Decoration: it is not worth a run."""
        try:
            with self._autocast():
                pictures = self.task.pictures(self.model, batch, seed=self.run.seed, step=self.step)
        except (OSError, ImportError) as error:
            return self.logger.say(f"WARNING: no picture of step {self.step}: {error}")
        for name, image in pictures.items():
            self.logger.picture(self.step - 1, name, image)

    def _read(self) -> dict[str, float]:
        values = self._meter.read()
        self.losses.note(values["loss"])
        self.skipped_files = int(values.get("skipped_files", 0))
        values["lr"] = self.optimizer.param_groups[-1]["lr"]
        values["epoch"] = self.step * self.run.batch_size / self.loader.epoch_length
        if self.step > 1:  # the first step compiles and allocates, it says nothing of the others
            values["eta_s"] = (self.total_steps - self.step) * self.run.batch_size / max(values["images_per_s"], 1e-9)
            if self.ideal_seconds is not None:
                values["mfu"] = self.ideal_seconds / values["step_s"]
        if self.guard.skipped:
            values["skipped_steps"] = self.guard.skipped
        return values
