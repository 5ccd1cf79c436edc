"""Runs that meet one fault after another until they are through, and must be as if nothing had happened."""

import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from chaos.faults import PROCESS_FAULTS, damage
from chaos.runs import (
    DDP,
    FINETUNE,
    FSDP,
    PATIENCE,
    PRETRAIN,
    STEPS,
    Job,
    Runs,
    step_checkpoints,
    wait_until_random_moment,
)
from zygote import Process

MOST = 12  # faults of processes in a chain, half as many of two ranks; those of files come between


def chain(
    job: Job, runs: Runs, run: Path, rng: random.Random, kinds: tuple[str, ...] = tuple(PROCESS_FAULTS)
) -> dict[str, int]:
    """One process through faults of these kinds."""
    return _through(job, runs, run, rng, lambda: _disturb(job, runs, run, rng, kinds))


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
    job: Job, runs: Runs, run: Path, rng: random.Random, disturb: Callable[[], tuple[list[str], str]]
) -> dict[str, int]:
    met: list[str] = []
    all_said = ""
    try:
        for _ in range(MOST // job.ranks):
            name, said = disturb()
            met += name
            assert "Traceback" not in said, said
            all_said += said
            if _finished(run):
                break
            met += damage(run, rng)
        runs.finish(run, job=job)
        runs.check_same(run, job, said=all_said)
    except Exception as error:
        error.add_note(f"after {met}")
        raise
    return dict(Counter(met))


def _disturb(job: Job, runs: Runs, run: Path, rng: random.Random, kinds: tuple[str, ...]) -> tuple[list[str], str]:
    """What was done, nothing if it came too late, and what the process said."""
    name = rng.choice(kinds)
    process, happened = PROCESS_FAULTS[name](runs, run, job, rng)
    return [name] if happened else [], process.said()


def _disturb_ranks(job: Job, runs: Runs, run: Path, rng: random.Random) -> tuple[list[str], str]:
    processes = runs.start_ranks(run, job=job)
    wait_until_random_moment(processes[0], run, rng)
    what = rng.choice(("one of two ranks killed", "both ranks killed", "SIGTERM to one of two ranks"))
    number = signal.SIGTERM if what == "SIGTERM to one of two ranks" else signal.SIGKILL
    victims = processes if what == "both ranks killed" else [rng.choice(processes)]
    happened = [process.signal(number) for process in victims]
    _as_torchrun(processes)
    # What a torn connection makes a rank say is torch's own.
    return [f"{what} ({job.name})"] if all(happened) else [], ""


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


def _finished(run: Path) -> bool:
    """The last checkpoint is there."""
    found = step_checkpoints(run)
    return bool(found) and found[-1].name == f"step-{STEPS:08d}"
