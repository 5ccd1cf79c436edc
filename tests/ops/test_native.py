"""The door to the C++ kernels: what it lets through, and what happens where there are none."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from mimir_fast import _native
from mimir_fast.ops import _checks, _dispatch

# What the package reads from the environment when it is imported. PyTorch, which takes longer, is imported once.
IMPORTS = """
import os, sys, torch
for name, value in (("MIMIR_FAST_NATIVE", "0"), ("MIMIR_FAST_CPU", "none"), ("MIMIR_FAST_NATIVE", "1")):
    if os.fork() == 0:
        os.environ[name] = value
        from mimir_fast import _native, linf_step
        if value == "0":
            x = torch.ones(2)
            print(_native.library(), float(linf_step(x, -x, x, alpha=0.25, eps=0.5).sum()))
        elif value == "none":
            print(_native.library() and (_native.unit(), _native.run("fp32_lanes"), _native.run("bf16_unit")))
        else:
            assert _native.library() is None or _native.has("linf_step")
            print(len({line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}))
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_can_be_turned_off_is_held_to_fewer_instructions_and_shares_the_threads_of_torch() -> None:
    """Whoever asks what computes is told so. Two OpenMP runtimes in one process would keep two pools of threads that
    spin against each other."""
    line = [sys.executable, "-c", IMPORTS]
    out = subprocess.run(line, env=os.environ | {"OMP_NUM_THREADS": "2"}, check=True, capture_output=True, text=True)
    off, held, runtimes = out.stdout.splitlines()
    assert off == "None 1.5"
    assert held == ("None" if _native.library() is None else "('none', 4, '')")
    assert runtimes == "1"


@pytest.mark.skipif(_native.library() is None, reason="the C++ extension is not built")
def test_an_unknown_unit_is_refused() -> None:
    library = _native.library()
    assert library is not None
    with pytest.raises(ValueError, match="MIMIR_FAST_CPU='sse9', wanted one of none"):
        library.use_unit("sse9")
    assert _native.unit() in ("none", "avx2", "avx512", "avx512-bf16", "amx")


def test_an_older_extension_lacks_a_function():
    assert not _native.has("a_kernel_of_next_year")


def test_a_tensor_is_no_number():
    """As sizes are under torch.jit.trace: their address must not become a count."""
    x = torch.ones(4)
    with pytest.raises(TypeError, match=r"linf_step: .* give a number"):
        _native.run("linf_step", x, x, x, x, x, torch.tensor(4), 1, 1, 0.1, 0.0, 1.0)


def test_knows_when_a_call_is_transformed_or_recorded():
    answers = {}

    def ask(name):
        def function(x):
            answers[name] = _native.transformed(), _dispatch.runs_native("linf_step", x)
            return x + 1

        return function

    x = torch.ones(3)
    torch.func.vmap(ask("vmap"))(x)
    torch.func.grad(lambda x: ask("grad")(x).sum())(x)
    torch.func.jvp(ask("jvp"), (x,), (x,))
    torch.jit.trace(ask("trace"), x, check_trace=False)
    with torch.autograd.forward_ad.dual_level():
        ask("dual level")(x)
    assert set(answers.values()) == {(True, False)} and len(answers) == 5
    assert not _native.transformed()


@pytest.mark.parametrize(
    ("tensor", "dense"),
    [
        (torch.empty(2, 3, 4), True),
        (torch.empty(2, 3, 4).permute(2, 0, 1), True),
        (torch.empty(2, 1, 4, 5).contiguous(memory_format=torch.channels_last), True),
        (torch.empty(0, 3), True),
        (torch.empty(()), True),
        (torch.empty(2, 3, 4)[:, 1:], False),
        (torch.empty(3, 1).expand(3, 4), False),
    ],
)
def test_dense(tensor, dense):
    assert _native.dense(tensor) == dense


PARALLEL = """
#include <cstdio>
#include <stdexcept>
#include "parallel.h"

int main() {
    for (int failing = 0; failing < 4; ++failing) {
        long done = 0;
        try {
            mimir::parallel_for(4, 1, 4, [&](std::int64_t begin, std::int64_t end) {
                if (begin <= failing && failing < end) throw std::runtime_error("chunk");
#pragma omp atomic
                done += end - begin;
            });
        } catch (const std::runtime_error& error) {
            std::printf("%s %ld ", error.what(), done);
        }
    }
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_what_a_thread_throws_reaches_the_caller(tmp_path):
    """An allocation may fail; an exception that leaves a thread would end the process."""
    source, program = tmp_path / "throws.cpp", tmp_path / "throws"
    source.write_text(PARALLEL)
    headers = Path(__file__).parents[2] / "csrc"
    subprocess.run(["g++", "-std=c++17", "-fopenmp", f"-I{headers}", source, "-o", program], check=True)
    environment = os.environ | {"OMP_DYNAMIC": "false"}
    found = subprocess.run([program], env=environment, check=True, capture_output=True, text=True).stdout
    assert found.split() == ["chunk", "3"] * 4


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64" or not shutil.which("objdump"), reason="reads x86-64 instructions")
@pytest.mark.parametrize("source", ["crop_resize.cpp", "fp32_attention.cpp"])
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_wide_instructions_are_built_by_every_compiler(compiler, source, tmp_path):
    """A pragma for an instruction set that a compiler does not know is skipped in silence."""
    if shutil.which(compiler) is None:
        pytest.skip(f"needs {compiler}")
    path, built = Path(__file__).parents[2] / "csrc" / source, tmp_path / "built.o"
    subprocess.run([compiler, "-std=c++17", "-O3", "-ffp-contract=off", "-w", "-c", path, "-o", built], check=True)
    listing = subprocess.run(["objdump", "-d", built], check=True, capture_output=True, text=True).stdout
    assert min(listing.count("%zmm"), listing.count("%ymm")) > 100


def test_numbers_are_not_read_while_a_cuda_graph_is_recorded(monkeypatch):
    monkeypatch.setenv("MIMIR_FAST_DEBUG", "1")
    with FakeTensorMode():
        x = torch.empty(2, device="cuda")
    for recording in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda recording=recording: recording)
        assert _checks.values_are_checked(x) != recording
