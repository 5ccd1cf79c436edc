"""One start of a run, from processes to closing words: what all tasks have in common around the loop."""

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from mimir_fast.checkpoints.reading import read_meta
from mimir_fast.data import DataConfig, build_loader
from mimir_fast.layers.attention import attention_backend
from mimir_fast.methods.registry import Objective
from mimir_fast.models.freezing import count_parameters
from mimir_fast.training.flops import flops_of_step, peak_flops
from mimir_fast.training.garbage import collected_by_hand
from mimir_fast.training.health import StopSignal
from mimir_fast.training.launch import FINISHED, INTERRUPTED
from mimir_fast.training.loggers import (
    JsonLines,
    Logger,
    Loggers,
    Pictures,
    TensorBoard,
    WeightsAndBiases,
    import_wandb,
)
from mimir_fast.training.loop import Trainer
from mimir_fast.training.optimizer import OptimizerConfig
from mimir_fast.training.pictures import save_curves
from mimir_fast.training.precision import choose_precision
from mimir_fast.training.profiling import profiled
from mimir_fast.training.rehearsal import rehearse
from mimir_fast.training.run_config import RunConfig
from mimir_fast.training.run_folder import RunFolder
from mimir_fast.training.task import Task
from mimir_fast.training.terminal import LogFile, Terminal
from mimir_fast.training.watchdog import Watchdog
from mimir_fast.versions import python_command
from mimir_fast.world import World, start_world, stop_world

BuildTask = Callable[[World, Path | None], Task]


class SessionConfig(Protocol):
    """What a configuration of any task has: the method's options, data, optimiser, run, and the folder it lives in."""

    data: DataConfig
    objective: Objective
    optim: OptimizerConfig
    run: RunConfig

    @property
    def folder(self) -> Path:
        """The run's folder: `--output_dir`, or runs/RECIPE."""
        ...

    @property
    def exact(self) -> bool:
        """It promises somebody's numbers, so the precision `auto` is fp32."""
        ...

    @property
    def frozen(self) -> bool:
        """A part of the model does not train that usually does."""
        ...


def run_session(config: Any, build_task: BuildTask, then: Sequence[str] = ()) -> Path:
    """Run a task to its end (or to a signal) and return the run's folder.

    Args:
        config: a dataclass that is a SessionConfig; written into the folder and the checkpoints.
        build_task: (world, the checkpoint that is gone on from or None) → the task with its model, on each process.
        then: the words after `python -m` of the command to propose in the end.
    """
    world = start_world(config.run.device)
    stop, folder = StopSignal(), RunFolder(config.folder, world)
    try:
        if config.run.dry_run:
            rehearse(build_trainer(config, folder, build_task, None), stop)
        else:
            _run(config, folder, build_task, stop, then)
        stop_world()  # not after a failure: others may be waiting in a collective for this process
    finally:
        stop.restore()
        folder.close()
    return config.folder


def _run(
    config: Any, folder: RunFolder, build_task: BuildTask, stop: StopSignal, then: Sequence[str]
) -> None:  # fmt: skip
    run, world = config.run, folder.world
    if run.wandb:
        world.on_main(lambda: bool(import_wandb()))
    watchdog = Watchdog(world, folder.path / "hangs", run.hang_minutes)
    try:
        folder.open(config, resume=run.resume, overwrite=run.overwrite, allow_changes=run.allow_changes)
        checkpoint = folder.choose()
        trainer = build_trainer(config, folder, build_task, checkpoint)
        folder.begin(config.objective.derived(*batches(trainer)))
        if world.is_main and trainer.task.init_report is not None:
            trainer.task.init_report.save(folder.path)
        trainer.logger = trainer.checkpoints.logger = logger = build_logger(config, folder, trainer)
        for note in folder.notes:
            logger.say(note)
        logger.say(f"{trainer.task.describe(trainer.loader.num_samples)}\n{surroundings(config, trainer)}")
        if checkpoint is not None:
            logger.say(resumed(trainer, read_meta(checkpoint)))
        trainer.ideal_seconds = ideal_seconds(config, trainer)
        stop.training = True
        try:
            with profiled(run.profile, folder.path / "profile", world) as after_step, collected_by_hand():
                finished = trainer.train(stop, watchdog, after_step)
            if world.is_main:
                if finished or stop.received == "SIGINT":
                    folder.end(FINISHED if finished else INTERRUPTED)
                logger.say(closing_words(trainer, finished, then))
        except Exception as error:
            logger.ended(error)
            raise
        finally:
            logger.close()
            trainer.loader.close()
            trainer.checkpoints.close()
    finally:
        watchdog.close()


def build_trainer(config: Any, folder: RunFolder, build_task: BuildTask, checkpoint: Path | None) -> Trainer:
    """The trainer with its data and model, as `checkpoint` left them if there is one. Collective.

    Raises:
        ValueError: options that do not go together.
    """
    run, world = config.run, folder.world
    meta = {} if checkpoint is None else read_meta(checkpoint)
    accum = run.accumulation(world.size, meta if "micro_batch" in meta else None)
    micro, rest = divmod(run.batch_size, world.size * accum)
    if rest and (option := config.objective.needs_even_ranks):
        raise ValueError(
            f"{option} needs ranks with as many images each, but {run.batch_size} do not divide over {world.size} "
            f"ranks x {accum} accumulation steps: change --batch_size or --accum_iter, or that option"
        )
    config.objective.check_batches(micro, accum, world.size)
    recorded = None if checkpoint is None else meta.get("precision", "bf16" if world.device.type == "cuda" else "fp32")
    precision = world.on_main(
        lambda: choose_precision(run.precision, world.device, parity=config.exact, recorded=recorded)
    )
    loader = build_loader(
        config.data, split="train", batch_size=micro + bool(rest), device=world.device, rank=world.rank,
        world_size=world.size, seed=run.seed, accum_iter=accum, global_batch=run.batch_size,
    )  # fmt: skip
    world.agree(lambda: {f"the data's {name}": value for name, value in loader.state_dict().items()})
    plain = json.loads(json.dumps(asdict(config)))
    trainer = Trainer(
        build_task(world, checkpoint), loader, run, config.optim, plain, folder, world, Logger(), precision=precision,
        accum_iter=accum,
    )  # fmt: skip
    if checkpoint is not None:
        trainer.restore(checkpoint, meta)
    return trainer


