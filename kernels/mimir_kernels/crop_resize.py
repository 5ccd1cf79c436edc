"""Crop, bicubic resize, window and mirror of uint8 images, bit for bit mimir_fast/ops/crop_resize.py's definition.

Two kernels. The first makes the weights of each axis, one program an image and an axis: double precision without fused
multiply-adds, summed in PIL's order, rounded to integers. The second is integer arithmetic only: a program makes a tile
of the result, for each row of its filter one pass along the rows, rounded to 8 bits, as the definition has it. That
repeats the pass along the rows for overlapping rows (4 to 9 times), rather than keep it in memory: neighbours read the
same pixels from the cache.
Legend: B images, S side of the result, K most taps of an axis; plan (B, 12) int64, columns as in `crop_resize.PLAN`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimir_kernels.aot import AotCase

COLUMNS = 12
BITS = tl.constexpr(22)
HALF = tl.constexpr(1 << 21)
BLOCK_TAPS = 64
TILE = 16, 32
_EXACT = {"enable_fp_fusion": False}


@triton.jit
def _bicubic(x):
    x = tl.abs(x)
    near = ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return tl.where(x < 1, near, tl.where(x < 2, far, 0.0))


@triton.jit
def _taps_kernel(plan_ptr, first_ptr, count_ptr, weights_ptr, side, most, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    image, axis = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = plan_ptr + image * COLUMNS
    length, start = tl.load(row + 1 + axis).to(tl.int32), tl.load(row + 3 + axis).to(tl.int32)
    extent, resized = tl.load(row + 5 + axis).to(tl.int32), tl.load(row + 7 + axis).to(tl.int32)
    anchor, mirror = tl.load(row + 9 + axis).to(tl.int32), tl.load(row + 11).to(tl.int32) * axis
    out = (image * 2 + axis) * side
    i = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    place = tl.where(mirror > 0, side - 1 - i, i) + anchor
    scale = extent.to(tl.float64) / resized.to(tl.float64)
    filter_scale = tl.where(scale < 1.0, 1.0, scale)
    support, narrower = 2.0 * filter_scale, 1.0 / filter_scale
    center = start.to(tl.float64) + (place.to(tl.float64) + 0.5) * scale
    first = tl.maximum((center - support + 0.5).to(tl.int32), 0)
    count = tl.minimum((center + support + 0.5).to(tl.int32), length) - first
    inside = (place >= 0) & (place < resized) & (i < side)
    count = tl.where(inside, count, 0)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for k in range(0, most):
        weight = _bicubic(((k + first).to(tl.float64) - center + 0.5) * narrower)
        total += tl.where(k < count, weight, 0.0)
    total = tl.where(total == 0, 1.0, total)
    for k in range(0, most):
        weight = _bicubic(((k + first).to(tl.float64) - center + 0.5) * narrower) / total * 4194304.0
        whole = tl.where(weight < 0, weight - 0.5, weight + 0.5).to(tl.int32)
        # Tap by tap, the weights of neighbouring outputs lie side by side, as the second kernel reads them.
        to = weights_ptr + ((image * 2 + axis) * most + k) * side + i
        tl.store(to, tl.where(k < count, whole, 0), mask=i < side)
    tl.store(first_ptr + out + i, tl.where(inside, first, 0), mask=i < side)
    tl.store(count_ptr + out + i, count, mask=i < side)


@triton.jit
def _crop_resize_kernel(
    pixels_ptr,
    plan_ptr,
    first_ptr,
    count_ptr,
    weights_ptr,
    out_ptr,
    side,
    most,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) % CHANNELS
    i = tl.program_id(1) // CHANNELS * ROWS + tl.arange(0, ROWS)
    j = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    width = tl.load(plan_ptr + image * COLUMNS + 2)
    pixels = pixels_ptr + tl.load(plan_ptr + image * COLUMNS) + channel
    rows, columns = image * 2 * side + i, (image * 2 + 1) * side + j
    row_first = tl.load(first_ptr + rows, mask=i < side, other=0)
    row_count = tl.load(count_ptr + rows, mask=i < side, other=0)
    first = tl.load(first_ptr + columns, mask=j < side, other=0)
    count = tl.load(count_ptr + columns, mask=j < side, other=0)
    row_weights, weights = weights_ptr + image * 2 * most * side + i, weights_ptr + (image * 2 + 1) * most * side + j
    most_rows, most_columns = tl.max(row_count, axis=0), tl.max(count, axis=0)
    sums = tl.full((ROWS, WIDTH), HALF, dtype=tl.int32)
    for k in range(0, most_rows):
        line = pixels + (row_first + k).to(tl.int64) * width * CHANNELS
        between = tl.full((ROWS, WIDTH), HALF, dtype=tl.int32)
        for m in range(0, most_columns):
            there = (k < row_count)[:, None] & (m < count)[None, :]
            pixel = tl.load(line[:, None] + ((first + m) * CHANNELS)[None, :], mask=there, other=0).to(tl.int32)
            between += pixel * tl.load(weights + m * side, mask=j < side, other=0)[None, :]
        between = tl.minimum(tl.maximum(between >> BITS, 0), 255)
        sums += between * tl.load(row_weights + k * side, mask=i < side, other=0)[:, None]
    result = tl.minimum(tl.maximum(sums >> BITS, 0), 255).to(tl.uint8)
    out = out_ptr + (image * CHANNELS + channel) * side * side + i[:, None] * side + j[None, :]
    tl.store(out, result, mask=(i < side)[:, None] & (j < side)[None, :])


def crop_resize(pixels: Tensor, plan: Tensor, size: int | tuple[int, int], channels: int, most: int) -> Tensor:
    """(B, channels, height, width) uint8. A rectangle is cut out of the square around it: no kernel of its own.

    Args:
        pixels: (bytes,) uint8 on the device.
        plan: (B, 12) int64, on the CPU or the device; checked.
        size: side of the square result, or its (height, width).
        most: K, the most taps of any axis of the plan.
    """
    batch = len(plan)
    height, width = (size, size) if isinstance(size, int) else size
    side = max(height, width)
    if width < side:  # a mirrored row begins at the far end, which the square has elsewhere
        plan = plan.clone()
        plan[:, 10] -= plan[:, 11] * (side - width)
    if pixels.is_cuda and not plan.is_cuda:
        plan = plan.pin_memory().to(pixels.device, non_blocking=True)
    plan = plan.contiguous()
    first, count = (torch.empty((batch, 2, side), dtype=torch.int32, device=pixels.device) for _ in range(2))
    weights = torch.empty((batch, 2, most, side), dtype=torch.int32, device=pixels.device)
    out = torch.empty((batch, channels, side, side), dtype=torch.uint8, device=pixels.device)
    if batch == 0:
        return out[..., :height, :width]
    rows, columns = TILE
    with torch.cuda.device_of(pixels):
        _taps_kernel[(batch, 2, triton.cdiv(side, BLOCK_TAPS))](
            plan, first, count, weights, side, most, COLUMNS, BLOCK_TAPS, num_warps=2, **_EXACT
        )
        grid = batch, channels * triton.cdiv(side, rows), triton.cdiv(side, columns)
        _crop_resize_kernel[grid](
            pixels, plan, first, count, weights, out, side, most, COLUMNS, channels, rows, columns, num_warps=4
        )
    return out[..., :height, :width].contiguous()


def aot_cases() -> list[AotCase]:
    """224 pixels of colour and grey images; one tap table."""
    tables = {"first_ptr": "*i32", "count_ptr": "*i32", "weights_ptr": "*i32"}
    numbers = {"side": "i32", "most": "i32"}
    cases = [
        AotCase(
            "crop_resize.taps",
            _taps_kernel,
            {"plan_ptr": "*i64", **tables, **numbers},
            {"COLUMNS": COLUMNS, "BLOCK": BLOCK_TAPS},
            divisible_by_16=("side",),
            num_warps=2,
            options=_EXACT,
        )
    ]
    for name, channels in (("colour", 3), ("grey", 1)):
        cases.append(
            AotCase(
                f"crop_resize.{name}",
                _crop_resize_kernel,
                {"pixels_ptr": "*u8", "plan_ptr": "*i64", **tables, "out_ptr": "*u8", **numbers},
                {"COLUMNS": COLUMNS, "CHANNELS": channels, "ROWS": TILE[0], "WIDTH": TILE[1]},
                divisible_by_16=("side",),
            )
        )
    return cases
