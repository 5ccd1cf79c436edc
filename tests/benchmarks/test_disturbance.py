"""Other work on our cores is seen, its rounds are repeated, and what stays disturbed is not compared."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
import torch

from benchmarks import disturbance, table, timing
from benchmarks.ceilings import Ceilings
from benchmarks.compare import compare
from benchmarks.disturbance import Usage, lost, undisturbed, usage
from benchmarks.runner import run_case

CPU = torch.device("cpu")
CEILINGS = Ceilings(copy_gbps=1.0, tflops={"fp32": 1.0})


@contextmanager
def on_one_core_with_another() -> Iterator[None]:
    """This process and a busy one share one core."""
    before = os.sched_getaffinity(0)
    core = min(before)
    lines = f"import os; os.sched_setaffinity(0, {{{core}}}); print(flush=True)\nwhile True: pass"
    os.sched_setaffinity(0, {core})
    busy = subprocess.Popen([sys.executable, "-c", lines], stdout=subprocess.PIPE)
    try:
        assert busy.stdout is not None
        busy.stdout.readline()
        yield
    finally:
        busy.kill()
        busy.communicate()
        os.sched_setaffinity(0, before)


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="Linux does not count waiting here")
def test_a_busy_neighbour_is_seen() -> None:
    with on_one_core_with_another():
        before, until = usage(), time.perf_counter() + 0.5
        while time.perf_counter() < until:
            pass
        assert lost(before, usage()) > 0.2


def test_waiting_counts_as_far_as_others_computed() -> None:
    start = Usage(0.0, 0.0, 0.0, 0.0)
    assert lost(start, Usage(waited=1.0, others=0.25, stolen=0.0, at=2.0)) == 0.125  # our own threads waited
    assert lost(start, Usage(waited=0.0, others=8.0, stolen=0.0, at=2.0)) == 0.0  # on other cores
    assert lost(start, Usage(waited=0.0, others=0.0, stolen=0.5, at=2.0)) == 0.25
    assert lost(Usage(5.0, 0.0, 0.0, 0.0), Usage(1.0, 3.0, 0.0, 1.0)) == 0.0  # a thread ended


def test_nothing_is_seen_where_nothing_is_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(disturbance, "PROC", tmp_path)
    before = usage()
    assert (before.waited, before.others, before.stolen) == (0.0, 0.0, 0.0) and lost(before, usage()) == 0.0


def shares(monkeypatch: pytest.MonkeyPatch, *of_each: float) -> None:
    """The counters say so much of the first, second, … measurement; of the last of these for ever."""
    calls = count()

    def counted(processes: object = ()) -> Usage:
        number, after = divmod(next(calls), 2)
        return Usage(of_each[min(number, len(of_each) - 1)] * after, 9.0 * after, 0.0, float(after))

    for module in (disturbance, timing):
        monkeypatch.setattr(module, "usage", counted)


def test_a_disturbed_round_is_repeated_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    shares(monkeypatch, 0.5, 0.5, 0.0)
    monkeypatch.setattr(timing, "MOST_ROUNDS", 4)
    times = timing.time_providers({"A": lambda x: None}, [None], box_s=60.0)
    assert times["A"]["disturbed"] == 0.0 and times["A"]["n"] == 2 * 2  # two rounds of four, each forth and back


def test_what_is_never_quiet_is_kept_and_named(monkeypatch: pytest.MonkeyPatch, squares, capsys) -> None:
    shares(monkeypatch, 0.5)
    records = run_case(squares(), CPU, CEILINGS, box_s=0.0)
    ours = records[0]
    assert ours.status == "ok" and ours.disturbed and ours.ms["disturbed"] == 0.5
    assert ours.speedup is None and "other work took 50% of the time" in ours.note
    table.print_case(records)
    assert "disturbed" in capsys.readouterr().out
    with pytest.raises(ValueError, match="that other work did not disturb"):
        compare(records, records)


def test_the_quietest_try_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    shares(monkeypatch, 0.5, 0.2, 0.3)
    numbers = count()
    assert undisturbed(lambda: next(numbers)) == (1, pytest.approx(0.2))
    shares(monkeypatch, 0.5, 0.01, 0.0)
    assert undisturbed(lambda: next(numbers)) == (4, pytest.approx(0.01))
