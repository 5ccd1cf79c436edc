"""Patches straight out of an image, and back (see mimir_fast/ops/patches.py).

A tile is BLOCK_R patches by all P numbers of a patch, in the output's order: the stores are contiguous, and the loads
touch whole 32-byte sectors of the image rows, which the L1 cache hands out to the three channels. Conversion and
normalisation happen in registers, so a target costs one read of the masked pixels and one write.
Legend: R = B·K patches, each of PATCH x PATCH pixels of C channels, P = PATCH²·C, image strides in elements.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimir_kernels.aot import AotCase

TILE = 1024


@triton.jit
def quotient(n, DIVISOR: tl.constexpr, LIMIT: tl.constexpr):
    """n // DIVISOR for int32 0 ≤ n < LIMIT. LLVM would divide such small numbers in 16 bits, and pack and unpack."""
    if (DIVISOR & (DIVISOR - 1)) == 0 or DIVISOR * LIMIT > 2**17:
        return n // DIVISOR
    return (n * (2**17 // DIVISOR + 1)) >> 17


@triton.jit
def pixel_offsets(element, stride_c, stride_h, stride_w, C: tl.constexpr, PATCH: tl.constexpr, OFFSET: tl.constexpr):
    """From a patch's first pixel to its numbers, as the integers that `offset_type` chose."""
    pixel = quotient(element, C, PATCH * PATCH * C)
    c = element - pixel * C
    y = quotient(pixel, PATCH, PATCH * PATCH)
    x = pixel - y * PATCH
    return y.to(OFFSET) * stride_h + x.to(OFFSET) * stride_w + c.to(OFFSET) * stride_c


@triton.jit
def first_pixels(image, id, num_patches, columns, stride_b, stride_h, stride_w, PATCH: tl.constexpr):
    """Where these patches of these images begin, int64, and which of them exist."""
    known = (id >= 0) & (id < num_patches)
    # Divisions of int64 take some hundred instructions, and signs another ten.
    place, across = tl.where(known, id, 0).to(tl.uint32), tl.cast(columns, tl.uint32)
    row = place // across
    down, right = row.to(tl.int64) * stride_h, (place - row * across).to(tl.int64) * stride_w
    return image.to(tl.int64) * stride_b + (down + right) * PATCH, known


@triton.jit
def patch_pixels(
    images_ptr,
    ids_ptr,
    row,
    element,
    inside,
    R,
    K,
    num_patches,
    columns,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    C: tl.constexpr,
    PATCH: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """Pointers to the numbers of these patches (BLOCK_R, BLOCK_P), and which of them exist: not those of a wrong id."""
    id = tl.load(ids_ptr + row, mask=row < R, other=-1)
    image = row.to(tl.uint32) // tl.cast(K, tl.uint32)
    first, known = first_pixels(image, id, num_patches, columns, stride_b, stride_h, stride_w, PATCH)
    pixel = pixel_offsets(element, stride_c, stride_h, stride_w, C, PATCH, OFFSET)
    return (images_ptr + first)[:, None] + pixel[None, :], inside & known[:, None]


@triton.jit
def byte_over_255(x):
    """x / 255 for a byte x in float32, as division rounds it (all 256 were compared, with a fused sum and without)."""
    return x * (257 / 2**16) + x * (257 * 65537 / 2**48)  # 1/255 = 257 / 2¹⁶ · (1 + 2⁻¹⁶ + …)


@triton.jit
def read_patches(pixels_ptr, inside, readable, eps, P: tl.constexpr, NORM: tl.constexpr):
    """(BLOCK_R, BLOCK_P) float32 pixels, bytes as [0, 1], patches normalised with NORM; zeros for a wrong id."""
    x = tl.load(pixels_ptr, mask=readable, other=0).to(tl.float32)  # nobody's memory is read for a wrong id
    if pixels_ptr.dtype.element_ty == tl.uint8:
        x = byte_over_255(x)
    if NORM:
        mean = tl.sum(x, axis=1) / P
        x = tl.where(inside, x - mean[:, None], 0.0)
        variance = tl.sum(x * x, axis=1) / (P - 1)
        x = x * (1.0 / tl.sqrt(variance + eps))[:, None]
    return x


@triton.jit
def _patchify_gather_kernel(
    images_ptr,
    ids_ptr,
    out_ptr,
    R,
    K,
    num_patches,
    columns,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    eps,
    C: tl.constexpr,
    PATCH: tl.constexpr,
    OFFSET: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    P: tl.constexpr = PATCH * PATCH * C
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    element = tl.arange(0, BLOCK_P)
    inside = (row < R)[:, None] & (element < P)[None, :]
    pixels_ptr, readable = patch_pixels(
        images_ptr, ids_ptr, row, element, inside, R, K, num_patches, columns, stride_b, stride_c, stride_h, stride_w,
        C, PATCH, OFFSET,
    )  # fmt: skip
    x = read_patches(pixels_ptr, inside, readable, eps, P, NORM)
    tl.store(out_ptr + row.to(tl.int64)[:, None] * P + element[None, :], x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _unpatchify_visible_kernel(
    patches_ptr,
    ids_ptr,
    images_ptr,
    R,
    K,
    num_patches,
    columns,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    C: tl.constexpr,
    PATCH: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    P: tl.constexpr = PATCH * PATCH * C
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    element = tl.arange(0, BLOCK_P)
    inside = (row < R)[:, None] & (element < P)[None, :]
    pixels_ptr, writable = patch_pixels(
        images_ptr, ids_ptr, row, element, inside, R, K, num_patches, columns, stride_b, stride_c, stride_h, stride_w,
        C, PATCH, OFFSET,
    )  # fmt: skip
    x = tl.load(patches_ptr + row.to(tl.int64)[:, None] * P + element[None, :], mask=inside)
    tl.store(pixels_ptr, x, mask=writable)


def patch_blocks(P: int, itemsize: int) -> tuple[int, int, int]:
    """(BLOCK_R, BLOCK_P, num_warps) of a tile: patches at once, P rounded up to a power of two, warps.

    A thread moves 16 bytes of contiguous memory at a time. Where a round of all threads divides P, what P was rounded
    up by is whole rounds, which the compiler leaves out; elsewhere up to half of the threads idle.

    Args:
        itemsize: bytes of one of the contiguous numbers.
    """
    block_p = triton.next_power_of_2(P)
    num_warps = next((warps for warps in (4, 2, 1) if P % (warps * 32 * 16 // itemsize) == 0), 4)
    return max(TILE // block_p, 1), block_p, num_warps


def offset_type(images_BCHW: Tensor, patch_size: int) -> tl.dtype:
    """In which integers the numbers of one patch can be told apart: an int64 costs two instructions for each of one."""
    _, stride_c, stride_h, stride_w = images_BCHW.stride()
    last = (patch_size - 1) * (stride_h + stride_w) + (images_BCHW.shape[1] - 1) * stride_c
    return tl.int32 if last < 2**31 else tl.int64


def patch_grid(images_BCHW: Tensor, patch_size: int) -> tuple[int, int]:
    """How many patches an image has, and how many of them lie side by side."""
    rows, columns = (side // patch_size for side in images_BCHW.shape[2:])
    return rows * columns, columns


def patchify_gather(
    images_BCHW: Tensor, ids_BK: Tensor, out_BKP: Tensor, patch_size: int, norm: bool, eps: float
) -> None:
    """Launch: images uint8 or float in any layout, ids and out contiguous."""
    (B, K), C, P = ids_BK.shape, images_BCHW.shape[1], out_BKP.shape[2]
    block_r, block_p, num_warps = patch_blocks(P, out_BKP.itemsize)
    if out_BKP.numel():
        sizes = (B * K, K, *patch_grid(images_BCHW, patch_size), *images_BCHW.stride())
        with torch.cuda.device_of(out_BKP):
            _patchify_gather_kernel[(triton.cdiv(B * K, block_r),)](
                *(images_BCHW, ids_BK, out_BKP, *sizes, eps, C, patch_size, offset_type(images_BCHW, patch_size)),
                *(norm, block_r, block_p),
                num_warps=num_warps,
            )


def unpatchify_visible(patches_BKP: Tensor, ids_BK: Tensor, images_BCHW: Tensor, patch_size: int) -> None:
    """Launch: the patches go to their places in `images_BCHW`, which the caller has filled with zeros."""
    (B, K), C, P = ids_BK.shape, images_BCHW.shape[1], patches_BKP.shape[2]
    block_r, block_p, num_warps = patch_blocks(P, patches_BKP.itemsize)
    if patches_BKP.numel():
        sizes = (B * K, K, *patch_grid(images_BCHW, patch_size), *images_BCHW.stride())
        with torch.cuda.device_of(images_BCHW):
            _unpatchify_visible_kernel[(triton.cdiv(B * K, block_r),)](
                *(patches_BKP, ids_BK, images_BCHW, *sizes, C, patch_size, offset_type(images_BCHW, patch_size)),
                *(block_r, block_p),
                num_warps=num_warps,
            )


def aot_cases() -> list[AotCase]:
    """224² images in patches of 16 (stride_w = 1 is specialised away), and CIFAR's patches of 2."""
    sizes = dict.fromkeys(("R", "K", "num_patches", "columns", "stride_b", "stride_c", "stride_h"), "i32")

    def gather(name: str, pixel: str, out: str, patch: int, norm: bool) -> AotCase:
        block_r, block_p, num_warps = patch_blocks(patch * patch * 3, 2 if out == "bf16" else 4)
        shape = {"C": 3, "PATCH": patch, "OFFSET": tl.int32, "BLOCK_R": block_r, "BLOCK_P": block_p}
        return AotCase(
            f"patches.{name}",
            _patchify_gather_kernel,
            {"images_ptr": f"*{pixel}", "ids_ptr": "*i64", "out_ptr": f"*{out}", **sizes, "eps": "fp32"},
            {"stride_w": 1, "NORM": norm} | shape,
            ("stride_b", "stride_c", "stride_h"),
            num_warps,
        )

    block_r, block_p, num_warps = patch_blocks(768, 4)
    scatter = AotCase(
        "patches.unpatchify_16_fp32",
        _unpatchify_visible_kernel,
        {"patches_ptr": "*fp32", "ids_ptr": "*i64", "images_ptr": "*fp32", **sizes},
        {"stride_w": 1, "C": 3, "PATCH": 16, "OFFSET": tl.int32, "BLOCK_R": block_r, "BLOCK_P": block_p},
        ("stride_b", "stride_c", "stride_h"),
        num_warps,
        vector_loads=True,
    )
    return [
        gather("gather_16_uint8", "u8", "fp32", 16, False),
        gather("gather_16_fp32", "fp32", "fp32", 16, False),
        gather("targets_16_uint8", "u8", "fp32", 16, True),
        gather("targets_16_bf16", "bf16", "bf16", 16, True),
        gather("gather_2_uint8", "u8", "fp32", 2, False),
        scatter,
    ]
