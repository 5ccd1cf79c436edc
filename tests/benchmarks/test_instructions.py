"""Instructions by pipe against bytes, predicted for an H200."""

import subprocess
from collections import Counter
from pathlib import Path

import pytest
from commands import run_module

pytest.importorskip("triton")

from benchmarks import instructions
from mimir_kernels import aot, linf_step


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: this one interprets kernels."""
    return run_module(Path(__file__).parents[2], "benchmarks.instructions", *arguments)


@pytest.mark.slow
def test_kernels_are_near_their_memory_floor():
    result = run()
    assert result.returncode == 0, result.stderr


def test_what_is_above_the_limit_fails():
    result = run("--only", "masked_loss.l2_bf16", "--most", "0.5")
    assert result.returncode == 1 and "masked_loss.l2_bf16: more than 0.5" in result.stderr
    assert float(result.stdout.split()[-1]) <= 1.3


def test_a_balance_by_hand():
    """1,024 numbers of 16 bytes by 128 threads: eight additions a thread are one a number, in a pipe of half rate."""
    case = next(case for case in linf_step.aot_cases() if case.name == "linf_step.fp32")
    found = instructions.balance(case, Counter({"IADD3": 6, "IADD3.X": 2, "NOP": 100}))
    assert (found.bytes, found.instructions) == (16, 1.0)
    seconds = 2 / 32 / (132 * 4 * 1.98e9)
    assert found.pipes["alu"] == found.ratio == pytest.approx(seconds / (16 / 4.8e12))
    assert found.pipes["issue"] == pytest.approx(found.ratio / 2)


def test_every_pattern_is_of_whole_opcodes():
    case = aot.AotCase("x", linf_step._linf_step_kernel, linf_step.aot_cases()[0].signature, {"BLOCK": 1024})
    pipes = instructions.balance(case, Counter({"MOVM": 1, "IMAD.WIDE.U32": 1})).pipes
    assert pipes["alu"] == 0 and pipes["imad"] > 0
