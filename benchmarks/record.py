"""The record of one number: what ran, how fast, how right, where. One line of JSON each, schema 1."""

import json
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.ceilings import Ceilings
from mimir_fast.versions import environment, version_of

SCHEMA = 1
Status = Literal["ok", "skipped", "failed"]
Key = tuple[str, str, str]
"""Case, implementation, parameters as JSON."""
_PACKAGES = ("triton", "timm", "xformers", "torchvision", "torchattacks", "pyautoattack")


@dataclass
class Record:
    """One provider of one case.

    Attributes:
        case, impl, params: what was run.
        predicted_ms: the roofline at this machine's measured ceilings, written down before the measurement.
        ms: median, p20, p80, n, first_median, repeat_median, noise (their relative difference), disturbed (the share
            of the time that other work took in each round; 0 where there were quiet ones).
        err: ref, rel_fro, max_rel, deterministic_bits; of the gate.
        pct_of_measured_ceiling: predicted_ms / median, in per cent.
        peak_mem_mb: extra memory of a call at its peak, in MiB, outputs included.
        speedup: the baseline's median / this one's.
        extra: further numbers of the provider's own.
        curve: of a training, points of numbers by name.
    """

    case: str
    impl: str
    params: dict[str, Any]
    predicted_ms: float
    status: Status = "ok"
    note: str = ""
    ms: dict[str, float] = field(default_factory=dict)
    flops: float = 0.0
    bytes: float = 0.0
    tflops: float = 0.0
    gbps: float = 0.0
    items_per_s: float = 0.0
    pct_of_measured_ceiling: float = 0.0
    peak_mem_mb: float | None = None
    err: dict[str, Any] = field(default_factory=dict)
    baseline: str = ""
    speedup: float | None = None
    extra: dict[str, float] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)
    hw: dict[str, Any] = field(default_factory=dict)
    sw: dict[str, Any] = field(default_factory=dict)
    commit: str | None = None
    dirty: bool = False
    utc: str = ""
    schema: int = SCHEMA

    def key(self) -> Key:
        """What makes two records of different runs comparable."""
        return self.case, self.impl, json.dumps(self.params, sort_keys=True)

    @property
    def disturbed(self) -> bool:
        """Its times mean nothing: other work took the cores meanwhile."""
        return self.ms.get("disturbed", 0.0) > 0


def stamp(record: Record, device: torch.device, ceilings: Ceilings) -> Record:
    """Give a record its birth certificate."""
    where = environment_once()
    commit = where["commit"] or ""
    record.commit, record.dirty = commit.removesuffix("-dirty") or None, commit.endswith("-dirty")
    record.utc = datetime.now(UTC).isoformat(timespec="seconds")
    versions = {name: version_of(name) for name in _PACKAGES}
    record.sw = {"python": where["python"], **versions, "torch": torch.__version__}  # with its +cuXXX
    record.hw = {
        "device": device.type,
        "gpu": where["gpu"] if device.type == "cuda" else None,
        "cpu": where["cpu"],
        "threads": torch.get_num_threads(),
        "ceil_copy_gbps": ceilings.copy_gbps,
        **{f"ceil_{name}_tflops": rate for name, rate in ceilings.tflops.items()},
        "ceil_disturbed": ceilings.disturbed,
    }
    if device.type == "cuda":
        record.hw |= {"sm": torch.cuda.get_device_properties(device).multi_processor_count, **gpu_state()}
    return record


environment_once = cache(environment)  # reading the commit costs a subprocess


def gpu_state() -> dict[str, Any]:
    """Driver and clock as nvidia-smi has them; {} without it."""
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout
        driver, clock = answer.splitlines()[0].split(",")
        return {"driver": driver.strip(), "clock_sm_mhz": int(clock)}
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return {}


def append(path: Path, records: Iterable[Record]) -> None:
    """Add lines to a file at once, so that a run that is cut off keeps what it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(asdict(record), default=str) + "\n" for record in records)


def read(path: Path) -> list[Record]:
    """The records of a file.

    Raises:
        ValueError: a line is no record of this schema.
    """
    records = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            values = json.loads(line)
            if values.get("schema") != SCHEMA:
                raise ValueError(f"schema {values.get('schema')}")
            values.pop("kernel", None)  # of records before November 2026; it was never filled
            records.append(Record(**values))
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path}:{number} is not a benchmark record of schema {SCHEMA} ({error}); "
                "give a file that `python -m benchmarks --output` wrote"
            ) from error
    return records


def finished(records: Iterable[Record], device: torch.device, *, timed: bool) -> set[Key]:
    """Keys of what succeeded on this device at this commit, without changes; `timed`: with undisturbed times."""
    commit = environment_once()["commit"]
    return {
        r.key() for r in records
        if r.status == "ok" and r.commit == commit and not r.dirty and r.hw.get("device") == device.type
        and (not timed or (r.ms and not r.disturbed))
    }  # fmt: skip


def by_case(records: Iterable[Record]) -> list[list[Record]]:
    """The records of each case together; of a provider that was run twice, the later one."""
    groups: dict[tuple[str, str], dict[str, Record]] = {}
    for record in records:
        case, impl, params = record.key()
        groups.setdefault((case, params), {})[impl] = record
    return [list(group.values()) for group in groups.values()]
