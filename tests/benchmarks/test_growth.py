"""Growth: exponents of laws that are known, the picture, and a page that holds the table of the committed records."""

from pathlib import Path

import pytest

from benchmarks import cli, growth
from benchmarks.record import Record, append, by_case, read

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "benchmarks/results/cpu-xeon-amx-growth.jsonl"


def at(n: int, milliseconds: float, *, impl: str = "mimir_fast", mebibytes: float = 1.0) -> Record:
    """HSIC of n samples."""
    ms = {"median": milliseconds}
    return Record("growth_hsic", impl, {"N": n}, 0.1, ms=ms, flops=float(n * n), peak_mem_mb=mebibytes)


def test_exponent_is_the_power_of_the_growth():
    records = [at(n, 3.0 * n**1.5, mebibytes=0.5 * n) for n in (2, 8, 64)]
    xs = [growth.place(record) for record in records]
    milliseconds, mebibytes = zip(*map(growth.measured, records), strict=True)
    assert growth.exponent(xs, milliseconds) == pytest.approx(1.5)
    assert growth.exponent(xs, mebibytes) == pytest.approx(1)


def test_table_has_a_row_a_line_and_shows_where_growth_turns():
    fixed_costs = [[at(n, 1000.0 + n**2)] for n in (2, 4, 4096, 8192)]
    failed = [[Record("growth_hsic", "eager", {"N": 2}, 0.1, status="failed")]]
    *_, row = growth.table([*fixed_costs, *failed]).splitlines()
    assert row.startswith("| samples | mimir_fast | 2 … 8192 | 2.00 |") and row.split("|")[6].strip() == "2.00"


def test_the_page_holds_the_table_of_the_committed_records():
    cases = by_case(read(RECORDS))
    assert not [record for case in cases for record in case if record.status == "failed" or record.dirty]
    page = (ROOT / "docs/benchmarks.md").read_text()
    assert growth.table(cases) in page, "python -m benchmarks growth --draw RECORDS prints the page's table"


def test_picture_is_drawn_from_records(tmp_path):
    append(tmp_path / "old.jsonl", [at(n, float(n)) for n in (2, 4)])
    assert cli.main(["growth", "--draw", str(tmp_path / "old.jsonl"), "--plot", str(tmp_path / "drawn.png")]) == 0
    assert (tmp_path / "drawn.png").stat().st_size > 5000
