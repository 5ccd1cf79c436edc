"""From a question to its records: for each case the gate, memory, the clock; what fails or is late is a record too."""

import gc
import math
import signal
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

import torch

from benchmarks import predictions
from benchmarks.apart import Apart
from benchmarks.case import Case, Run, Size, is_ours
from benchmarks.ceilings import Ceilings
from benchmarks.disturbance import MOST, words
from benchmarks.gate import judge
from benchmarks.memory import extra_peak_mb
from benchmarks.questions import cases_of
from benchmarks.record import Key, Record, Status, environment_once, stamp
from benchmarks.timing import num_sets, time_providers

OUR_PACKAGES = ("mimir_fast", "mimir_kernels", "benchmarks")


class OverTime(BaseException):
    """A case overstayed its box. No Exception: what handles the failure of one provider must let it through."""


def run_question(
    question: str, device: torch.device, size: Size, ceilings: Ceilings, *, box_s: float, only: str | None = None,
    seconds: float = math.inf, gates_only: bool = False, known: Collection[Key] = (),
) -> Iterator[list[Record]]:  # fmt: skip
    """The records of each case of a question.

    Args:
        box_s: seconds for the timing of all providers of a case; gates, compilation and memory come on top.
        only: cases of this label.
        seconds: for everything: the case that overstays them is broken off, later ones are passed over.
        gates_only: judge ours, time nothing; the others are left out.
        known: keys of records that are there already; a case with all of its records there is not run.
    """
    until = time.monotonic() + seconds
    try:
        for case in cases_of(question)(device, size):
            if only in (None, *case.labels) and not _is_known(case, ceilings, known, gates_only):
                left = until - time.monotonic()
                yield _whatever_happens(case, device, ceilings, left, box_s=box_s, gates_only=gates_only)
    except Exception as error:  # the question's own set-up
        record = Record(question, "set-up", {}, 0.0)
        record.status, record.note = outcome(error)
        yield [stamp(record, device, ceilings)]


def _is_known(case: Case, ceilings: Ceilings, known: Collection[Key], gates_only: bool) -> bool:
    """Whether every record that the case would make is there; of ours only, where no other is made."""
    records = _blanks(case, ceilings).values()
    return all(r.key() in known for r in records if r.status == "ok" and (is_ours(r.impl) or not gates_only))


def _whatever_happens(
    case: Case, device: torch.device, ceilings: Ceilings, left: float, **options: Any
) -> list[Record]:
    """`run_case`; one record with the reason where its inputs or its definition fail, or time is up."""
    try:
        with time_limit(left):
            return run_case(case, device, ceilings, **options)
    except (Exception, OverTime) as error:
        record = next(iter(_blanks(case, ceilings).values()))
        record.status, record.note = outcome(error)
        return [stamp(record, device, ceilings)]


def run_case(
    case: Case, device: torch.device, ceilings: Ceilings, *, box_s: float, gates_only: bool = False
) -> list[Record]:
    """One record a provider: `ok` with all numbers, `failed` at the gate or by an exception, `skipped` with the reason.

    Arguments as for `run_question`.
    """
    records = _blanks(case, ceilings)
    inputs = drawn(case.gate_inputs or case.make_inputs, 0, device)
    reference = case.reference(inputs)
    for provider in case.providers:
        if not provider.skip and (is_ours(provider.name) or not gates_only):
            progress(f"  {case.name} {provider.name}: gate")
            record = records[provider.name]
            with _failure_in(record):
                expected = provider.reference(inputs) if provider.reference else reference
                record.err, reason = judge(case, provider, inputs, expected)
                if reason:
                    record.status, record.note = "failed", f"not the definition: {reason}"
    del inputs, reference
    if not gates_only:
        _measure(case, device, box_s, records)
    for record in records.values():
        stamp(record, device, ceilings)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return [record for record in records.values() if is_ours(record.impl) or not gates_only]


def drawn(make_inputs: Callable[[], Any], seed: int, device: torch.device) -> Any:
    """A set of inputs."""
    torch.manual_seed(seed)
    with device:
        return make_inputs()


