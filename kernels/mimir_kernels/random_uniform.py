"""Counter-based uniform numbers and the random start of an attack (see mimir_fast/ops/random_uniform.py).

Each program fills BLOCK numbers of one sample. Four numbers cost one Philox call, so a number costs some 25 integer
instructions and 4 bytes written: near the memory bound. Fused multiply-add is off in the start, for the definition
rounds the noise before it adds it.
Legend: B samples of `num` numbers; program p does piece p % pieces of sample p // pieces.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimir_kernels.aot import AotCase
from mimir_kernels.linf_step import within
from mimir_kernels.philox import random_bits, to_uniform

BLOCK = 1024


@triton.jit
def _random_uniform_kernel(samples_ptr, steps_ptr, out_ptr, num, pieces, seed, stream, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    row, first = program // pieces, (program % pieces) * BLOCK
    sample, step = tl.load(samples_ptr + row), tl.load(steps_ptr + row)
    uniform = to_uniform(random_bits(seed, sample, step, stream, first, BLOCK))
    columns = first + tl.arange(0, BLOCK)
    tl.store(out_ptr + row.to(tl.int64) * num + columns, uniform, mask=columns < num)


@triton.jit
def _random_start_linf_kernel(
    x_ptr, samples_ptr, steps_ptr, out_ptr, num, pieces, seed, stream, eps, low, high, BLOCK: tl.constexpr
):
    program = tl.program_id(0)
    row, first = program // pieces, (program % pieces) * BLOCK
    sample, step = tl.load(samples_ptr + row), tl.load(steps_ptr + row)
    noise = (2 * to_uniform(random_bits(seed, sample, step, stream, first, BLOCK)) - 1) * eps
    columns = first + tl.arange(0, BLOCK)
    offsets = row.to(tl.int64) * num + columns
    dtype = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + offsets, mask=columns < num).to(tl.float32)
    y = within((x + noise.to(dtype).to(tl.float32)).to(dtype).to(tl.float32), x, eps, low, high, dtype)
    tl.store(out_ptr + offsets, y.to(dtype), mask=columns < num)


def random_uniform(samples_B: Tensor, steps_B: Tensor, num: int, seed: int, stream: int) -> Tensor:
    """(B, num) float32; samples and steps contiguous int64."""
    out = torch.empty((len(samples_B), num), dtype=torch.float32, device=samples_B.device)
    pieces = triton.cdiv(num, BLOCK)
    if out.numel():
        with torch.cuda.device_of(out):
            _random_uniform_kernel[(len(out) * pieces,)](samples_B, steps_B, out, num, pieces, seed, stream, BLOCK)
    return out


def random_start_linf(
    x: Tensor, samples_B: Tensor, steps_B: Tensor, seed: int, stream: int, eps: float, low: float, high: float
) -> Tensor:
    """clamp(x + eps·(2u − 1)) for a contiguous x (B, …)."""
    out = torch.empty_like(x)
    num = out.numel() // max(len(x), 1)
    pieces = triton.cdiv(num, BLOCK)
    if out.numel():
        with torch.cuda.device_of(out):
            _random_start_linf_kernel[(len(x) * pieces,)](
                x, samples_B, steps_B, out, num, pieces, seed, stream, eps, low, high, BLOCK, enable_fp_fusion=False
            )
    return out


def aot_cases() -> list[AotCase]:
    """Both kernels on rows of a multiple of 16 numbers, as images and patches have."""
    counter = {"samples_ptr": "*i64", "steps_ptr": "*i64", "out_ptr": "*fp32"}
    size = {"num": "i32", "pieces": "i32", "seed": "i64", "stream": "i32"}
    ball = {"eps": "fp32", "low": "fp32", "high": "fp32"}
    constexprs = {"BLOCK": BLOCK}
    return [
        AotCase("random_uniform.fp32", _random_uniform_kernel, counter | size, constexprs, ("num",)),
        AotCase(
            "random_uniform.start_fp32",
            _random_start_linf_kernel,
            {"x_ptr": "*fp32"} | counter | size | ball,
            constexprs,
            ("num",),
            options={"enable_fp_fusion": False},
            vector_loads=True,
        ),
    ]
