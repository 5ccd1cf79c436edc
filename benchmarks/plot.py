"""The picture: one row a case, on a line how many times faster than the baseline each provider is.

Times, memory, errors and rooflines are in the table and in the records; a picture that is read at the width of a page
has room for one number a provider.
"""

from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from benchmarks.case import is_ours
from benchmarks.record import Record
from benchmarks.table import number

OURS, COMPILED, OTHERS = "#1b6ca8", "#d98324", "#8a949c"
WIDTH, ROW_HEIGHT = 6.4, 0.46  # inches
DULL = {"device"}  # of all cases the same


def draw(cases: Sequence[Sequence[Record]], path: Path) -> None:
    """Write a picture of the cases that have a baseline; does nothing when there is none.

    Args:
        cases: the records of each case, as `runner.run_case` returns them.
        path: .png or .svg.
    """
    rows = [(case, comparable(case)) for case in cases]
    rows = [(case, shown) for case, shown in rows if any(is_ours(r.impl) for r in shown)]
    if not rows:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, ROW_HEIGHT * len(rows) + 1.3), dpi=200, layout="constrained")
    axis = figure.subplots()
    axis.axvline(1, color="0.4", lw=1)
    for place, (_, shown) in enumerate(rows):
        _row(axis, place, shown)
    speedups = [r.speedup for _, shown in rows for r in shown if r.speedup]
    axis.set_xscale("log")
    axis.set_xlim(min(0.4, 0.8 * min(speedups)), 5 * max(speedups))  # room for the last label
    ticks = [t for t in (0.1, 0.3, 1, 3, 10, 30, 100) if 0.8 * min(speedups) <= t <= 2.2 * max(speedups)]
    axis.set_xticks(ticks, [f"{tick:g}×" for tick in ticks], fontsize=8)
    axis.minorticks_off()
    axis.set_yticks(range(len(rows)), [title(case[0]) for case, _ in rows], fontsize=8)
    axis.set_ylim(len(rows) - 0.4, -0.6)  # the first case on top
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    for name in ("mimir_fast", "torch.compile", "others"):
        axis.scatter([], [], color=colour_of(name), s=30, label=name)
    figure.legend(loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    axis.set_xlabel("times as fast as the baseline", fontsize=9)
    figure.supxlabel(certificate([r for case, _ in rows for r in case]), fontsize=7, color="0.4")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def comparable(case: Sequence[Record]) -> list[Record]:
    """What was timed against the baseline and does the same work: MAE's step is cheaper than MIMIR's, not faster."""
    baseline = next((r for r in case if r.impl == r.baseline), None)
    return [
        r for r in case
        if baseline and r.ms and r.speedup and r.impl != r.baseline and r.flops == baseline.flops
    ]  # fmt: skip


def title(record: Record) -> str:
    """The case and its size, in two lines."""
    words = [str(v) if isinstance(v, str) else f"{k}={v}" for k, v in record.params.items() if k not in DULL]
    return f"{record.case.replace('_', ' ')}\n{shorten(', '.join(words), 40, placeholder=' …')}"


def certificate(records: Sequence[Record]) -> str:
    """Machine, software and commits."""
    first = records[0]
    where = first.hw.get("gpu") or f"{first.hw.get('cpu')}, {first.hw.get('threads')} threads"
    commits = dict.fromkeys(f"{(r.commit or 'no commit')[:7]}{' + changes' if r.dirty else ''}" for r in records)
    days = dict.fromkeys(r.utc[:10] for r in records)
    listed = shorten(", ".join(commits), 40, placeholder=" …")
    return f"{where}, torch {first.sw.get('torch')}, {min(days)}, commit {listed}"


def colour_of(impl: str) -> str:
    """Ours, torch.compile's, and everybody else's."""
    return OURS if is_ours(impl) else COMPILED if impl.startswith("torch.compile") else OTHERS


def _row(axis: Any, place: int, shown: Sequence[Record]) -> None:
    """Ours above the line, the fastest of them with time and name; the others below it."""
    for record in shown:
        ours = is_ours(record.impl)
        height, size = (place - 0.14, 34) if ours else (place + 0.14, 22)
        axis.scatter([record.speedup], [height], color=colour_of(record.impl), s=size, zorder=3 + ours)
    best = max((r for r in shown if is_ours(r.impl)), key=lambda r: r.speedup or 0)
    name = best.impl.removeprefix("mimir_fast").strip(" ,")
    words = f"{name} {best.speedup:.2g}× ({number(best.ms['median'])} ms)".strip()
    beside = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
    label = axis.annotate(words, (best.speedup, place - 0.14), fontsize=7.5, **beside)
    label.set_in_layout(False)  # it has its room in the axis, which must not shrink for it