def outcome(error: BaseException) -> tuple[Status, str]:
    """Skipped where time is up or another's package is missing, else failed; and why, in one line with the place."""
    text = next(iter(str(error).strip().splitlines()), "")
    missing = isinstance(error, ImportError) and not (error.name or "").startswith(OUR_PACKAGES)
    if missing or isinstance(error, OverTime):
        return "skipped", text
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return "failed", f"{type(error).__name__}: {text} ({frame.filename.rpartition('/')[2]}:{frame.lineno})"


def progress(line: str) -> None:
    """What is going on, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\x1b[2K{line}", end="", file=sys.stderr, flush=True)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OverTime in the main thread after so many seconds (at the next Python instruction)."""
    if seconds <= 0:
        raise OverTime("no time left in the question's box or in the budget")

    def overstayed(signum: int, frame: FrameType | None) -> None:
        raise OverTime(f"not done after {seconds:.3g} s")

    before = signal.signal(signal.SIGALRM, overstayed)
    signal.setitimer(signal.ITIMER_REAL, seconds if math.isfinite(seconds) else 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _failure_in(record: Record) -> Iterator[None]:
    """An error of one provider must not end the run of the others; a KeyboardInterrupt must."""
    try:
        yield
    except Exception as error:
        record.status, record.note = outcome(error)


def _blanks(case: Case, ceilings: Ceilings) -> dict[str, Record]:
    """A record for each provider, with the prediction and without a measurement."""
    records = {}
    for p in case.providers:
        flops = case.flops if p.flops is None else p.flops
        records[p.name] = Record(
            case.name, p.name, case.params, ceilings.floor_ms(flops, case.bytes, p.precision or case.precision),
            flops=flops, bytes=case.bytes, baseline=case.baseline, note=p.skip or p.note,
            status="skipped" if p.skip else "ok",
        )  # fmt: skip
    return records


def _measure(case: Case, device: torch.device, box_s: float, records: dict[str, Record]) -> None:
    """Fill in times, rates, memory and speed-ups; a provider that fails at full size is taken out."""
    providers = {p.name: p for p in case.providers if records[p.name].status == "ok"}
    if not providers:
        return
    first = drawn(case.make_inputs, 1, device)
    sets = [first, *(drawn(case.make_inputs, 2 + i, device) for i in range(num_sets(first, device) - 1))]
    for name, provider in providers.items():
        with _failure_in(records[name]):
            if case.gate_inputs is not None:
                provider.run(first)  # the gate saw another size: compilers specialise again
            if case.memory:
                apart = provider.run if isinstance(provider.run, Apart) else None
                records[name].peak_mem_mb = extra_peak_mb(partial(provider.run, first), device, apart)
    runs: dict[str, Run] = {name: p.run for name, p in providers.items() if records[name].status == "ok"}
    elsewhere = [run.pid for run in runs.values() if isinstance(run, Apart) and run.pid]
    times = time_providers(runs, sets, box_s, elsewhere)
    for name, ms in times.items():
        record, provider, seconds = records[name], providers[name], ms["median"] / 1e3
        record.ms = ms
        record.tflops, record.gbps = record.flops / seconds / 1e12, case.bytes / seconds / 1e9
        record.items_per_s = case.items / seconds
        record.pct_of_measured_ceiling = 100 * record.predicted_ms / ms["median"]
        if is_ours(name) and predictions.device() in str(environment_once()["gpu"]):
            said = predictions.verdict(case.name, record.predicted_ms, ms["median"])
            record.note = "; ".join(filter(None, [record.note, said]))
        if record.disturbed:
            record.note = "; ".join(filter(None, [record.note, words(ms["disturbed"])]))
        elif case.baseline in times:
            record.speedup = times[case.baseline]["median"] / ms["median"]
        if products := provider.products or case.products:
            rate, share = products.tflops(provider.precision or case.precision, device)
            if share <= MOST:
                record.extra["TFLOP/s of its products"] = rate
                if not record.disturbed:
                    record.extra["% of that rate"] = 100 * record.tflops / rate
        if provider.report is not None:
            record.extra |= provider.report()
    for name, (one, other) in case.ratios.items():
        if one in times and other in times and not records[one].disturbed:
            records[one].extra[name] = times[one]["median"] / times[other]["median"]