def batches(trainer: Trainer) -> tuple[int, int, int]:
    """Images of the smallest micro-batch, micro-batches of a step, and ranks."""
    accum_iter, ranks = trainer.accum_iter, trainer.world.size
    return trainer.run.batch_size // (ranks * accum_iter), accum_iter, ranks


def build_logger(config: Any, folder: RunFolder, trainer: Trainer) -> Logger:
    """Terminal, metrics.jsonl, log.txt, TensorBoard and PNG files on the main rank, and what else is asked for."""
    if not folder.world.is_main:
        return Logger()
    path, first = folder.path, trainer.step
    builders: dict[str, Callable[[], Logger]] = {
        "the terminal": lambda: Terminal(trainer.total_steps, first),
        "metrics.jsonl": lambda: JsonLines(path / "metrics.jsonl", first),
        "log.txt": lambda: LogFile(path / "log.txt", trainer.total_steps, first),
        "TensorBoard": lambda: TensorBoard(path / "tensorboard", first),
        "pictures": lambda: Pictures(path / "pictures"),
    }
    if config.run.wandb:
        builders["Weights & Biases"] = lambda: WeightsAndBiases(config.run.wandb, path, trainer.config)
    return Loggers(builders)


def ideal_seconds(config: SessionConfig, trainer: Trainer) -> float | None:
    """Of a step, were every device at its peak; None where that, or what a step computes, is not known."""
    world = trainer.world
    peak = peak_flops(world.device, bf16=trainer.precision.bf16) if world.is_main else None
    if peak is None:
        return None
    try:
        return flops_of_step(config) / (world.size * peak)
    except Exception as error:  # somebody's own method or family may need numbers; it is decoration
        trainer.logger.say(f"NOTE: no MFU, since the operations of a step cannot be counted: {error}")
        return None


def surroundings(config: SessionConfig, trainer: Trainer) -> str:
    """On what it runs, through which backends."""
    world, precision = trainer.world, trainer.precision
    parameters = count_parameters(trainer.task.model, partly=config.frozen)
    accumulated = f" (each accumulates {trainer.accum_iter} micro-batches)" if trainer.accum_iter > 1 else ""
    if said := config.objective.check_batches(*batches(trainer)):
        accumulated += f", {said}"
        if (there := trainer.loader.num_samples) < config.run.batch_size:
            accumulated += f" ({there} different ones: there are no more)"
    return (
        f"{parameters}, {world.size} x {world.device}, {precision.name} ({precision.reason}), "
        f"attention: {attention_backend(world.device)}, batch {config.run.batch_size}{accumulated}, "
        f"{trainer.total_steps} steps -> {config.folder}"
    )


def resumed(trainer: Trainer, meta: dict[str, Any]) -> str:
    """Where it goes on, and what is not as it was."""
    text = f"resumed at step {trainer.step} of {trainer.total_steps}"
    former = meta["config"]["optim"]["optimizer"]
    if former != trainer.optim.optimizer:
        text += f"; {trainer.optim.optimizer} starts without the state of {former}"
    before, size = meta["world_size"], trainer.world.size
    old, new = meta.get("micro_batch"), trainer.micro_batch
    if before != size:
        text += f"; {size} ranks now, {before} before"
    if old is not None and old != new:
        text += (
            f"\nNOTE: micro-batches of {new} images, before of {old}: the mean over the batch is the same, but what is "
            "estimated on a micro-batch (not --mi.accumulated, not mi.scope=global) sees others; --micro_batch "
            f"{old} keeps it where ranks allow"
        )
    return text


def closing_words(trainer: Trainer, finished: bool, then: Sequence[str]) -> str:
    """Where everything is and what to type next."""
    folder, task = trainer.folder.path, trainer.task
    if not finished:
        return f"stopped at step {trainer.step} of {trainer.total_steps}; the same command goes on from there"
    lines = [f"done: {trainer.total_steps} steps", f"  checkpoint  {folder}/checkpoints/step-{trainer.step:08d}"]
    if (best := trainer.folder.best()) is not None and best.is_dir():
        lines.append(f"  best        {folder}/checkpoints/best (score {trainer.checkpoints.best[0]:.4f})")
    try:
        if save_curves(folder / "metrics.jsonl", folder / "curves.png", task.curves):
            lines.append(f"  curves      {folder}/curves.png")
    except OSError as error:
        lines.append(f"  no curves   {error}")
    pictures = sorted((folder / "pictures").glob("*.png"), key=lambda path: path.stat().st_mtime)
    if pictures:
        lines.append(f"  picture     {pictures[-1]}")
    if trainer.guard.skipped:
        lines.append(
            f"  {trainer.guard.skipped} non-finite steps were skipped; their batches are in {folder}/bad_batches"
        )
    if trainer.skipped_files:
        example = next(iter(trainer.loader.skipped), "see the ranks' warnings")
        lines.append(f"  {trainer.skipped_files} unreadable files were passed over, such as {example}")
    if then:
        lines.append(f"next: {shlex.join([python_command(), '-m', *then])}")
    return "\n".join(lines)
