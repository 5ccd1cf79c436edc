"""Everything a lent GPU is wanted for, in three parts of at most 200 s that may be called one by one.

    PYTHONPATH=kernels python3 -m benchmarks --device-suite --part correctness --device cuda --output runs/h200.jsonl
    PYTHONPATH=kernels python3 -m benchmarks --device-suite --part kernels --device cuda --output runs/h200.jsonl
    PYTHONPATH=kernels python3 -m benchmarks --device-suite --part steps --device cuda --output runs/h200.jsonl

(PYTHONPATH where the package is not installed; nothing but torch, triton, pytest and rich is needed, what else is
missing is skipped by name. Without `--part` all three, within `--budget`.)

First what is right: the tests that need the device, and the gates of all ops at small sizes. Then how fast the kernels
are, then the steps, each question in its box. Every case writes its lines when it is done, ends alone when it fails
(status `failed`), and is broken off or passed over when its time is up (`skipped`): whatever happens, the file has the
rest. A part that is called again goes on: what the file has of this commit and device as `ok` is not run again.
"""

import os
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

import torch

from benchmarks.case import Size
from benchmarks.ceilings import Ceilings
from benchmarks.questions import QUESTIONS
from benchmarks.record import Key, Record, finished, stamp
from benchmarks.runner import run_question

ROOT = Path(__file__).resolve().parent.parent
Part = Literal["correctness", "kernels", "steps"]
PARTS: tuple[Part, ...] = get_args(Part)
PART_SECONDS = 200.0
TEST_SECONDS = 120.0
# Rooms whose tests run on the device where there is one: all Triton kernels do. Compiling ahead of time needs none.
ROOMS = ["tests/ops", "tests/kernels", "tests/models", "tests/attacks", "--ignore=tests/kernels/test_aot.py"]
ON_DEVICE = ["-m", "cuda"]


def run_suite(
    device: torch.device, size: Size, ceilings: Ceilings, budget_s: float, parts: Sequence[Part] = PARTS,
    before: Sequence[Record] = (),
) -> Iterator[list[Record]]:  # fmt: skip
    """The records of each case: tests and gates, then timings.

    Args:
        budget_s: for all of `parts` together; a part has no more than PART_SECONDS of it.
        before: records of earlier calls.
    """
    tiny, end = size == "tiny", time.monotonic() + budget_s
    for part in parts:
        # Small sizes need no boxes: the budget itself is enough, and processes take their seconds to start.
        until = end if tiny else min(end, time.monotonic() + PART_SECONDS)
        known = finished(before, device, timed=part != "correctness")
        if part == "correctness":
            yield from _correctness(device, ceilings, until, tiny, known)
            continue
        for name, question in QUESTIONS.items():
            if question.suite == part:
                left = until - time.monotonic()
                yield from run_question(
                    name, device, size, ceilings, box_s=0.02 if tiny else question.suite_box_s,
                    seconds=left if tiny else min(question.suite_s, left), known=known,
                )  # fmt: skip


def _correctness(
    device: torch.device, ceilings: Ceilings, until: float, tiny: bool, known: Collection[Key]
) -> Iterator[list[Record]]:
    """The tests that need the device, then the gates of all questions of the suite."""
    on_device = ON_DEVICE if device.type == "cuda" else []
    tests = tests_of(["tests/ops/test_philox.py"] if tiny else [*ROOMS, *on_device])
    if tests.key() not in known:
        yield [stamp(run_tests(tests, min(TEST_SECONDS, until - time.monotonic())), device, ceilings)]
    for name, question in QUESTIONS.items():
        if question.suite:
            yield from run_question(
                name, device, "tiny", ceilings, box_s=0.0, seconds=until - time.monotonic(), gates_only=True,
                known=known,
            )  # fmt: skip


def tests_of(which: Sequence[str]) -> Record:
    """The record of a run of tests, before it."""
    return Record("gate_tests", "pytest", {"tests": " ".join(which)}, TEST_SECONDS * 1e3)


def run_tests(record: Record, box_s: float) -> Record:
    """Run the tests a record names, in processes of their own, and fill it in."""
    parallel = ["-n", "8"] if find_spec("xdist") and (os.cpu_count() or 1) >= 8 else []
    which = record.params["tests"].split()
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=20", "-p", "no:cacheprovider", *parallel, *which]
    started = time.monotonic()
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(box_s, 1.0))
        record.note = (run.stdout.strip().splitlines() or [run.stderr.strip()[-200:]])[-1]
        if run.returncode:
            record.status = "failed"
            print(run.stdout[-4000:])
    except subprocess.TimeoutExpired:
        record.status, record.note = "failed", f"not done after {box_s:.0f} s"
    record.extra = {"seconds": time.monotonic() - started}
    return record
