"""Length, size, precision and housekeeping of a run: the options every task has."""

from dataclasses import dataclass
from typing import Literal

from mimir_fast.training.distributed import Strategy
from mimir_fast.validation import check_fields, check_number

Precision = Literal["auto", "fp32", "bf16"]


@dataclass
class RunConfig:
    """Length, size, precision and housekeeping of a run."""

    output_dir: str = ""
    """Folder of the run; runs/RECIPE when empty. On storage that all hosts share."""
    epochs: float = 800
    """Passes over the data."""
    max_steps: int | None = None
    """Optimiser steps; overrides epochs, the schedule fits it."""
    stop_after: int | None = None
    """Save and stop after this many steps of this start, as SIGTERM would; the schedule is not changed."""
    warmup_epochs: float = 40
    """Linear warm-up; with --max_steps it shrinks in proportion to epochs."""
    batch_size: int = 512
    """Global batch: images of one optimiser step over all ranks and accumulation steps; they need not divide it."""
    accum_iter: int = 1
    """Micro-batches a rank accumulates for one optimiser step, at least; see micro_batch."""
    micro_batch: int | None = None
    """Most images a rank works on at once: fewer ranks accumulate more. None: as many as
    before the number of ranks fell."""
    seed: int = 0
    """Of weights, sample order, augmentation, masks and noise."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    strategy: Strategy = "auto"
    """auto: one process or DDP. fsdp shards parameters and optimiser state over ranks (FSDP2)."""
    shard_ranks: int | None = None
    """With fsdp, shard over this many ranks and replicate over the rest (HSDP); ranks of a host is a good number."""
    checkpoint_activations: bool = False
    """Compute each block's activations again in the backward pass: a third more work for much less memory."""
    precision: Precision = "auto"
    """auto: bf16 autocast on CUDA, and on CPUs that multiply bf16 1.5 times as fast. MI and losses are fp32 always."""
    compile: bool = False
    """torch.compile: the whole model in one process, each layer for itself with ddp and fsdp."""
    clip_grad: float | None = None
    """Largest norm of the gradient."""
    ema_decay: float = 0.0
    """Moving average of the weights; 0 is off."""
    log_every: int = 10
    """Steps between log lines; the first step has one always."""
    picture_every: int = 0
    """Steps between pictures; 0 is only at the end."""
    save_every: int = 200
    """Steps between checkpoints."""
    save_minutes: float = 0.0
    """Save also when so much time has passed since the last checkpoint; 0 is off."""
    keep_last: int = 3
    """Checkpoints to keep, beside the best and the last before a loss exploded."""
    keep_every: int = 0
    """Keep those of every so many steps for good; 0 keeps none."""
    resume: bool = True
    """Resume from the newest checkpoint in output_dir, if there is one."""
    overwrite: bool = False
    """Delete the run in output_dir and start anew; a requeued or restarted launch resumes its own."""
    allow_changes: bool = False
    """Resume although the configuration changed."""
    max_bad_steps: int = 10
    """NaN/Inf steps in a row that stop the run."""
    hang_minutes: float = 15.0
    """Without a step for so long, each rank records what it was doing and the run ends; six times as long at
    start and in evaluations; 0 waits for ever."""
    wandb: str = ""
    """Log to this Weights & Biases project as well."""
    profile: int = 0
    """Record a trace of this many steps, after two, into profile/ (chrome://tracing, perfetto.dev)."""
    dry_run: bool = False
    """Build everything, do three steps, say what the run would take, and write nothing."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("batch_size", "accum_iter", "log_every", "save_every", "keep_last", "max_bad_steps"):
            check_number(name, getattr(self, name), at_least=1)
        for name in ("max_steps", "stop_after", "micro_batch", "shard_ranks"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), at_least=1, hint="or leave it out")
        for name in ("warmup_epochs", "picture_every", "save_minutes", "keep_every", "hang_minutes", "profile"):
            check_number(name, getattr(self, name), at_least=0)
        check_number("epochs", self.epochs, above=0)
        check_number("seed", self.seed, at_least=0, below=2**63)
        check_number("ema_decay", self.ema_decay, at_least=0, below=1, hint="0 is off, 0.9999 is usual")
        if self.clip_grad is not None:
            check_number("clip_grad", self.clip_grad, above=0, hint="leave it out for no clipping")
        if self.device.split(":")[0] not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device={self.device!r}, wanted auto, cpu, cuda or cuda:N")
        if self.shard_ranks is not None and self.strategy != "fsdp":
            raise ValueError(f"shard_ranks={self.shard_ranks} belongs to --strategy fsdp, but strategy={self.strategy}")

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

    def accumulation(self, world_size: int, before: dict[str, int] | None = None) -> int:
        """Micro-batches a rank accumulates, so that none is larger than wanted, or than it was before.

        Args:
            before: `world_size` and `micro_batch` of the checkpoint that is gone on from.
        Raises:
            ValueError: more ranks times accumulation steps than images in a batch.
        """
        largest = self.micro_batch
        if largest is None and before is not None and before["world_size"] > world_size:
            largest = before["micro_batch"]
        accum = (
            self.accum_iter if largest is None else max(self.accum_iter, -(-self.batch_size // (world_size * largest)))
        )
        if world_size * accum > self.batch_size:
            raise ValueError(
                f"batch_size={self.batch_size} gives {world_size} ranks x {accum} accumulation steps less than an "
                f"image each: use --batch_size {world_size * accum} or more, or fewer ranks or --accum_iter"
            )
        return accum
