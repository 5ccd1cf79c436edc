"""The picture: one panel a case, one bar a provider; the dotted line is the roofline of the machine it ran on."""

import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.case import is_ours
from benchmarks.record import Record
from benchmarks.table import describe, number

OURS, OTHERS, BASELINE = "#1b6ca8", "#b9c4cc", "#7d8b95"


def draw(cases: Sequence[Sequence[Record]], path: Path) -> None:
    """Write a picture of the measured cases; does nothing when none was measured.

    Args:
        cases: the records of each case, as `runner.run_case` returns them.
        path: .png or .svg.
    """
    measured = [[record for record in case if record.ms] for case in cases]
    measured = [case for case in measured if case]
    if not measured:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 1 if len(measured) == 1 else 2
    rows = math.ceil(len(measured) / columns)
    bars = max(len(case) for case in measured)
    figure, axes = plt.subplots(
        rows, columns, figsize=(6.4 * columns, rows * (0.9 + 0.3 * bars) + 0.6), squeeze=False, layout="constrained"
    )
    for axis, case in zip(axes.flat, measured, strict=False):
        _panel(axis, case)
    for axis in list(axes.flat)[len(measured) :]:
        axis.set_axis_off()
    figure.suptitle(certificate(measured[0][0]), fontsize=8, color="0.35")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def certificate(record: Record) -> str:
    """Machine, software and commit in one line."""
    where = record.hw.get("gpu") or f"{record.hw.get('cpu')}, {record.hw.get('threads')} threads"
    commit = f"{(record.commit or 'no commit')[:12]}{' + changes' if record.dirty else ''}"
    legend = "bars: median, whiskers: p20-p80, dotted: roofline"
    return f"{where} | torch {record.sw.get('torch')} | {commit} | {record.utc[:10]} | {legend}"


def _panel(axis, case: Sequence[Record]) -> None:  # type: ignore[no-untyped-def]
    case = list(case)[::-1]  # the first provider on top
    medians = [record.ms["median"] for record in case]
    low = [record.ms["median"] - record.ms["p20"] for record in case]
    high = [record.ms["p80"] - record.ms["median"] for record in case]
    colours = [
        OURS if is_ours(record.impl) else BASELINE if record.impl == record.baseline else OTHERS for record in case
    ]
    axis.barh([record.impl for record in case], medians, xerr=[low, high], color=colours, error_kw={"lw": 0.8})
    for place, record in enumerate(case):
        text = f" {number(record.ms['median'])} ms"
        if record.speedup and record.impl != record.baseline:
            text += f"  {record.speedup:.2g}x"
        if record.peak_mem_mb is not None:
            text += f"  {number(record.peak_mem_mb)} MiB"
        axis.text(record.ms["p80"], place, text, va="center", fontsize=7)
    axis.set_xlim(0, 1.55 * max(record.ms["p80"] for record in case))
    if case[0].predicted_ms:
        axis.axvline(case[0].predicted_ms, color="#c0392b", lw=1, ls=":")
    axis.set_title(f"{case[0].case}  {describe(case[0].params)}", fontsize=8, loc="left")
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
