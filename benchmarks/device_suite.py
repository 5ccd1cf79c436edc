"""Everything a lent GPU is wanted for, in one command and under ten minutes.

    PYTHONPATH=kernels python3 -m benchmarks --device-suite --budget 540 --device cuda --output $OUT/h200.jsonl

(PYTHONPATH where the package is not installed; nothing but torch, triton, pytest and rich is needed, what else is
missing is skipped by name.)

First what is right: the tests that need the device, and the gates of all ops at small sizes. Then what is fast: the
questions of the plan, each in its box. Every case writes its lines when it is done, ends alone when it fails (status
`failed`), and is broken off or passed over when its time is up (`skipped`): whatever happens, the file has the rest.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.case import Size
from benchmarks.ceilings import Ceilings
from benchmarks.questions import QUESTIONS
from benchmarks.record import Record, stamp
from benchmarks.runner import run_question

ROOT = Path(__file__).resolve().parent.parent
GATE_SECONDS = 90.0
# Rooms whose tests run on the device where there is one: all Triton kernels do. Compiling ahead of time needs none.
ROOMS = ["tests/ops", "tests/kernels", "tests/models", "tests/attacks", "--ignore=tests/kernels/test_aot.py"]


def run_suite(device: torch.device, size: Size, ceilings: Ceilings, budget_s: float) -> Iterator[list[Record]]:
    """The records of each case: tests, gates, then timings."""
    until = time.monotonic() + budget_s
    tiny = size == "tiny"
    # Small sizes need no boxes: the budget itself is enough, and processes take their seconds to start.
    scale = 1.0 if tiny else budget_s / 540
    tests = run_tests(["tests/ops/test_philox.py"] if tiny else ROOMS, GATE_SECONDS * scale)
    yield [stamp(tests, device, ceilings)]
    for gates_only in (True, False):
        for name, question in QUESTIONS.items():
            if question.suite_s:
                yield from run_question(
                    name, device, "tiny" if gates_only else size, ceilings, gates_only=gates_only,
                    box_s=0.02 if tiny else question.suite_box_s,
                    seconds=min(question.suite_s * scale, until - time.monotonic()),
                )  # fmt: skip


def run_tests(which: list[str], box_s: float) -> Record:
    """The tests of the ops and what stands on them, in processes of their own."""
    parallel = ["-n", "8"] if find_spec("xdist") and (os.cpu_count() or 1) >= 8 else []
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=20", "-p", "no:cacheprovider", *parallel, *which]
    result = Record("gate_tests", "pytest", {"tests": " ".join(which)}, box_s * 1e3)
    started = time.monotonic()
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=box_s)
        result.note = (run.stdout.strip().splitlines() or [run.stderr.strip()[-200:]])[-1]
        if run.returncode:
            result.status = "failed"
            print(run.stdout[-4000:])
    except subprocess.TimeoutExpired:
        result.status, result.note = "failed", f"not done after {box_s:.0f} s"
    result.extra = {"seconds": time.monotonic() - started}
    return result
