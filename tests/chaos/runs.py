"""Small runs to be disturbed, and the oracle: the same bits as the run that nobody disturbed."""

import json
import os
import random
import re
import shutil
import time
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from zygote import Process, Zygote

from mimir_fast.checkpoints.durable import pointed_at

STEPS = 18
INF_STEPS = (3, 7, 8, 13)
"""In whose batch there is an Inf, with --import chaos.inf_steps."""
# Batches of 16 from 64 images: four steps an epoch, so steps, epochs and checkpoints do not coincide.
_EVERY = (
    "--model.patch_size", "16", "--batch_size", "16", "--max_steps", str(STEPS), "--save_every", "2",
    "--log_every", "1", "--ema_decay", "0.9", "--precision", "fp32", "--device", "cpu",
)  # fmt: skip
# Seconds for one start; a run that is silent for so long hangs. More for a campaign at the lowest priority.
PATIENCE = float(os.environ.get("CHAOS_PATIENCE", 300))


@dataclass(frozen=True)
class Job:
    """What is run: a module, its options, and on how many ranks."""

    name: str
    module: str
    args: tuple[str, ...]
    ranks: int = 1


PRETRAIN = Job("pretrain", "mimir_fast.pretrain", ("--recipe", "digits/mimir_vit_nano", "--data.limit", "64", *_EVERY))
# With an evaluation each epoch and a best checkpoint; the probe holds a tenth of the images out.
FINETUNE = Job(
    "finetune", "mimir_fast.finetune",
    ("--recipe", "digits/pgd_vit_nano", "--data.limit", "80", "--probe.num_steps", "2", *_EVERY),
)  # fmt: skip
DDP = replace(PRETRAIN, name="ddp", ranks=2)
FSDP = replace(PRETRAIN, name="fsdp", ranks=2, args=(*PRETRAIN.args, "--strategy", "fsdp"))
# Batch norms: state that no gradient reaches, and four steps whose images hold an Inf.
XCIT = Job(
    "xcit", "mimir_fast.finetune",
    ("--recipe", "digits/pgd_xcit_nano", "--import", "chaos.inf_steps", "--method", "pgd_inf", *FINETUNE.args[2:]),
)  # fmt: skip
TESTS = str(Path(__file__).parents[1])  # where a run finds chaos.inf_steps


class Runs:
    """Starts and compares runs below a folder."""

    def __init__(self, folder: Path, zygote: Zygote) -> None:
        self.folder, self.zygote = folder, zygote
        self._references: dict[Job, Path] = {}

    def start(self, run: Path, *extra: str, job: Job = PRETRAIN, **options: Any) -> Process:
        """One process; of a job of several ranks `start_ranks` starts all."""
        options["env"] = {"PYTHONPATH": TESTS} | (options.get("env") or {})
        return self.zygote.start(job.module, [*job.args, "--output_dir", str(run), *extra], **options)

    def start_ranks(
        self, run: Path, *extra: str, job: Job = DDP, hosts: list[dict[str, Any]] | None = None
    ) -> list[Process]:
        """All ranks, as torchrun would start them; `hosts` has each one's start options."""
        options = hosts or [{} for _ in range(job.ranks)]
        return self.zygote.start_ranks(job.module, [*job.args, "--output_dir", str(run), *extra], options)

    def finish(self, run: Path, *extra: str, job: Job = PRETRAIN) -> str:
        """Run to the end; what it said."""
        processes = self.start_ranks(run, *extra, job=job) if job.ranks > 1 else [self.start(run, *extra, job=job)]
        codes = [process.wait(PATIENCE) for process in processes]
        said = "".join(process.said() for process in processes)
        assert not any(codes), f"{codes}: {said}"
        return said

    def reference(self, job: Job) -> Path:
        """The run nobody disturbs."""
        if job not in self._references:
            run = self.folder / f"reference-{job.name}"
            self.finish(run, job=job)
            self._references[job] = run
        return self._references[job]

    def check_same(self, run: Path, job: Job = PRETRAIN, *, said: str = "") -> None:
        """Every bit of the last checkpoint (weights, averages, optimiser), every logged loss, and which one is best.

        Args:
            said: by all starts; after the run has said that it logs no longer, or that it could not save, what is there
                must be right, but lines or a best checkpoint may be missing.
        """
        reference = self.reference(job)
        wanted, found = (final_tensors(r) for r in (reference, run))
        assert wanted, f"{reference}: there is nothing to compare with"
        other = [name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)]
        assert not other, f"{run}: {len(other)} tensors are not those of the undisturbed run, such as {other[:3]}"
        logged, right = losses(run), losses(reference)
        same = set(logged) <= set(right) if re.search("(JsonLines|metrics.jsonl) failed", said) else logged == right
        assert same, f"{run}: the losses are not those of the undisturbed run: {logged}, not {right}"
        same = best(run) == best(reference) or "could not write checkpoint" in said
        assert same, f"{run}: the best is {best(run)}, not {best(reference)}"
        leftovers = [p.name for p in (run / "checkpoints").iterdir() if p.name.endswith(".partial")]
        assert not leftovers, f"{run}: {leftovers} were left"

    @staticmethod
    def clean(folder: Path) -> None:
        """Delete a story's files; the references stay."""
        shutil.rmtree(folder, ignore_errors=True)


def final_tensors(run: Path) -> dict[str, list[tuple[Any, ...]]]:
    """Name → dtype, shape and checksum of its parts, in whichever rank's file (ranks share equal tensors out)."""
    found: dict[str, list[tuple[Any, ...]]] = {}
    for file in sorted((run / "checkpoints" / f"step-{STEPS:08d}").glob("*.safetensors")):
        content = file.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        for name, info in json.loads(content[8:start]).items():
            if name != "__metadata__":
                first, last = info["data_offsets"]
                data = zlib.crc32(content[start + first : start + last])
                found.setdefault(name, []).append((info["dtype"], info["shape"], data))
    return found


def losses(run: Path) -> list[tuple[int, float]]:
    """Step and loss of every logged step."""
    found = []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        if "loss" in values:
            found.append((values["step"], values["loss"]))
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but for the lock, which any start may take."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def best(run: Path) -> str | None:
    """The name of the checkpoint that is best."""
    found = pointed_at(run / "checkpoints" / "best")
    return found.name if found else None


def steps_logged(run: Path) -> int:
    """Whole lines of metrics.jsonl so far."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def step_checkpoints(run: Path) -> list[Path]:
    """Step checkpoints, oldest first."""
    found = run / "checkpoints"
    return sorted(p for p in found.glob("step-*") if p.suffix == "" and p.is_dir()) if found.exists() else []


def wait_until_random_moment(process: Process, run: Path, rng: random.Random) -> None:
    """Somewhere in the start, or some steps later, or where it ends by itself."""
    if rng.random() < 0.3:
        time.sleep(rng.uniform(0, 2.0))
        return
    goal, deadline = steps_logged(run) + rng.randint(1, 5), time.monotonic() + PATIENCE
    while steps_logged(run) < min(goal, STEPS) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.15))
