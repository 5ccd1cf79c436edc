"""Runs that meet one fault after another until they are through, and must be as if nothing had happened."""

import json
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from chaos.faults import FILE_FAULTS, PROCESS_FAULTS
from chaos.runs import (
    DDP,
    FINETUNE,
    FSDP,
    PATIENCE,
    PRETRAIN,
    STEPS,
    Job,
    Runs,
    wait_until_random_moment,
    whole_checkpoints,
)
from chaos.zygote import Process

MOST = 12  # faults of processes in a chain, half as many of two ranks; those of files come between
NOTHING_TO_LOSE = ("config.json cut short", "leftovers of other kills")  # may meet a run with any number of checkpoints


def chain(job: Job, runs: Runs, run: Path, rng: random.Random) -> dict[str, int]:
    """One process through faults of all kinds."""
    return _through(job, runs, run, rng, lambda: _disturb(job, runs, run, rng))


def chain_of_ranks(job: Job, runs: Runs, run: Path, rng: random.Random) -> dict[str, int]:
    """Two ranks: one of them is killed, both are, or one is asked to stop."""
    return _through(job, runs, run, rng, lambda: _disturb_ranks(job, runs, run, rng))


CHAINS: dict[str, Callable[[Runs, Path, random.Random], dict[str, int]]] = {
    "pretrain": partial(chain, PRETRAIN),
    "finetune": partial(chain, FINETUNE),
    "ddp": partial(chain_of_ranks, DDP),
    "fsdp": partial(chain_of_ranks, FSDP),
}


def _through(
    job: Job, runs: Runs, run: Path, rng: random.Random, disturb: Callable[[], tuple[str, str]]
) -> dict[str, int]:
    met: list[str] = []
    all_said = ""
    try:
        for _ in range(MOST // job.ranks):
            name, said = disturb()
            met.append(name)
            assert "Traceback" not in said, said
            all_said += said
            if _finished(run):
                break
            if rng.random() < 0.6:
                met += _damage(run, rng)
        runs.finish(run, job=job)
        runs.check_same(run, job, said=all_said)
    except Exception as error:
        error.add_note(f"after {met}")
        raise
    return dict(Counter(met))


def _disturb(job: Job, runs: Runs, run: Path, rng: random.Random) -> tuple[str, str]:
    name = rng.choice(list(PROCESS_FAULTS))
    return name, PROCESS_FAULTS[name](runs, run, job, rng).said()


def _disturb_ranks(job: Job, runs: Runs, run: Path, rng: random.Random) -> tuple[str, str]:
    processes = runs.start_ranks(run, job=job)
    wait_until_random_moment(processes[0], run, rng)
    victim = rng.choice(processes)
    what = rng.choice(("one of two ranks killed", "both ranks killed", "SIGTERM to one of two ranks"))
    if what == "SIGTERM to one of two ranks":
        victim.signal(signal.SIGTERM)
    else:
        for process in processes if what == "both ranks killed" else [victim]:
            process.kill()
    _as_torchrun(processes)
    return f"{what} ({job.name})", ""  # what a torn connection makes a rank say is torch's own


def _as_torchrun(processes: list[Process]) -> None:
    """When one is gone the other may leave by itself; then it gets SIGTERM, and SIGKILL after a while."""
    deadline = time.monotonic() + PATIENCE
    while all(p.poll() is None for p in processes):
        assert time.monotonic() < deadline, [p.said() for p in processes]
        time.sleep(0.02)
    for seconds, number in ((3, signal.SIGTERM), (6, signal.SIGKILL)):
        deadline = time.monotonic() + seconds
        while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
            time.sleep(0.02)
        for process in processes:
            process.signal(number)


def _damage(run: Path, rng: random.Random) -> list[str]:
    name = rng.choice(list(FILE_FAULTS))
    if name not in NOTHING_TO_LOSE and len(whole_checkpoints(run)) < 2:
        return []  # with nothing to fall back to the run rightly refuses; a test of its own has that
    if not (run / "config.json").exists() or not (run / "checkpoints").exists():
        return []
    FILE_FAULTS[name](run, rng)
    return [name]


def _finished(run: Path) -> bool:
    """The last checkpoint is there."""
    found = whole_checkpoints(run)
    return bool(found) and json.loads((found[-1] / "meta.json").read_text())["step"] == STEPS
