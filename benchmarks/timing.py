"""Timing: providers in turn in one process, medians, and the noise floor beside them.

A round runs all providers forwards and then backwards (A B C C B A), so that a machine that slows down slows all of
them, and each provider is timed twice: the difference of its two medians is noise, and no smaller difference means
anything. A round in which other work took the cores is repeated (disturbance.py). Inputs rotate among sets that
together exceed the last cache. Python's cyclic garbage collector is off while a sample is taken, for every provider
alike (apart.py does it for those in another process): it walks the whole process's objects, which cost 2 % of a bf16
step, and whose call it interrupts is chance.
"""

import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, islice
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree, benchmark

from benchmarks.disturbance import MOST, lost, usage

CACHE_BYTES = 180 * 2**20  # three times the 60 MB L2 of an H200
LEAST_SAMPLE_S = 2e-3
MOST_ROUNDS = 100
Function = Callable[[Any], object]
Round = dict[str, list[float]]


def time_providers(
    runs: Mapping[str, Function], sets: Sequence[Any], box_s: float, processes: Sequence[int] = ()
) -> dict[str, dict[str, float]]:
    """`summary` of each provider, in rounds until the box of `box_s` seconds is used up (one round at least).

    Rounds that other work disturbed are repeated, in up to another `box_s` seconds. They count only where there is no
    other; then `disturbed` is the share of the time that was lost, else 0.

    Args:
        processes: of providers that compute elsewhere.
    """
    repeats = {name: _calls_per_sample(run, sets) for name, run in runs.items()}
    quiet: list[Round] = []
    disturbed: list[tuple[float, Round]] = []
    start = time.perf_counter()
    while len(quiet) + len(disturbed) < MOST_ROUNDS:
        spent = time.perf_counter() - start
        if (quiet and spent > box_s) or (disturbed and spent > 2 * box_s):
            break
        before = usage(processes)
        found = _round(runs, sets, repeats, len(quiet) + len(disturbed))
        share = lost(before, usage(processes))
        quiet.append(found) if share <= MOST else disturbed.append((share, found))
    rounds = quiet or [found for _, found in disturbed]
    share = 0.0 if quiet else median(share for share, _ in disturbed)
    return {
        name: summary(*([found[name][half] for found in rounds] for half in (0, 1))) | {"disturbed": share}
        for name in runs
    }


def _round(runs: Mapping[str, Function], sets: Sequence[Any], repeats: Mapping[str, int], number: int) -> Round:
    """Milliseconds of each provider, forwards and backwards through all of them."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn, name in enumerate([*runs, *reversed(list(runs))], 2 * len(runs) * number):
        found[name].append(_sample(runs[name], sets, turn, repeats[name]))
    return found


def summary(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """Median, p20 and p80 of two series together, and the noise: the relative difference of their medians."""
    both, medians = [*first, *second], (median(first), median(second))
    fifths = quantiles(both, n=5, method="inclusive")
    return {
        "median": median(both), "p20": fifths[0], "p80": fifths[-1], "n": len(both), "first_median": medians[0],
        "repeat_median": medians[1], "noise": abs(medians[0] - medians[1]) / median(both),
    }  # fmt: skip


def num_sets(inputs: Any, device: torch.device) -> int:
    """How many sets of inputs to rotate among."""
    size = max(1, bytes_of(inputs))
    return max(3, min(16, -(-CACHE_BYTES // size))) if device.type == "cuda" else 2 if size > 2**28 else 3


def bytes_of(inputs: Any) -> int:
    """Size of all tensors in a set of inputs: a tensor, a batch, or any nest of containers."""
    leaves = _pytree.tree_leaves(vars(inputs) if hasattr(inputs, "__dataclass_fields__") else inputs)
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))


def _calls_per_sample(run: Function, sets: Sequence[Any]) -> int:
    """So many that a sample is long beside the clock's resolution and, on a GPU, beside the wait for its queue."""
    first_ms = _sample(run, sets, 0, 1)
    if first_ms > 100 * LEAST_SAMPLE_S * 1e3:
        return 1
    once_s = min(first_ms, _sample(run, sets, 1, 1)) / 1e3  # the first may warm up, either may be interrupted
    return max(1, min(200, round(LEAST_SAMPLE_S / max(once_s, 1e-7))))


def _sample(run: Function, sets: Sequence[Any], turn: int, calls: int) -> float:
    """Milliseconds a call. `timeit` switches the collector off; torch's clock waits for a GPU.

    torch's own `Timer` would run each provider twice more before every sample, and not in turns.
    """
    inputs = islice(cycle(sets), turn % len(sets), None)
    return timeit.Timer(lambda: run(next(inputs)), timer=benchmark.timer).timeit(calls) * 1e3 / calls
