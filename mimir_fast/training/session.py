"""One start of a run, from processes to closing words: what all tasks have in common around the loop."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from mimir_fast.data import DataConfig, build_loader
from mimir_fast.data.order import micro_batch_size
from mimir_fast.models.attention import attention_backend
from mimir_fast.training.distributed import World, agree, start_world, stop_world
from mimir_fast.training.loggers import JsonLines, Logger, Loggers, Pictures, TensorBoard, Terminal
from mimir_fast.training.loop import RunConfig, Trainer
from mimir_fast.training.optimizer import OptimizerConfig
from mimir_fast.training.pictures import save_curves
from mimir_fast.training.run_folder import open_run
from mimir_fast.training.task import Task
from mimir_fast.versions import python_command


class SessionConfig(Protocol):
    """What a configuration of any task has: data, optimiser, run, and the folder it lives in."""

    data: DataConfig
    optim: OptimizerConfig
    run: RunConfig

    @property
    def folder(self) -> Path:
        """Where the run lives."""
        ...


def run_session(config: Any, build_task: Callable[[World], Task]) -> Path:
    """Run a task to its end (or to a signal) and return the run's folder.

    Args:
        config: a dataclass that is a SessionConfig; written into the folder and the checkpoints.
        build_task: makes the task, with its model, on each process.
    """
    world = start_world(config.run.device)
    try:
        return _run(config, world, build_task)
    finally:
        stop_world()


def _run(config: Any, world: World, build_task: Callable[[World], Task]) -> Path:
    run, folder = config.run, config.folder
    micro = micro_batch_size(run.batch_size, world.size, run.accum_iter)
    problem = None
    if world.is_main:
        try:
            open_run(folder, config, resume=run.resume, overwrite=run.overwrite, allow_changes=run.allow_changes)
        except FileExistsError as error:
            problem = error
    if agree(problem is not None):  # all ranks leave together, one says why
        raise problem or FileExistsError(f"{folder} cannot be used; rank 0 says why")
    loader = build_loader(
        config.data, split="train", batch_size=micro, device=world.device, rank=world.rank, world_size=world.size,
        seed=run.seed, accum_iter=run.accum_iter,
    )  # fmt: skip
    task = build_task(world)
    trainer = Trainer(task, loader, run, config.optim, json.loads(json.dumps(asdict(config))), folder, world, Logger())
    resumed = trainer.resume()
    trainer.logger = logger = build_logger(folder, world, trainer.total_steps, trainer.step)
    try:
        logger.say(f"{task.describe(loader.num_samples)}\n{surroundings(config, world, trainer)}")
        if resumed:
            logger.say(f"resumed at step {trainer.step} of {trainer.total_steps}")
        finished = trainer.train()
    finally:
        logger.close()
        loader.close()
    if world.is_main:
        print(closing_words(folder, task, trainer, finished), flush=True)
    return folder


def build_logger(folder: Path, world: World, total_steps: int, first_step: int) -> Logger:
    """Terminal, metrics.jsonl, TensorBoard and PNG files on the main rank."""
    if not world.is_main:
        return Logger()
    return Loggers(
        [
            Terminal(total_steps, first_step),
            JsonLines(folder / "metrics.jsonl", first_step),
            TensorBoard(folder / "tensorboard", first_step),
            Pictures(folder / "pictures"),
        ]
    )


def surroundings(config: SessionConfig, world: World, trainer: Trainer) -> str:
    """On what it runs, through which backends."""
    millions = sum(p.numel() for p in trainer.task.model.parameters() if p.requires_grad) / 1e6
    return (
        f"{millions:.1f} M parameters, {world.size} x {world.device}, {'bf16' if trainer.bf16 else 'fp32'}, "
        f"attention: {attention_backend(world.device)}, batch {config.run.batch_size}, "
        f"{trainer.total_steps} steps -> {config.folder}"
    )


def closing_words(folder: Path, task: Task, trainer: Trainer, finished: bool) -> str:
    """Where everything is and what to type next."""
    if not finished:
        return f"stopped at step {trainer.step} of {trainer.total_steps}; the same command goes on from there"
    lines = [f"done: {trainer.total_steps} steps", f"  checkpoint  {folder}/checkpoints/step-{trainer.step:08d}"]
    if (folder / "checkpoints" / "best").is_dir():
        lines.append(f"  best        {folder}/checkpoints/best (score {trainer.best_score:.4f})")
    if save_curves(folder / "metrics.jsonl", folder / "curves.png", task.curves):
        lines.append(f"  curves      {folder}/curves.png")
    pictures = sorted((folder / "pictures").glob("*.png"), key=lambda path: path.stat().st_mtime)
    if pictures:
        lines.append(f"  picture     {pictures[-1]}")
    if trainer.guard.skipped:
        lines.append(
            f"  {trainer.guard.skipped} non-finite steps were skipped; their batches are in {folder}/bad_batches"
        )
    return "\n".join([*lines, f"next: {python_command()} -m {task.next_command(folder)}"])
