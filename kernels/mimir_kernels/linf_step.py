"""The L∞ attack update in one pass (see mimir_fast/ops/linf_step.py).

Three streams in, one out, nothing reused: bound by memory bandwidth, so the only question is the width of the loads.
BLOCK = 1024 over 4 warps gives each thread two 16-byte loads a stream in fp32. All rounding steps of the definition are
kept (bf16: the iterate after each operation, the ball's bounds towards x), so the result equals it bit for bit.
Legend: n elements in memory order; element i has radius eps_ptr[i // inner % num_eps], or the scalar `eps`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimir_kernels.aot import AotCase

BLOCK = 1024


@triton.jit
def _not_above(value, dtype: tl.constexpr):
    """As fp32, the largest number of a 16-bit dtype that is not above `value` (ops/ball.py)."""
    nearest = value.to(dtype).to(tl.float32)
    half_a_unit: tl.constexpr = 2.0**-8 if dtype == tl.bfloat16 else 2.0**-11
    smallest: tl.constexpr = 2.0**-126 if dtype == tl.bfloat16 else 2.0**-14
    size = tl.where(tl.abs(value) < smallest, smallest, tl.abs(value))
    below = (value - size * half_a_unit).to(dtype).to(tl.float32)
    return tl.where(nearest > value, below, nearest)


@triton.jit
def within(y, x, radius, low, high, dtype: tl.constexpr):
    """y cut to [low, high] and then to the ball around x, all fp32 that hold numbers of `dtype`; NaNs stay."""
    lower, upper = x - radius, x + radius
    if dtype != tl.float32:
        lower, upper = -_not_above(-lower, dtype), _not_above(upper, dtype)
    # Written so that a NaN in y stays; torch.maximum and clamp hand NaNs on as well.
    y = tl.where(y < low, low, y)
    y = tl.where(y > high, high, y)
    y = tl.where(y < lower, lower, y)
    y = tl.where(y > upper, upper, y)
    return tl.where(lower == lower, y, lower)  # a NaN in x or in the radius


@triton.jit
def _linf_step_kernel(
    x_adv_ptr,
    grad_ptr,
    x_ptr,
    eps_ptr,
    out_ptr,
    n,
    num_eps,
    inner,
    alpha,
    eps,
    low,
    high,
    HAS_RADII: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    inside = offsets < n
    dtype = out_ptr.dtype.element_ty
    x_adv = tl.load(x_adv_ptr + offsets, mask=inside).to(tl.float32)
    grad = tl.load(grad_ptr + offsets, mask=inside).to(tl.float32)
    x = tl.load(x_ptr + offsets, mask=inside).to(tl.float32)
    if HAS_RADII:  # the 64-bit divisions once a block, 32-bit ones for its elements
        first = start // inner
        step = (start - first * inner + tl.arange(0, BLOCK)).to(tl.int32) // inner
        radius = tl.load(eps_ptr + ((first % num_eps).to(tl.int32) + step) % num_eps, mask=inside).to(tl.float32)
    else:
        radius = eps
    # torch.sign: 0 for a NaN as for a zero.
    move = tl.where(grad > 0, alpha, tl.where(grad < 0, -alpha, 0.0)).to(dtype).to(tl.float32)
    y = within((x_adv + move).to(dtype).to(tl.float32), x, radius, low, high, dtype)
    tl.store(out_ptr + offsets, y.to(dtype), mask=inside)


def linf_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    radii: Tensor | None,
    inner: int,
    alpha: float,
    eps: float,
    low: float,
    high: float,
    out: Tensor,
) -> None:
    """Launch: five dense tensors of one memory order, any float dtype; `radii` is 1-D (see the legend) or None."""
    n = out.numel()
    has_radii = radii is not None
    num_eps = len(radii) if radii is not None else 1
    values = radii if radii is not None else out
    with torch.cuda.device_of(out):
        _linf_step_kernel[(triton.cdiv(n, BLOCK),)](
            x_adv, grad, x, values, out, n, num_eps, inner, alpha, eps, low, high, has_radii, BLOCK
        )


def aot_cases() -> list[AotCase]:
    """One radius, one per channel of an image, one per number of a patch; a launcher specialises integers of 1 away."""
    pointers = ("x_adv_ptr", "grad_ptr", "x_ptr", "eps_ptr", "out_ptr")
    numbers = dict.fromkeys(("n", "num_eps", "inner"), "i32") | dict.fromkeys(("alpha", "eps", "low", "high"), "fp32")

    def case(name: str, dtype: str, has_radii: bool, ones: tuple[str, ...]) -> AotCase:
        signature = dict.fromkeys(pointers, f"*{dtype}") | numbers
        return AotCase(
            name=f"linf_step.{name}",
            kernel=_linf_step_kernel,
            signature={key: kind for key, kind in signature.items() if key not in ones},
            constexprs={"HAS_RADII": has_radii, "BLOCK": BLOCK} | dict.fromkeys(ones, 1),
            divisible_by_16=("n",),
            vector_loads=True,
        )

    return [
        case("fp32", "fp32", False, ("num_eps", "inner")),
        case("bf16", "bf16", False, ("num_eps", "inner")),
        case("fp32_per_channel", "fp32", True, ()),
        case("fp32_per_patch_number", "fp32", True, ("inner",)),
    ]
