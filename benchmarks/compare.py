"""Two runs side by side: what became slower by more than both runs' noise is a regression."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.record import Record

# Two runs on an idle machine differ by this much for reasons of nobody's.
LEAST_MARGIN = 0.05


@dataclass(frozen=True)
class Change:
    """One number then and now.

    Attributes:
        ratio: new median / old median; infinite for what was correct then and is not now.
        margin: how far from 1 the ratio may be before it means something.
    """

    record: Record
    old_ms: float
    ratio: float
    margin: float

    @property
    def is_regression(self) -> bool:
        """Slower beyond the noise, or lost."""
        return self.ratio > 1 + self.margin

    def __str__(self) -> str:
        """A line for a person."""
        name = f"{self.record.case} {self.record.impl} {self.record.params}"
        if math.isinf(self.ratio):
            return f"LOST      {name}: now {self.record.status}: {self.record.note}"
        word = "SLOWER" if self.is_regression else "faster" if self.ratio < 1 - self.margin else "same"
        times = f"{self.old_ms:.3f} -> {self.old_ms * self.ratio:.3f} ms"
        return f"{word:9} {name}: {times} ({self.ratio:.2f}x, noise {self.margin:.0%})"


def compare(old: Sequence[Record], new: Sequence[Record]) -> list[Change]:
    """The numbers both runs have, the worst first.

    Raises:
        ValueError: they come from different machines, or have nothing in common.
    """
    before = {record.key(): record for record in old if record.status == "ok" and record.ms}
    changes = []
    for record in new:
        then = before.get(record.key())
        if then is None:
            continue
        if machine(then) != machine(record):
            raise ValueError(
                f"the old numbers are of {machine(then)}, the new ones of {machine(record)}: times of different "
                "machines cannot be compared; run the old commit here with --output OLD.jsonl first"
            )
        old_ms = then.ms["median"]
        if record.status != "ok":
            changes.append(Change(record, old_ms, math.inf, 0.0))
        elif record.ms and not (then.disturbed or record.disturbed):
            margin = max(LEAST_MARGIN, spread(then) + spread(record))
            changes.append(Change(record, old_ms, record.ms["median"] / old_ms, margin))
    if not changes:
        raise ValueError(
            "the two runs have no case in common that other work did not disturb: give --compare a file of the same "
            "cases and sizes"
        )
    return sorted(changes, key=lambda change: -change.ratio)


def spread(record: Record) -> float:
    """Noise of a run: half the distance of p20 and p80, or the difference of the two series if that is larger."""
    ms = record.ms
    return max((ms["p80"] - ms["p20"]) / 2 / ms["median"], ms["noise"])


def machine(record: Record) -> str:
    """What must be the same for times to be comparable."""
    return f"{record.hw.get('gpu') or record.hw.get('cpu')}, {record.hw.get('threads')} threads"
