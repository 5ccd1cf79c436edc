"""Every tuned kernel, compiled for three GPU generations on a machine without any, against the committed table.

A figure that changes is a change to be understood, then written down:
`python -m mimir_kernels.aot --update tests/kernels/aot_table.json`.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)

from mimir_kernels import aot

TABLE = Path(__file__).with_name("aot_table.json")
GOOD = aot.AotMetrics(
    registers=128, shared=0, stack=0, spills=0, tensor_cores=4, vector_loads=8, vector_stores=8, instructions=500
)


def run_python(*args: object) -> subprocess.CompletedProcess[str]:
    """A process of its own: this one interprets kernels, which cannot be undone."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-W", "ignore", *map(str, args)], env=env, capture_output=True, text=True)


def run_aot(*args: object) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "mimir_kernels.aot", *args)


@pytest.mark.parametrize(
    "capability",
    [pytest.param(c, marks=[] if c == aot.CAPABILITIES[-1] else [pytest.mark.slow]) for c in aot.CAPABILITIES],
)
def test_every_kernel_keeps_its_promises(capability):
    """No spills; tensor cores and 128-bit loads where promised; figures as in the table, if it knows this Triton."""
    result = run_aot("--check", TABLE, "--capability", capability)
    assert result.returncode == 0, result.stderr
    assert f"/sm_{capability}" in result.stdout


def test_table_covers_oldest_and_newest_triton():
    table = json.loads(TABLE.read_text())
    assert {"3.6", "3.9"} <= table.keys()
    assert len({frozenset(rows) for rows in table.values()}) == 1, "the sections list different kernels: --update both"
    assert not [key for rows in table.values() for key, row in rows.items() if row["spills"]]


@pytest.mark.parametrize("prefix", ["laplacian", pytest.param("", marks=pytest.mark.slow, id="all")])
def test_kernels_compile_with_arguments_of_one(prefix):
    result = run_python(TABLE.with_name("compile_with_ones.py"), prefix)
    assert result.returncode == 0, result.stdout


def test_a_changed_figure_fails_and_says_what_to_type(tmp_path):
    table = json.loads(TABLE.read_text())
    rows = table.setdefault(aot.triton_minor(), next(iter(table.values())))
    rows["gram.center_fp32/sm_90"]["registers"] += 1
    tampered = tmp_path / "table.json"
    tampered.write_text(json.dumps(table))
    result = run_aot("--check", tampered, "--capability", 90, "--only", "gram.center_fp32")
    assert result.returncode == 1
    assert "gram.center_fp32/sm_90: registers" in result.stderr
    assert "--update" in result.stderr


@pytest.mark.parametrize(
    "change, words",
    [
        ({"spills": 3}, "spill"),
        ({"tensor_cores": 0}, "tensor-core"),
        ({"vector_loads": 0}, "128-bit"),
        ({"instructions": 2}, "body is gone"),
    ],
)
def test_a_broken_promise_is_named(change, words):
    case = aot.AotCase("x", None, {}, vector_loads=True, tensor_cores=True)
    assert aot.broken_promises(case, GOOD) == []
    (found,) = aot.broken_promises(case, aot.AotMetrics(**{**vars(GOOD), **change}))
    assert words in found


def test_interpreted_kernels_are_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="unset it"):
        aot.compile_case(aot.AotCase("x", None, {}), 90)
