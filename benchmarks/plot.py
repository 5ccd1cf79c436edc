"""The picture: one row a case, on a line how many times faster than the baseline each provider is.

Times, memory, errors and rooflines are in the table and in the records; a picture that is read at the width of a page
has room for one number a provider.
"""

from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten

from benchmarks.case import is_ours
from benchmarks.record import Record
from benchmarks.table import number

OURS, COMPILED, OTHERS = "#1b6ca8", "#d98324", "#8a949c"
WIDTH, ROW_HEIGHT = 6.4, 0.46  # inches
DULL = {"dtype", "device"}  # parameters that all cases share


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
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    figure = Figure(figsize=(WIDTH, ROW_HEIGHT * len(rows) + 1.3), dpi=200, layout="constrained")
    axis = figure.subplots()
    axis.axvline(1, color="0.4", lw=1)
    for place, (_, shown) in enumerate(rows):
        _row(axis, place, shown)
    speedups = [r.speedup for _, shown in rows for r in shown if r.speedup]
    axis.set_xscale("log")
    axis.set_xlim(min(0.4, 0.8 * min(speedups)), 2.2 * max(speedups))  # room for the last label
    ticks = [t for t in (0.1, 0.3, 1, 3, 10, 30, 100) if 0.8 * min(speedups) <= t <= 2.2 * max(speedups)]
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axis.set_yticks(range(len(rows)), [title(case[0]) for case, _ in rows], fontsize=8)
    axis.set_ylim(len(rows) - 0.4, -0.6)  # the first case on top
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=8)
    for name, colour in (("mimir_fast", OURS), ("torch.compile", COMPILED), ("others", OTHERS)):
        axis.scatter([], [], color=colour, s=30, label=name)
    figure.legend(loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    axis.set_xlabel("times as fast as the baseline (eager PyTorch where there is one)", fontsize=9)
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
    return f"{where}, torch {first.sw.get('torch')}, {' '.join(days)}, commit {', '.join(commits)}"


def _row(axis, place: int, shown: Sequence[Record]) -> None:  # type: ignore[no-untyped-def]
    """Ours above the line, with time and name where there are several; the others below it."""
    ours = sorted((r for r in shown if is_ours(r.impl)), key=lambda r: r.speedup or 0)
    for record in shown:
        if not is_ours(record.impl):
            colour = COMPILED if record.impl.startswith("torch.compile") else OTHERS
            axis.scatter([record.speedup], [place + 0.14], color=colour, s=22, zorder=3)
    for record in ours:
        axis.scatter([record.speedup], [place - 0.14], color=OURS, s=34, zorder=4)
    words = []
    for record in ours:
        name = record.impl.removeprefix("mimir_fast").strip(" ,")
        words.append(f"{f'{name} ' if name else ''}{record.speedup:.2g}× ({number(record.ms['median'])} ms)")
    axis.annotate(
        "; ".join(words),
        (ours[-1].speedup, place - 0.14),
        (6, 0),
        textcoords="offset points",
        va="center",
        fontsize=7.5,
    )
