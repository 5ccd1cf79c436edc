"""Patches straight out of an image, and the same with uniform noise (see mimir_fast/ops/noisy_patches.py).

Each program does BLOCK numbers of one sample, as in `random_uniform.py`: it draws them, finds the pixels they belong to
and writes both results; what is read is the wanted pixels only, and noise stays in registers.
Legend: B images, K patches of PATCH x PATCH pixels of C channels, P = PATCH²·C, image strides in elements.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimir_kernels.aot import AotCase
from mimir_kernels.linf_step import within
from mimir_kernels.patches import byte_over_255, first_pixels, offset_type, patch_grid, pixel_offsets
from mimir_kernels.philox import random_bits, to_uniform

BLOCK = 1024


@triton.jit
def _noisy_patches_kernel(
    images_ptr,
    ids_ptr,
    samples_ptr,
    steps_ptr,
    clean_ptr,
    noisy_ptr,
    K,
    pieces,
    num_patches,
    columns,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    seed,
    stream,
    eps,
    C: tl.constexpr,
    PATCH: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    P: tl.constexpr = PATCH * PATCH * C
    b, piece = tl.program_id(0) // pieces, tl.program_id(0) % pieces
    first = piece * BLOCK
    number = first + tl.arange(0, BLOCK)
    inside = number < K * P
    patch = (number.to(tl.uint32) // P).to(tl.int32)
    id = tl.load(ids_ptr + b.to(tl.int64) * K + patch, mask=inside, other=-1)
    corner, known = first_pixels(b, id, num_patches, columns, stride_b, stride_h, stride_w, PATCH)
    pixel = pixel_offsets(number - patch * P, stride_c, stride_h, stride_w, C, PATCH, OFFSET)
    # Nobody's memory is read for a wrong id.
    value = tl.load(images_ptr + corner + pixel, mask=known, other=0).to(tl.float32)
    if images_ptr.dtype.element_ty == tl.uint8:
        value = byte_over_255(value)
    sample, step = tl.load(samples_ptr + b), tl.load(steps_ptr + b)
    noise = (2 * to_uniform(random_bits(seed, sample, step, stream, first, BLOCK)) - 1) * eps
    dtype = noisy_ptr.dtype.element_ty
    noisy = within((value + noise.to(dtype).to(tl.float32)).to(dtype).to(tl.float32), value, eps, 0.0, 1.0, dtype)
    offsets = b.to(tl.int64) * K * P + number
    if clean_ptr is not None:
        tl.store(clean_ptr + offsets, value.to(dtype), mask=inside)
    tl.store(noisy_ptr + offsets, noisy.to(dtype), mask=inside)


def noisy_patches(
    images_BCHW: Tensor,
    ids_BK: Tensor,
    samples_B: Tensor,
    steps_B: Tensor,
    clean_BKP: Tensor | None,
    noisy_BKP: Tensor,
    patch_size: int,
    seed: int,
    stream: int,
    eps: float,
) -> None:
    """Launch: images uint8 or float in any layout, the others contiguous; clean patches only where there is room."""
    (B, K, P), C = noisy_BKP.shape, images_BCHW.shape[1]
    pieces = triton.cdiv(K * P, BLOCK)
    if noisy_BKP.numel():
        sizes = (K, pieces, *patch_grid(images_BCHW, patch_size), *images_BCHW.stride())
        with torch.cuda.device_of(noisy_BKP):
            _noisy_patches_kernel[(B * pieces,)](
                *(images_BCHW, ids_BK, samples_B, steps_B, clean_BKP, noisy_BKP, *sizes, seed, stream, eps),
                *(C, patch_size, offset_type(images_BCHW, patch_size), BLOCK),
                enable_fp_fusion=False,  # the definition rounds the noise before it adds it
            )


def aot_cases() -> list[AotCase]:
    """224² uint8 images in patches of 16 (stride_w = 1 is specialised away)."""
    counter = {"images_ptr": "*u8"} | dict.fromkeys(("ids_ptr", "samples_ptr", "steps_ptr"), "*i64")
    results = {"clean_ptr": "*fp32", "noisy_ptr": "*fp32"}
    sizes = dict.fromkeys(("K", "pieces", "num_patches", "columns", "stride_b", "stride_c", "stride_h"), "i32")
    return [
        AotCase(
            "noisy_patches.16_uint8",
            _noisy_patches_kernel,
            counter | results | sizes | {"seed": "i64", "stream": "i32", "eps": "fp32"},
            {"stride_w": 1, "C": 3, "PATCH": 16, "OFFSET": tl.int32, "BLOCK": BLOCK},
            ("stride_b", "stride_c", "stride_h"),
            options={"enable_fp_fusion": False},
        )
    ]
