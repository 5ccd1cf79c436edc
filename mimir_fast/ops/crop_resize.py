"""Crop, bicubic resize with antialiasing, window and mirror: a batch of uint8 images of any sizes to one size.

    image --box--> part --bicubic resize--> H' x W' --window at anchor, zeros outside--> H x W --mirror-->

The numbers are those of mimir_fast.data.geometry. The pixels are those of PIL's `resize(BICUBIC, box=…)`, bit for bit,
on every device: PIL rounds its weights to integers (22 fractional bits), so all that follows is integer arithmetic.
(Pillow 13 resizes some shapes along the columns first, which rounds otherwise; here the rows are first, as before 13.)
As in PIL, an antialiasing filter that reaches over the edge of the box sees the image around it.

Shapes: B images, C channels, H x W pixels of the result, S of them along an axis, K taps: the most pixels of one axis
that make an output pixel.
Source: Pillow's Resample.c; Keys, "Cubic convolution interpolation", 1981 (a = -0.5).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mimir_fast import _native
from mimir_fast.ops._dispatch import runs_native
from mimir_fast.ops._op import register_op
from mimir_fast.sizes import Size, height_width

PLAN = (
    "offset", "height", "width", "box_y", "box_x", "box_height", "box_width", "new_height", "new_width", "anchor_y",
    "anchor_x", "mirror",
)  # fmt: skip
"""The columns of a plan: where an image lies in the buffer and what becomes of it."""
BITS = 22
_HALF = 1 << (BITS - 1)


def crop_resize_reference(pixels: Tensor, plan: Tensor, side: Size, channels: int) -> Tensor:
    """The definition; every kernel is tested against it."""
    down, across = height_width(side)
    out = pixels.new_zeros((len(plan), channels, down, across))
    for row, numbers in enumerate(plan.tolist()):
        offset, height, width, y, x, box_height, box_width, new_height, new_width, top, left, mirror = numbers
        image = pixels[offset : offset + height * width * channels].view(height, width, channels).long()
        i, j = (torch.arange(number, device=pixels.device) for number in (down, across))
        j = j.flip(0) if mirror else j
        rows_SK, row_weights_SK = taps(i + top, height, y, box_height, new_height)
        columns_SK, column_weights_SK = taps(j + left, width, x, box_width, new_width)
        # Along the rows first, then along the columns, each rounded to 8 bits.
        between = _rounded((image[:, columns_SK] * column_weights_SK[..., None]).sum(2))
        out[row] = _rounded((between[rows_SK] * row_weights_SK[..., None, None]).sum(1)).permute(2, 0, 1)
    return out


def taps(places_S: Tensor, length: int, start: int, extent: int, resized: int) -> tuple[Tensor, Tensor]:
    """Which pixels make the given places of a resized axis: (pixels, weights), both (S, K) int64.

    Args:
        places_S: int64 places on the resized axis; all weights are 0 for one outside [0, resized).
        length: pixels of the source axis.
        start, extent: the part of it that is resized, to `resized` pixels.
    """
    scale = extent / resized
    filter_scale = max(scale, 1.0)
    support = 2.0 * filter_scale
    center_S = start + (places_S.double() + 0.5) * scale
    first_S = (center_S - support + 0.5).long().clamp(min=0)
    stop_S = (center_S + support + 0.5).long().clamp(max=length)
    pixels_SK = first_S[:, None] + torch.arange(most_taps(extent, resized), device=places_S.device)
    weights_SK = _bicubic((pixels_SK - center_S[:, None] + 0.5) * (1.0 / filter_scale))
    weights_SK = torch.where(pixels_SK < stop_S[:, None], weights_SK, 0.0)
    total_S = torch.zeros_like(center_S)
    for weights_S in weights_SK.unbind(1):  # in PIL's order: another one would round differently
        total_S += weights_S
    weights_SK = weights_SK / torch.where(total_S == 0, 1.0, total_S)[:, None] * (1 << BITS)
    weights_SK = torch.where(weights_SK < 0, weights_SK - 0.5, weights_SK + 0.5).long()
    inside_S = (places_S >= 0) & (places_S < resized)
    return pixels_SK.clamp(0, length - 1), weights_SK * inside_S[:, None]


def most_taps(extent: int, resized: int) -> int:
    """K, the most pixels that make one pixel of an axis on which `extent` become `resized`."""
    return math.ceil(2.0 * max(extent / resized, 1.0)) * 2 + 1


def _bicubic(x: Tensor) -> Tensor:
    x = x.abs()
    near, far = ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _rounded(sums: Tensor) -> Tensor:
    return ((sums + _HALF) >> BITS).clamp(0, 255)


def crop_resize(pixels: Tensor, plan: Tensor, *, side: Size, channels: int = 3) -> Tensor:
    """Cut every image of a batch to one size.

    Args:
        pixels: (bytes,) uint8, contiguous: the images one after the other, each (height, width, channels).
        plan: (B, 12) int64 **on the CPU**, the columns of `PLAN`; `make_plan` makes it.
        side: of the square result in pixels, or (H, W) of a rectangle.
        channels: C, 1 or 3.
    Returns:
        (B, C, H, W) uint8 on the device of `pixels`.
    Raises:
        ValueError: wrong shapes, an image outside the buffer, a box outside its image.    TypeError: wrong dtypes.
    """
    _check(pixels, plan, side, channels)
    return _crop_resize(pixels, plan, *height_width(side), channels)


def crop_resize_directly(pixels: Tensor, plan: Tensor, *, side: Size, channels: int = 3) -> Tensor:
    """`crop_resize` past torch's dispatcher, for processes that do nothing else: not to be compiled or traced.

    The first call of an op written in Python imports torch._dynamo: 2 s and 80 MB in each process of a loader.
    """
    _check(pixels, plan, side, channels)
    return _run(pixels, plan, *height_width(side), channels)


def _check(pixels: Tensor, plan: Tensor, side: Size, channels: int) -> None:
    if pixels.dtype != torch.uint8 or plan.dtype != torch.int64:
        raise TypeError(f"pixels must be uint8 and plan int64, got {pixels.dtype} and {plan.dtype}")
    if pixels.ndim != 1 or not pixels.is_contiguous():
        raise ValueError(f"pixels must be a contiguous buffer of one dimension, got {tuple(pixels.shape)}")
    if plan.ndim != 2 or plan.shape[1] != len(PLAN) or plan.device.type != "cpu":
        raise ValueError(f"plan must be (B, {len(PLAN)}) on the CPU, got {tuple(plan.shape)} on {plan.device}")
    if min(height_width(side)) < 1 or channels not in (1, 3):
        raise ValueError(f"side must be at least 1 and channels 1 or 3, got {side} and {channels}")
    check_plan(plan, len(pixels), channels)


def check_plan(plan: Tensor, num_bytes: int, channels: int) -> None:
    """Raises ValueError for an image outside the buffer or a box outside its image, so that no kernel reads astray."""
    offset, height, width, y, x, box_height, box_width, new_height, new_width, _, _, _ = plan.unbind(1)
    faults = {
        "an image ends outside the buffer": (offset < 0) | (offset + height * width * channels > num_bytes),
        "a box leaves its image": (y < 0) | (x < 0) | (y + box_height > height) | (x + box_width > width),
        "a size is less than 1": (torch.stack([box_height, box_width, new_height, new_width]) < 1).any(0),
    }
    for what, where in faults.items():
        if where.any():
            row = int(where.nonzero()[0])
            raise ValueError(f"plan: {what}: row {row} is {dict(zip(PLAN, plan[row].tolist(), strict=True))}")


def _definition(pixels: Tensor, plan: Tensor, height: int, width: int, channels: int) -> Tensor:
    return crop_resize_reference(pixels, plan, (height, width), channels)


def _run(pixels: Tensor, plan: Tensor, height: int, width: int, channels: int) -> Tensor:
    if len(plan) and pixels.is_cuda:
        from mimir_kernels import crop_resize as kernels

        return kernels.crop_resize(pixels, plan, (height, width), channels, most_taps_of(plan.tolist()))
    if runs_native("crop_resize", pixels, plan, dtype=None):
        out = pixels.new_empty((len(plan), channels, height, width))
        _native.run("crop_resize", pixels, plan.contiguous(), out, len(plan), height, width, channels)
        return out
    return crop_resize_reference(pixels, plan, (height, width), channels)


_crop_resize = register_op("crop_resize", _definition)(_run)


@_crop_resize.register_fake
def _(pixels: Tensor, plan: Tensor, height: int, width: int, channels: int) -> Tensor:
    return pixels.new_empty((plan.shape[0], channels, height, width))


def most_taps_of(plan: Sequence[Sequence[int]]) -> int:
    """K of a whole plan, over both axes."""
    return max(max(most_taps(row[5], row[7]), most_taps(row[6], row[8])) for row in plan)
