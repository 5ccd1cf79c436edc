"""From a case to its records: gate, memory, clock."""

import gc
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from benchmarks.case import Case, Outputs, Provider, is_ours
from benchmarks.ceilings import Ceilings
from benchmarks.gate import judge
from benchmarks.memory import extra_peak_mb
from benchmarks.record import Record, stamp
from benchmarks.timing import num_sets, time_providers

# Errors of one provider must not end the run of the others; a KeyboardInterrupt must.
Say = Callable[[str], None]


def run_case(
    case: Case, device: torch.device, ceilings: Ceilings, *, box_s: float, say: Say = print, gates_only: bool = False
) -> list[Record]:
    """One record a provider: `ok` with all numbers, `failed` at the gate or by an exception, `skipped` with the reason.

    Args:
        box_s: seconds for the timing of all providers together; gates, compilation and memory come on top.
        gates_only: judge ours, time nothing; the others are left out of the result.
    """
    records = {p.name: _blank(case, p, ceilings) for p in case.providers}
    inputs = (case.gate_inputs or case.make_inputs)(0)
    reference = case.reference(inputs)
    for provider in case.providers:
        if not provider.skip and (is_ours(provider.name) or not gates_only):
            say(f"  {case.name} {provider.name}: gate")
            expected = provider.reference(inputs) if provider.reference else reference
            _gate(case, provider, inputs, expected, records[provider.name])
    del inputs, reference
    sound = {p.name: p.run for p in case.providers if records[p.name].status == "ok"}
    if sound and not gates_only:
        first = case.make_inputs(1)
        sets = [first, *(case.make_inputs(2 + i) for i in range(num_sets(first, device, case.one_set) - 1))]
        _measure(case, sound, sets, device, box_s, records)
        for provider in case.providers:
            if provider.report is not None and records[provider.name].ms:
                records[provider.name].extra |= provider.report()
    for record in records.values():
        stamp(record, device, ceilings)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return [record for record in records.values() if is_ours(record.impl) or not gates_only]


def _blank(case: Case, provider: Provider, ceilings: Ceilings) -> Record:
    flops = case.flops if provider.flops is None else provider.flops
    return Record(
        case.name, provider.name, case.params,
        ceilings.floor_ms(flops, case.bytes, provider.precision or case.precision), flops=flops, bytes=case.bytes,
        baseline=case.baseline, note=provider.skip or provider.note, status="skipped" if provider.skip else "ok",
    )  # fmt: skip


def run_cases(
    cases: Iterator[Case], device: torch.device, ceilings: Ceilings, *, box_s: float, say: Say = print
) -> Iterator[list[Record]]:
    """`run_case` for each; a case whose inputs or definition fail is a failed record, not the end."""
    for case in cases:
        try:
            yield run_case(case, device, ceilings, box_s=box_s, say=say)
        except Exception as error:
            yield [failed(case, device, ceilings, error)]


def failed(case: Case, device: torch.device, ceilings: Ceilings, error: BaseException) -> Record:
    """The record of a case that could not even be set up."""
    record = _blank(case, case.providers[0], ceilings)
    record.status, record.note = "failed", reason_of(error)
    return stamp(record, device, ceilings)


def reason_of(error: BaseException) -> str:
    """One line, with the place."""
    text = str(error).strip().splitlines()
    said = f"{type(error).__name__}: {text[0] if text else ''}"
    if error.__traceback__ is None:
        return said
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{said} ({frame.filename.rpartition('/')[2]}:{frame.lineno})"


def _gate(case: Case, provider: Provider, inputs: object, reference: Outputs, record: Record) -> None:
    try:
        verdict = judge(case, provider, inputs, reference)
    except Exception as error:
        record.status, record.note = "failed", reason_of(error)
        return
    record.err = {
        "ref": "law" if provider.law else "fp64", "rel_fro": verdict.rel_fro, "max_rel": verdict.max_rel,
        "deterministic_bits": verdict.deterministic,
    }  # fmt: skip
    if verdict.reason:
        record.status, record.note = "failed", f"not the definition: {verdict.reason}"


def _measure(
    case: Case,
    runs: dict[str, Callable[[Any], Outputs]],
    sets: list[Any],
    device: torch.device,
    box_s: float,
    records: dict[str, Record],
) -> None:
    """Fill in times, rates, memory and speed-ups; a provider that fails at full size is taken out."""
    providers = {provider.name: provider for provider in case.providers}
    for name, run in list(runs.items()):
        try:
            if case.gate_inputs is not None:
                run(sets[0])  # the gate saw another size: compilers specialise again
            if case.memory:
                records[name].peak_mem_mb = extra_peak_mb(partial(run, sets[0]), device, providers[name].process)
        except Exception as error:
            records[name].status, records[name].note = "failed", reason_of(error)
            del runs[name]
    times = time_providers(runs, sets, box_s)
    for name, t in times.items():
        record, seconds = records[name], t.median / 1e3
        record.ms = {**asdict(t), "noise": t.noise}
        record.tflops, record.gbps = record.flops / seconds / 1e12, case.bytes / seconds / 1e9
        record.items_per_s = case.items / seconds
        record.pct_of_measured_ceiling = 100 * record.predicted_ms / t.median
        if case.baseline in times:
            record.speedup = times[case.baseline].median / t.median
        if products := providers[name].products or case.products:
            rate = products.tflops(providers[name].precision or case.precision, device)
            record.extra |= {"TFLOP/s of its products": rate, "% of that rate": 100 * record.tflops / rate}
    for name, (one, other) in case.ratios.items():
        if one in times and other in times:
            records[one].extra[name] = times[one].median / times[other].median
