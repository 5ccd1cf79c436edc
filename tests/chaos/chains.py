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
    INF_STEPS,
    PATIENCE,
    PRETRAIN,
    STEPS,
    XCIT,
    Job,
    Runs,
    contents,
    step_checkpoints,
    wait_until_random_moment,
)
from zygote import Process

from mimir_fast.checkpoints.reading import read_tensors
from mimir_fast.training.loggers import read_lines

MOST = 12  # faults of processes in a chain, half as many of two ranks; those of files come between


def chain(
    job: Job, runs: Runs, run: Path, rng: random.Random, kinds: tuple[str, ...] = tuple(PROCESS_FAULTS)
) -> dict[str, int]:
    """One process through faults of these kinds."""
    return _through(job, runs, run, rng, lambda: _disturb(job, runs, run, rng, kinds))


def chain_with_inf(runs: Runs, run: Path, rng: random.Random) -> dict[str, int]:
    """A model with batch norms, which meets an Inf in some steps besides: they are skipped, and no checkpoint knows."""
    met = chain(XCIT, runs, run, rng)
    skipped = [line for line in read_lines(run / "metrics.jsonl") if line.get("loss", 0) is None]
    assert [line["step"] for line in skipped] == list(INF_STEPS), skipped
    for checkpoint in step_checkpoints(run):
        bad = [name for name, tensor in read_tensors(checkpoint, "").items() if not tensor.isfinite().all()]
        assert not bad, f"{checkpoint}: {bad[:3]} are not finite"
    return met | {"Inf in a forward pass (batch norms)": len(skipped)}


def chain_of_ranks(job: Job, runs: Runs, run: Path, rng: random.Random) -> dict[str, int]:
    """Two ranks: one of them is killed, both are, or one is asked to stop."""
    return _through(job, runs, run, rng, lambda: _disturb_ranks(job, runs, run, rng))


CHAINS: dict[str, Callable[[Runs, Path, random.Random], dict[str, int]]] = {
    "pretrain": partial(chain, PRETRAIN),
    "finetune": partial(chain, FINETUNE),
    "xcit": lambda runs, run, rng: chain_with_inf(runs, run, rng),
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
    what = rng.choice(
        ("one of two ranks killed", "both ranks killed", "SIGTERM to one of two ranks", "ranks with other options")
    )
    if what == "ranks with other options":
        return _start_mixed(job, runs, run, rng)
    processes = runs.start_ranks(run, job=job)
    wait_until_random_moment(processes[0], run, rng)
    number = signal.SIGTERM if what == "SIGTERM to one of two ranks" else signal.SIGKILL
    victims = processes if what == "both ranks killed" else [rng.choice(processes)]
    happened = [process.signal(number) for process in victims]
    _as_torchrun(processes)
    # What a torn connection makes a rank say is torch's own.
    return [f"{what} ({job.name})"] if all(happened) else [], ""


def _start_mixed(job: Job, runs: Runs, run: Path, rng: random.Random) -> tuple[list[str], str]:
    """The second rank has another command line: refused by both, which name the difference; nothing is touched."""
    before = contents(run)
    option, value = rng.choice((("--lr", "0.5"), ("--seed", "9"), ("--batch_size", "8"), ("--ema_decay", "0.5")))
    processes = runs.start_ranks(run, job=job, hosts=[{}, {"extra": (option, value)}])
    codes = [process.wait(PATIENCE) for process in processes]
    said = processes[0].said() + processes[1].said()
    assert codes == [2, 2] and f".{option[2:]} is " in said and "Traceback" not in said, (codes, said)
    assert contents(run) == before, "a refused start changed the folder"
    return [f"ranks with other options ({job.name})"], said


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
