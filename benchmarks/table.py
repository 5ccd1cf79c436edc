"""The table on the terminal."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.record import Record

COLUMNS = (
    "", "ms", "p20-p80", "±noise", "speed-up", "% of roof", "rate", "extra MiB", "error", "same bits",
)  # fmt: skip


def print_case(records: Sequence[Record]) -> None:
    """One table a case; notes and further numbers below it."""
    title = f"{records[0].case}  {' '.join(f'{name}={value}' for name, value in records[0].params.items())}"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index, name in enumerate(COLUMNS):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True, overflow="fold")
    for record in records:
        table.add_row(*row(record), style={"ok": None, "skipped": "dim", "failed": "red"}[record.status])
    # A pipe has no width, and a cut table is no use.
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(table, markup=False)
    for record in records:
        said = [*filter(None, [record.note]), *(f"{name} {value:.3g}" for name, value in record.extra.items())]
        if said:
            console.print(f"  {record.impl}: {'; '.join(said)}", style="dim", markup=False, highlight=False)
    console.print()


def row(record: Record) -> tuple[str, ...]:
    """The cells of one provider."""
    error = record.err.get("rel_fro")
    error = "" if error is None else f"{error:.1e}"
    if record.status != "ok" or not record.ms:
        return record.impl, record.status if record.status != "ok" else "passed", *[""] * 6, error, ""
    ms = record.ms
    rate = f"{record.items_per_s:.1f}/s" if record.items_per_s else ""
    if not rate:
        rate = f"{record.tflops * 1e3:.0f} GF/s" if record.flops else f"{record.gbps:.1f} GB/s"
    return (
        record.impl,
        number(ms["median"]),
        f"{number(ms['p20'])}-{number(ms['p80'])}",
        "disturbed" if record.disturbed else f"{100 * ms['noise']:.1f}%",
        f"{record.speedup:.2f}x" if record.speedup else "",
        f"{record.pct_of_measured_ceiling:.0f}%" if record.predicted_ms else "",
        rate,
        "" if record.peak_mem_mb is None else f"{record.peak_mem_mb:.1f}",
        error,
        {True: "yes", False: "no", None: ""}[record.err.get("deterministic_bits")],
    )


def number(value: float) -> str:
    """A number with three significant digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
