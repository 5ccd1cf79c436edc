"""Timing: providers in turn in one process, medians, and the noise floor beside them.

A round runs all providers forwards and then backwards (A B C C B A), so that a machine that slows down slows all of
them, and each provider is timed twice: the difference of its two medians is noise, and no smaller difference means
anything. Inputs rotate among sets that together exceed the last cache. Python's cyclic garbage collector is off while a
sample is taken, for every provider alike (apart.py does it for those in another process): it walks the whole process's
objects, which cost 2 % of a bf16 step, and whose call it interrupts is chance.
"""

import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from statistics import median
from typing import Any

import torch
from torch.utils import benchmark

from benchmarks.case import bytes_of

CACHE_BYTES = 180 * 2**20  # three times the 60 MB L2 of an H200
LEAST_SAMPLE_S = 2e-3
MOST_ROUNDS = 100


@dataclass(frozen=True)
class Times:
    """Milliseconds a call.

    Attributes:
        median, p20, p80: over all samples.
        n: samples.
        repeat_median: of the second of the two series; its distance to `first_median` is the noise floor.
    """

    median: float
    p20: float
    p80: float
    n: int
    first_median: float
    repeat_median: float

    @property
    def noise(self) -> float:
        """Relative difference of the two series: a smaller difference between versions is noise."""
        return abs(self.first_median - self.repeat_median) / self.median

    @staticmethod
    def of(first: Sequence[float], second: Sequence[float]) -> "Times":
        """From two series of milliseconds."""
        both = sorted([*first, *second])
        return Times(
            median(both), quantile(both, 0.2), quantile(both, 0.8), len(both), median(first), median(second)
        )  # fmt: skip


def quantile(ordered: Sequence[float], fraction: float) -> float:
    """Linear interpolation between the order statistics."""
    position = fraction * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def num_sets(inputs: Any, device: torch.device, one_set: bool) -> int:
    """How many sets of inputs to rotate among."""
    if one_set:
        return 1
    size = max(1, bytes_of(inputs))
    return max(3, min(16, -(-CACHE_BYTES // size))) if device.type == "cuda" else 2 if size > 2**28 else 3


def time_providers(runs: Mapping[str, Callable[[Any], object]], sets: Sequence[Any], box_s: float) -> dict[str, Times]:
    """Times of each provider, in rounds until the box of `box_s` seconds is used up (one round at least)."""
    repeats = {name: _calls_per_sample(run, sets) for name, run in runs.items()}
    series: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in runs}
    names, turn = list(runs), 0
    deadline = time.perf_counter() + box_s
    for round_ in range(MOST_ROUNDS):
        if round_ >= 1 and time.perf_counter() > deadline:
            break
        for half, order in enumerate((names, names[::-1])):
            for name in order:
                series[name][half].append(_sample(runs[name], sets, turn, repeats[name]))
                turn += 1
    return {name: Times.of(*pair) for name, pair in series.items()}


def _calls_per_sample(run: Callable[[Any], object], sets: Sequence[Any]) -> int:
    """So many that a sample is long beside the clock's resolution and, on a GPU, beside the wait for its queue."""
    if _sample(run, sets, 0, 1) > 100 * LEAST_SAMPLE_S * 1e3:
        return 1
    once_s = _sample(run, sets, 1, 1) / 1e3
    return max(1, min(200, round(LEAST_SAMPLE_S / max(once_s, 1e-7))))


def _sample(run: Callable[[Any], object], sets: Sequence[Any], turn: int, calls: int) -> float:
    """Milliseconds a call. `timeit` switches the collector off; torch's clock waits for a GPU.

    torch's own `Timer` would run each provider twice more before every sample, and not in turns.
    """
    inputs = islice(cycle(sets), turn % len(sets), None)
    return timeit.Timer(lambda: run(next(inputs)), timer=benchmark.timer).timeit(calls) * 1e3 / calls
