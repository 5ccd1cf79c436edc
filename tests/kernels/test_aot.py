"""Every tuned kernel, compiled for every GPU from sm_80 on by a machine without any, against the committed table.

A figure that changes is a change to be understood, then written down:
`python -m mimir_kernels.aot --update tests/kernels/aot_table.json`.
"""

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest
from commands import run_code, run_module

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

from mimir_kernels import aot

TABLE = Path(__file__).with_name("aot_table.json")
GOOD = aot.AotMetrics(
    registers=128, shared=101_376, stack=0, spills=0, tensor_cores=4, vector_loads=8, vector_stores=8, loses_nan=0,
    instructions=500,
)  # fmt: skip


def run_aot(folder: Path, *args: object) -> subprocess.CompletedProcess[str]:
    """In a process of its own: this one interprets kernels, which cannot be undone. Another worker would import PyTorch
    once more."""
    code = "import sys\nfrom mimir_kernels import aot\nif __name__ == '__main__':\n    sys.exit(aot.main())"
    return run_code(folder, code, *map(str, args), "--workers", "1")


@pytest.mark.parametrize(
    "capability",
    [pytest.param(c, marks=[] if c == aot.CAPABILITIES[-1] else [pytest.mark.slow]) for c in aot.CAPABILITIES],
)
def test_every_kernel_keeps_its_promises(capability, tmp_path):
    """No spills, no lost NaN, shared memory that fits, tensor cores and 128-bit loads where promised; figures as in the
    table, if it knows this Triton."""
    result = run_aot(tmp_path, "--check", TABLE, "--capability", capability)
    assert result.returncode == 0, result.stderr
    assert f"/sm_{capability}" in result.stdout


def test_table_covers_oldest_and_newest_triton():
    table = json.loads(TABLE.read_text())
    assert {"3.6", "3.9"} <= table.keys()
    # Triton 3.6 cannot read what it compiles for sm_103.
    listed = {frozenset(key for key in rows if not key.endswith("/sm_103")) for rows in table.values()}
    assert len(listed) == 1, "the sections list different kernels: --update both"
    for key, row in (item for rows in table.values() for item in rows.items()):
        limit = aot.SHARED_LIMITS[int(key.rpartition("_")[2])]
        assert not row["spills"] and not row["loses_nan"] and row["shared"] <= limit, key


@pytest.mark.parametrize("prefix", ["laplacian", pytest.param("", marks=pytest.mark.slow, id="all")])
def test_kernels_compile_with_arguments_of_one(prefix):
    result = run_module(TABLE.parent, "compile_with_ones", prefix)
    assert result.returncode == 0, result.stdout


def test_a_changed_figure_fails_and_says_what_to_type(tmp_path, monkeypatch, capsys):
    """Compared with figures of the table itself: what is compiled has them, as the test above sees."""
    table = json.loads(TABLE.read_text())
    rows = table.setdefault(aot.triton_minor(), next(iter(table.values())))
    monkeypatch.setattr(aot, "_require_compiler", lambda: None)
    monkeypatch.setattr(aot, "compile_all", lambda keys, workers: {k: aot.AotMetrics(**compiled[k]) for k in keys})
    compiled = {key: dict(row) for key, row in rows.items()}
    arguments = ["--check", str(tmp_path / "table.json"), "--capability", "90", "--only", "gram."]
    (tmp_path / "table.json").write_text(json.dumps(table))
    assert aot.main(arguments) == 0 and "gram.center_fp32/sm_90" in capsys.readouterr().out
    rows["gram.center_fp32/sm_90"]["registers"] += 1
    (tmp_path / "table.json").write_text(json.dumps(table))
    assert aot.main(arguments) == 1
    said = capsys.readouterr().err
    assert "gram.center_fp32/sm_90: registers" in said and said.count("FAILED") == 1
    assert "--update" in said


@pytest.mark.parametrize(
    "change, words",
    [
        ({"spills": 3}, "spill"),
        ({"shared": 101_377}, "101376 allowed"),
        ({"loses_nan": 1}, "lose a NaN"),
        ({"tensor_cores": 0}, "tensor-core"),
        ({"vector_loads": 0}, "128-bit"),
        ({"instructions": 2}, "body is gone"),
    ],
)
def test_a_broken_promise_is_named(change, words):
    case = aot.AotCase("x", None, {}, vector_loads=True, tensor_cores=True)
    assert aot.broken_promises(case, 120, GOOD) == []
    (found,) = aot.broken_promises(case, 120, aot.AotMetrics(**{**vars(GOOD), **change}))
    assert words in found


def test_interpreted_kernels_are_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="unset it"):
        aot.compile_case(aot.AotCase("x", None, {}), 90)


KERNEL = """
import triton
import triton.language as tl
from mimir_kernels import aot

@triton.jit
def kernel(x_ptr, y_ptr, KEEP: tl.constexpr):
    at = tl.arange(0, 128)
    y = tl.load(y_ptr + at)
    x = tl.load(x_ptr + at)
    if KEEP:
        low = tl.where(x < 0.0, 0.0, tl.minimum(x, 1.0, propagate_nan=tl.PropagateNan.ALL))
    else:
        low = tl.maximum(x, 0.0)
    tl.store(x_ptr + at, low)
    tl.store(y_ptr + at, tl.maximum(y, 0))

def lost(keep, dtype):
    case = aot.AotCase("x", kernel, {"x_ptr": "*" + dtype, "y_ptr": "*i32"}, {"KEEP": keep})
    return aot.compile_case(case, 90).loses_nan > 0

print(lost(True, "fp32"), lost(False, "fp32"), lost(False, "bf16"), lost(False, "fp64"))
"""


def test_a_lost_nan_is_found_in_what_was_compiled(tmp_path):
    result = run_code(tmp_path, KERNEL)
    assert result.stdout.split() == ["False", "True", "True", "True"], result.stderr
