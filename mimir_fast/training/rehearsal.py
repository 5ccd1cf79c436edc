"""A dry run: everything is built, some steps are made, and what the run would take is said. Nothing is written."""

import time
from itertools import islice

from mimir_fast.training.health import StopSignal
from mimir_fast.training.loop import Trainer
from mimir_fast.training.meter import memory_bytes
from mimir_fast.training.state import training_tensors
from mimir_fast.training.terminal import duration

STEPS = 3  # the first compiles and allocates; the fastest of the others counts


def rehearse(trainer: Trainer, stop: StopSignal) -> None:
    """Make some steps and print time, memory and disk. Collective; the model is not what it was afterwards."""
    stop.training = True  # nothing to save, but a signal still lets the steps end together
    world, times = trainer.world, []
    batches = iter(trainer.loader)
    for _ in range(STEPS):
        started = time.perf_counter()
        metrics = trainer.train_step(list(islice(batches, trainer.accum_iter)))
        loss = float(metrics["loss"])  # waits for the device
        times.append(time.perf_counter() - started)
    seconds, memory = min(times[1:]), memory_bytes(world.device) / 2**30
    slowest, largest = (max(column) for column in zip(*world.together(lambda: (seconds, memory)), strict=True))
    tensors = training_tensors(trainer.task.model, trainer.optimizer, trainer.ema).values()
    gigabytes = sum(t.numel() * t.element_size() for t in tensors) / 1e9
    trainer.loader.close()
    if world.is_main:
        run = trainer.run
        print(
            f"{trainer.task.describe(trainer.loader.num_samples)}\n"
            f"dry run: loss {loss:.4f} after {STEPS} steps; nothing was written\n"
            f"  time     {slowest:.3g} s a step, {run.batch_size / slowest:,.0f} images/s; {trainer.total_steps} steps "
            f"take {duration(slowest * trainer.total_steps)} and evaluations (the first step took {times[0]:.3g} s)\n"
            f"  memory   {largest:.2f} GiB a rank at most\n"
            f"  disk     {gigabytes:.2f} GB a checkpoint, {run.keep_last + 2} of them at times",
            flush=True,
        )
