"""The reconstruction error of masked patches and its gradient, straight from the pixels (see ops/masked_loss.py).

A tile is BLOCK_R patches by all P numbers of a patch, as in `patches.py`: pixels and prediction are read once, the
target lives in registers, and the gradient is the only thing of size P that is written. Each patch leaves one number;
they are added by PyTorch, in one order: the same bits every time.
Legend: R = B·M patches, each of PATCH x PATCH pixels of C channels, P = PATCH²·C, image strides in elements.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimir_kernels.aot import AotCase
from mimir_kernels.patches import offset_type, patch_blocks, patch_grid, patch_pixels, read_patches


@triton.jit
def _masked_loss_kernel(
    prediction_ptr,
    images_ptr,
    ids_ptr,
    errors_ptr,
    gradient_ptr,
    R,
    M,
    num_patches,
    columns,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    eps,
    share,
    C: tl.constexpr,
    PATCH: tl.constexpr,
    OFFSET: tl.constexpr,
    NORM: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    P: tl.constexpr = PATCH * PATCH * C
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    element = tl.arange(0, BLOCK_P)
    inside = (row < R)[:, None] & (element < P)[None, :]
    pixels_ptr, readable = patch_pixels(
        images_ptr, ids_ptr, row, element, inside, R, M, num_patches, columns, stride_b, stride_c, stride_h, stride_w,
        C, PATCH, OFFSET,
    )  # fmt: skip
    x = read_patches(pixels_ptr, inside, readable, eps, P, NORM)
    places = row.to(tl.int64)[:, None] * P + element[None, :]
    difference = tl.load(prediction_ptr + places, mask=inside, other=0.0).to(tl.float32) - x
    error = tl.abs(difference) if ABSOLUTE else difference * difference
    tl.store(errors_ptr + row, tl.sum(tl.where(inside, error, 0.0), axis=1), mask=row < R)
    if GRADIENT:
        sign = (difference > 0).to(tl.float32) - (difference < 0).to(tl.float32)
        slope = sign if ABSOLUTE else 2 * difference
        tl.store(gradient_ptr + places, (slope * share).to(gradient_ptr.dtype.element_ty), mask=inside)


def masked_loss(
    prediction_BMP: Tensor,
    images_BCHW: Tensor,
    ids_BM: Tensor,
    gradient_BMP: Tensor,
    patch_size: int,
    norm: bool,
    absolute: bool,
    eps: float,
    share: float,
) -> Tensor:
    """(B·M,) float32 errors of the patches, summed over their numbers; the gradient, times `share`, unless it is empty.

    Images uint8 or float in any layout, the others contiguous.
    """
    (B, M), C, P = ids_BM.shape, images_BCHW.shape[1], prediction_BMP.shape[2]
    block_r, block_p, num_warps = patch_blocks(P, prediction_BMP.itemsize)
    errors = torch.empty(B * M, dtype=torch.float32, device=prediction_BMP.device)
    if prediction_BMP.numel():
        sizes = (B * M, M, *patch_grid(images_BCHW, patch_size), *images_BCHW.stride())
        with torch.cuda.device_of(errors):
            _masked_loss_kernel[(triton.cdiv(B * M, block_r),)](
                *(prediction_BMP, images_BCHW, ids_BM, errors, gradient_BMP, *sizes, eps, share),
                *(C, patch_size, offset_type(images_BCHW, patch_size), norm, absolute, gradient_BMP.numel() > 0),
                *(block_r, block_p),
                num_warps=num_warps,
            )
    return errors


def aot_cases() -> list[AotCase]:
    """Normalised patches of 16 from uint8 images, as MAE and MIMIR train, in both precisions; SimMIM's error."""
    sizes = dict.fromkeys(("R", "M", "num_patches", "columns", "stride_b", "stride_c", "stride_h"), "i32")

    def case(name: str, dtype: str, norm: bool, absolute: bool) -> AotCase:
        block_r, block_p, num_warps = patch_blocks(768, 2 if dtype == "bf16" else 4)
        pointers = {"prediction_ptr": f"*{dtype}", "images_ptr": "*u8", "ids_ptr": "*i64", "errors_ptr": "*fp32"}
        shape = {"C": 3, "PATCH": 16, "OFFSET": tl.int32, "BLOCK_R": block_r, "BLOCK_P": block_p}
        return AotCase(
            f"masked_loss.{name}",
            _masked_loss_kernel,
            pointers | {"gradient_ptr": f"*{dtype}"} | sizes | {"eps": "fp32", "share": "fp32"},
            {"stride_w": 1, "NORM": norm, "ABSOLUTE": absolute, "GRADIENT": True} | shape,
            ("stride_b", "stride_c", "stride_h"),
            num_warps,
            vector_loads=True,
        )

    return [
        case("l2_fp32", "fp32", True, False),
        case("l2_bf16", "bf16", True, False),
        case("l1_bf16", "bf16", False, True),
    ]
