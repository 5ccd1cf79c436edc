"""The commands, run as a user runs them, at sizes at which times mean nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Compilation takes longer than all else here; without it torch.compile's providers run as plain PyTorch.
QUIETLY = os.environ | {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}


def benchmarks(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`python -m benchmarks …` in the checkout."""
    command = [sys.executable, "-m", "benchmarks", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=QUIETLY, capture_output=True, text=True, timeout=400)


@pytest.mark.slow
def test_device_suite_runs_to_its_end(tmp_path):
    pytest.importorskip("timm")
    output = tmp_path / "suite.jsonl"
    run = benchmarks("--device-suite", "--device", "cpu", "--budget", 150, "--tiny", "--output", output)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert records[0]["case"] == "gate_tests" and records[0]["status"] == "ok"
    ours = [r for r in records if r["impl"].startswith("mimir_fast")]
    assert not [r for r in ours if r["status"] == "failed"]
    assert {r["case"] for r in ours if r["ms"]} >= {"patchify_gather", "linf_step", "random_masks", "hsic_fwd_bwd"}
    assert all("predicted_ms" in r and r["utc"] for r in records)
    again = benchmarks("--device-suite", "--part", "correctness", "--device", "cpu", "--tiny", "--output", output)
    assert again.returncode == 0, again.stderr[-2000:]
    new = [json.loads(line) for line in output.read_text().splitlines()][len(records) :]
    assert (new == []) is not records[0]["dirty"], "what is there of this commit is not run again"


@pytest.mark.slow
def test_one_question_compared_with_itself(tmp_path):
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    first = benchmarks("linf_step", "--tiny", "--device", "cpu", "--output", old)
    assert first.returncode == 0, first.stderr[-2000:]
    assert "linf_step" in first.stdout and (tmp_path / "old.png").is_file()
    slow = [json.loads(line) for line in old.read_text().splitlines()]
    for record in slow:
        record["ms"] = {name: value / 1000 for name, value in record["ms"].items()} | {"noise": 0.0}
    old.write_text("".join(json.dumps(record) + "\n" for record in slow))
    second = benchmarks("linf_step", "--tiny", "--device", "cpu", "--output", new, "--compare", old)
    assert second.returncode == 1 and "SLOWER" in second.stdout


@pytest.mark.slow
def test_families_run(tmp_path):
    pytest.importorskip("timm")
    output = tmp_path / "families.jsonl"
    run = benchmarks("families", "--tiny", "--device", "cpu", "--output", output)
    assert run.returncode == 0, run.stderr[-2000:]
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert {r["case"] for r in records} == {"aemim_step", "convit_step", "convnext_forward"}
    assert not [r for r in records if r["status"] == "failed"]
