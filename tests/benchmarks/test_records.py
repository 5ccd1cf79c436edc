"""What is written can be read, and a regression between two files is found."""

import json
from dataclasses import asdict

import pytest
import torch

from benchmarks import cli, plot, table
from benchmarks.ceilings import Ceilings
from benchmarks.compare import compare
from benchmarks.record import SCHEMA, append, by_case, read
from benchmarks.runner import run_case

CPU = torch.device("cpu")
CEILINGS = Ceilings(copy_gbps=1.0, tflops={"fp32": 1.0})


def test_record_has_every_field_of_the_schema_and_survives_the_file(squares, tmp_path):
    records = run_case(squares(bytes=1e6), CPU, CEILINGS, box_s=0.0)
    append(tmp_path / "deep" / "new.jsonl", records[:1])
    append(tmp_path / "deep" / "new.jsonl", records[1:])
    lines = (tmp_path / "deep" / "new.jsonl").read_text().splitlines()
    assert read(tmp_path / "deep" / "new.jsonl") == records
    line = json.loads(lines[0])
    assert line["schema"] == SCHEMA and line["predicted_ms"] == pytest.approx(1.0)
    assert set(line["ms"]) >= {"median", "p20", "p80", "n", "repeat_median"}
    assert {"rel_fro", "max_rel", "deterministic_bits", "ref"} == set(line["err"])
    assert line["hw"]["ceil_copy_gbps"] == 1.0 and line["hw"]["cpu"] and line["sw"]["torch"] == torch.__version__
    assert {"commit", "dirty", "utc", "flops", "bytes", "gbps", "pct_of_measured_ceiling", "peak_mem_mb"} <= set(line)


def test_picture_is_drawn_from_a_file(squares, tmp_path):
    for n in (16, 32, 16):  # a file collects: of two runs of a case the later one counts
        append(tmp_path / "old.jsonl", run_case(squares(params={"n": n}), CPU, CEILINGS, box_s=0.0))
    assert [len(case) for case in by_case(read(tmp_path / "old.jsonl"))] == [2, 2]
    assert cli.main(["--draw", str(tmp_path / "old.jsonl"), "--plot", str(tmp_path / "deep" / "drawn.png")]) == 0
    assert (tmp_path / "deep" / "drawn.png").stat().st_size > 5000


@pytest.mark.parametrize("text", ["not json", '{"schema": 0}', "3", '{"schema": 1, "nonsense": 2}'])
def test_foreign_file_is_refused(tmp_path, text):
    (tmp_path / "old.jsonl").write_text(text + "\n")
    with pytest.raises(ValueError, match=r"old\.jsonl:1 is not a benchmark record"):
        read(tmp_path / "old.jsonl")


@pytest.mark.parametrize(("then", "now", "bad"), [(1.0, 1.5, True), (1.0, 1.03, False), (1.5, 1.0, False)])
def test_regression_is_what_exceeds_the_noise(timed, then, now, bad):
    (change,) = compare([timed(then)], [timed(now)])
    assert change.is_regression is bad
    assert ("SLOWER" in str(change)) is bad


def test_noisy_runs_need_a_larger_difference(timed):
    then, now = timed(1.0), timed(1.3)
    then.ms["noise"] = 0.4
    (change,) = compare([then], [now])
    assert not change.is_regression


def test_what_was_right_and_is_wrong_now_is_a_regression(timed):
    (change,) = compare([timed(1.0)], [timed(1.0, status="failed")])
    assert change.is_regression and "LOST" in str(change)


def test_machines_are_not_compared(timed):
    with pytest.raises(ValueError, match="different machines"):
        compare([timed(1.0, cpu="another CPU")], [timed(1.0)])


def test_nothing_in_common_is_said(timed):
    with pytest.raises(ValueError, match="no case in common"):
        compare([timed(1.0, impl="mimir_fast 2")], [timed(1.0)])


def test_compare_from_the_command_line(timed, tmp_path, capsys):
    append(tmp_path / "old.jsonl", [timed(1.0)])
    assert cli.against(tmp_path / "old.jsonl", [[timed(2.0)]]) == 1
    assert cli.against(tmp_path / "old.jsonl", [[timed(1.0)]]) == 0
    assert cli.against(tmp_path / "old.jsonl", [[timed(1.0, cpu="another CPU")]]) == 2
    assert "2.00x" in capsys.readouterr().out


def test_table_and_picture_show_every_provider(squares, tmp_path, capsys):
    records = run_case(squares(), CPU, CEILINGS, box_s=0.0)
    table.print_case(records)
    shown = capsys.readouterr().out
    assert shown.count("mimir_fast") == 1 and shown.count("eager") == 1
    plot.draw([records], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5000


def test_identity_ignores_the_order_of_params(timed):
    one, other = timed(1.0), timed(1.0)
    one.params, other.params = {"a": 1, "b": 2}, {"b": 2, "a": 1}
    assert one.key() == other.key() and asdict(one) != {}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["hsik"], "unknown question hsik"),
        (["--compare", "nowhere.jsonl"], "no such file"),
        pytest.param(
            ["--device", "cuda"], "no CUDA GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)  # fmt: skip
def test_wrong_command_lines_are_explained(arguments, said, capsys):
    with pytest.raises(SystemExit):
        cli.parse(arguments)
    assert said in capsys.readouterr().err


def test_cheaper_work_is_no_speed_up_in_the_picture(timed):
    """MAE's step has fewer FLOPs than MIMIR's; another precision has not."""
    plain, ours, mae, half = timed(2.0), timed(1.0), timed(0.5), timed(0.4)
    for record, name in ((plain, "plain"), (ours, "mimir_fast"), (mae, "mimir_fast MAE"), (half, "mimir_fast bf16")):
        record.impl, record.baseline, record.speedup, record.flops = name, "plain", 2.0 / record.ms["median"], 10.0
    mae.flops = 6.0
    half.predicted_ms = plain.predicted_ms / 4
    assert [r.impl for r in plot.comparable([plain, ours, mae, half])] == ["mimir_fast", "mimir_fast bf16"]
