"""Whether other work took the processor while something was timed.

A thread that can run and is given no core waits, and Linux counts these nanoseconds for each thread. They are other
programs' doing as far as those computed at the same time, and so is what a virtual machine's host took ("steal"). Where
Linux does not say, nothing is seen.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

MOST = 0.03
"""Share of the time beyond which a measurement is repeated, and in the end refused."""
TICK_S = 1 / os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 0.01
PROC = Path("/proc")

T = TypeVar("T")


@dataclass(frozen=True)
class Usage:
    """Seconds since some start, of `processes` (this one is always among them) and of the machine.

    Attributes:
        waited: for a core, of all threads.
        others: cores' time that went to other processes.
        stolen: cores' time that the host gave to other machines.
        at: on the clock.
    """

    waited: float
    others: float
    stolen: float
    at: float


def usage(processes: Sequence[int] = ()) -> Usage:
    """The counters now; zeros where the system has none."""
    own = {os.getpid(), *processes}
    try:
        user, nice, system, _, _, irq, softirq, stolen = map(int, (PROC / "stat").read_text().split()[1:9])
        threads = [p for pid in own for p in (PROC / str(pid) / "task").glob("*/schedstat")]
        waited = sum(int(path.read_text().split()[1]) for path in threads) * 1e-9
        ours = sum(sum(map(int, _after_name(pid).split()[11:13])) for pid in own)
    except (OSError, ValueError, IndexError):
        return Usage(0.0, 0.0, 0.0, time.perf_counter())
    others = (user + nice + system + irq + softirq - ours) * TICK_S
    return Usage(waited, others, stolen * TICK_S, time.perf_counter())


def lost(before: Usage, after: Usage) -> float:
    """Share of the time between that other work took from ours, 0 …; a thread that ended takes its count with it."""
    waited = max(0.0, min(after.waited - before.waited, after.others - before.others))
    return (waited + max(0.0, after.stolen - before.stolen)) / max(after.at - before.at, 1e-9)


def undisturbed(measure: Callable[[], T], tries: int = 3) -> tuple[T, float]:
    """What `measure` returns and the share that was lost meanwhile: of the first quiet try, else of the quietest."""
    found: list[tuple[T, float]] = []
    for _ in range(tries):
        before = usage()
        value = measure()
        found.append((value, lost(before, usage())))
        if found[-1][1] <= MOST:
            break
    return min(found, key=lambda pair: pair[1])


def words(share: float) -> str:
    """What a reader is told of a disturbed measurement."""
    return f"disturbed: other work took {share:.0%} of the time; repeat it on a quiet machine"


def _after_name(pid: int) -> str:
    """The fields of /proc/PID/stat behind the name, which may hold anything."""
    return (PROC / str(pid) / "stat").read_text().rpartition(")")[2]
