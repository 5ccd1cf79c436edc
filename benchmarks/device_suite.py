"""Everything a lent GPU is wanted for, in one command and under ten minutes.

    PYTHONPATH=kernels python3 -m benchmarks --device-suite --budget 540 --device cuda --output $OUT/h200.jsonl

(PYTHONPATH where the package is not installed; nothing but torch, triton, pytest and rich is needed, what else is
missing is skipped by name.)

First what is right: the tests that need the device, and the gates of all ops at small sizes. Then what is fast: the
questions of the plan, each in its box. Every case writes its lines when it is done, ends alone when it fails (status
`failed`), and is broken off or passed over when its time is up (`skipped`): whatever happens, the file has the rest.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

import torch

from benchmarks import ceilings as machine
from benchmarks import plot, record, table
from benchmarks.case import Case, Size, is_ours
from benchmarks.questions import QUESTIONS, cases_of
from benchmarks.runner import failed, reason_of, run_case

ROOT = Path(__file__).resolve().parent.parent
GATE_SECONDS = 90.0
# Rooms whose tests run on the device where there is one: all Triton kernels do. Compiling ahead of time needs none.
ROOMS = ["tests/ops", "tests/kernels", "tests/models", "tests/attacks", "--ignore=tests/kernels/test_aot.py"]
TESTS: dict[Size, list[str]] = {"tiny": ["tests/ops/test_philox.py"], "quick": ROOMS, "full": ROOMS}


class OverTime(BaseException):
    """A case overstayed its box. No Exception: what handles the failure of one provider must let it through."""


@dataclass
class Suite:
    """The state of a run.

    Attributes:
        deadline: `time.monotonic()` at which the budget is used up.
        output: where the lines go.
        done: the records of each case so far.
    """

    device: torch.device
    size: Size
    ceilings: machine.Ceilings
    deadline: float
    output: Path
    done: list[list[record.Record]] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds of the budget."""
        return self.deadline - time.monotonic()

    def keep(self, records: list[record.Record]) -> None:
        """Write and show the records of a case."""
        record.append(self.output, records)
        table.print_case(records)
        sys.stdout.flush()
        self.done.append(records)


def run_suite(device: torch.device, size: Size, budget_s: float, output: Path) -> int:
    """Gates, then timings; 1 when a gate or a provider of ours failed."""
    started = time.monotonic()
    suite = Suite(device, size, machine.measure(device, tiny=size == "tiny"), started + budget_s, output)
    # Small sizes need no boxes: the budget itself is enough, and processes take their seconds to start.
    scale = 1.0 if size == "tiny" else budget_s / 540
    suite.keep([run_tests(suite, GATE_SECONDS * scale)])
    for gates_only in (True, False):
        for name, question in QUESTIONS.items():
            if question.suite_s:
                run_question(suite, name, question.suite_s * scale, gates_only=gates_only)
    plot.draw(suite.done, output.with_suffix(".png"))
    states = [r.status for case in suite.done for r in case]
    lost = [r for case in suite.done for r in case if r.status == "failed"]
    ours = [r for r in lost if is_ours(r.impl) or r.impl == "pytest"]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("ok", "skipped", "failed"))
    print(f"device suite: {counts} in {time.monotonic() - started:.0f} s of {budget_s:.0f} s -> {output}")
    for r in ours:
        print(f"FAILED {r.case} {r.impl} {r.params}: {r.note}")
    return int(bool(ours))


def run_tests(suite: Suite, box_s: float) -> record.Record:
    """The tests of the ops and what stands on them, in processes of their own."""
    parallel = ["-n", "8"] if find_spec("xdist") and (os.cpu_count() or 1) >= 8 else []
    options = ["-q", "--maxfail=20", "-p", "no:cacheprovider", *parallel]
    command = [sys.executable, "-m", "pytest", *options, *TESTS[suite.size]]
    result = record.Record("gate_tests", "pytest", {"tests": " ".join(TESTS[suite.size])}, box_s * 1e3)
    started = time.monotonic()
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=min(box_s, suite.left))
        result.note = (run.stdout.strip().splitlines() or [run.stderr.strip()[-200:]])[-1]
        result.status = "ok" if run.returncode == 0 else "failed"
        if run.returncode:
            print(run.stdout[-4000:])
    except subprocess.TimeoutExpired:
        result.status, result.note = "failed", f"not done after {box_s:.0f} s"
    result.extra = {"seconds": time.monotonic() - started}
    return record.stamp(result, suite.device, suite.ceilings)


def run_question(suite: Suite, question: str, seconds: float, *, gates_only: bool = False) -> None:
    """All cases of a question; gates alone are judged at the smallest size."""
    until = time.monotonic() + seconds
    box_s = QUESTIONS[question].suite_box_s if suite.size != "tiny" else 0.02
    try:
        cases = cases_of(question)(suite.device, "tiny" if gates_only else suite.size)
        for case in cases:
            left = min(until - time.monotonic(), suite.left)
            suite.keep(one_case(suite, case, left, box_s, gates_only))
    except Exception as error:  # the question's own set-up
        lost = record.Record(question, "set-up", {}, 0.0, status="failed", note=reason_of(error))
        suite.keep([record.stamp(lost, suite.device, suite.ceilings)])


def one_case(suite: Suite, case: Case, left: float, box_s: float, gates_only: bool) -> list[record.Record]:
    """The records of a case, whatever happens to it."""
    try:
        if left <= 0:
            raise OverTime("no time left in the question's box or in the budget")
        with time_limit(left):
            return run_case(case, suite.device, suite.ceilings, box_s=box_s, gates_only=gates_only, say=lambda _: None)
    except OverTime as error:
        late = failed(case, suite.device, suite.ceilings, error)
        late.status, late.note = "skipped", str(error)
        return [late]
    except Exception as error:
        return [failed(case, suite.device, suite.ceilings, error)]


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OverTime in the main thread after so many seconds (at the next Python instruction)."""

    def overstayed(signum: int, frame: FrameType | None) -> None:
        raise OverTime(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, overstayed)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
