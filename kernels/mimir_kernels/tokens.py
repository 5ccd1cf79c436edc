"""Rows of tokens picked by ids, and put back (see mimir_fast/ops/tokens.py).

Both kernels move whole rows: each output element is read and written once, in 16-byte pieces where D allows, with no
index tensor of the size of the data and no atomics. The scatter asks an inverse map (B, N) who comes to each place, so
it writes every row exactly once, zeros and mask tokens included.
Legend: R output rows (B·K or B·N), D numbers in a row, tiles of BLOCK_R rows by BLOCK_D numbers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimir_kernels.aot import AotCase

TILE = 2048
INVERSE_BLOCK = 256


@triton.jit
def _gather_patches_kernel(
    x_ptr, ids_ptr, out_ptr, R, K, N, D, stride_b, stride_n, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (row < R)[:, None] & (column < D)[None, :]
    id = tl.load(ids_ptr + row, mask=row < R, other=0)  # int64, and so are the offsets made of it
    source = (row // K).to(tl.int64) * stride_b + id * stride_n
    known = inside & ((id >= 0) & (id < N))[:, None]  # nobody's memory is read for a wrong id
    x = tl.load(x_ptr + source[:, None] + column[None, :], mask=known, other=0.0)
    tl.store(out_ptr + row.to(tl.int64)[:, None] * D + column[None, :], x, mask=inside)


@triton.jit
def _inverse_kernel(ids_ptr, inverse_ptr, R, K, N, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    id = tl.load(ids_ptr + row, mask=row < R, other=-1)
    known = (id >= 0) & (id < N)
    tl.store(inverse_ptr + (row // K).to(tl.int64) * N + id, row % K, mask=known)


@triton.jit
def _scatter_patches_kernel(
    y_ptr,
    inverse_ptr,
    token_ptr,
    pos_ptr,
    out_ptr,
    R,
    N,
    D,
    stride_b,
    stride_k,
    AS_TOKENS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (row < R)[:, None] & (column < D)[None, :]
    place = tl.load(inverse_ptr + row, mask=row < R, other=-1).to(tl.int64)
    source = (row // N).to(tl.int64) * stride_b + place * stride_k
    filled = (place >= 0)[:, None]
    value = tl.load(y_ptr + source[:, None] + column[None, :], mask=inside & filled, other=0.0)
    if AS_TOKENS:
        token = tl.load(token_ptr + column, mask=column < D, other=0.0)[None, :]
        pos = tl.load(pos_ptr + (row % N).to(tl.int64)[:, None] * D + column[None, :], mask=inside)
        value = tl.where(filled, value, token) + pos
    tl.store(out_ptr + row.to(tl.int64)[:, None] * D + column[None, :], value, mask=inside)


@triton.jit
def _add_positions_kernel(
    tokens_ptr,
    ids_ptr,
    positions_ptr,
    prefix_ptr,
    out_ptr,
    R,
    T,
    F,
    N,
    D,
    stride_b,
    stride_k,
    HAS_IDS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (row < R)[:, None] & (column < D)[None, :]
    place = row % T
    id = tl.load(ids_ptr + row, mask=row < R, other=-1) if HAS_IDS else place.to(tl.int64)
    known = ((id >= 0) & (id < N))[:, None]  # a wrong id has no position
    behind = (place >= F)[:, None]
    source = (row // T).to(tl.int64) * stride_b + (place - F).to(tl.int64) * stride_k
    token = tl.load(tokens_ptr + source[:, None] + column[None, :], mask=inside & behind, other=0.0)
    front = tl.load(prefix_ptr + place[:, None] * D + column[None, :], mask=inside & ~behind, other=0.0)
    position = tl.load(positions_ptr + id[:, None] * D + column[None, :], mask=inside & known, other=0.0)
    value = tl.where(behind, token, front) + position
    tl.store(out_ptr + row.to(tl.int64)[:, None] * D + column[None, :], value, mask=inside)


def _blocks(D: int) -> tuple[int, int]:
    """A width that divides D where one does (256 for 768), so that no lane idles."""
    divisor = D & -D
    block_d = min(divisor, 512) if divisor >= 64 else min(max(triton.next_power_of_2(D), 16), 1024)
    return TILE // block_d, block_d


def gather_patches(x_BND: Tensor, ids_BK: Tensor, out_BKD: Tensor) -> None:
    """out[b, k] = x[b, ids[b, k]], zeros for an id outside [0, N); rows of x dense, ids and out contiguous."""
    (B, K), (_, N, D) = ids_BK.shape, x_BND.shape
    block_r, block_d = _blocks(D)
    if out_BKD.numel():
        grid = (triton.cdiv(B * K, block_r), triton.cdiv(D, block_d))
        with torch.cuda.device_of(out_BKD):
            _gather_patches_kernel[grid](
                x_BND, ids_BK, out_BKD, B * K, K, N, D, x_BND.stride(0), x_BND.stride(1), block_r, block_d
            )


def inverse(ids_BK: Tensor, num_patches: int) -> Tensor:
    """(B, N) int32: k where ids[b, k] = n, −1 where no id names patch n; ids outside [0, N) name none."""
    B, K = ids_BK.shape
    out = torch.full((B, num_patches), -1, dtype=torch.int32, device=ids_BK.device)
    if ids_BK.numel():
        with torch.cuda.device_of(out):
            _inverse_kernel[(triton.cdiv(B * K, INVERSE_BLOCK),)](
                ids_BK, out, B * K, K, num_patches, BLOCK=INVERSE_BLOCK
            )
    return out


def scatter_patches(
    y_BKD: Tensor, inverse_BN: Tensor, mask_token_D: Tensor | None, pos_embed_ND: Tensor | None, out_BND: Tensor
) -> None:
    """out[b, n] = y[b, inverse[b, n]], else the mask token, plus positions; zeros and nothing where those are None."""
    B, N, D = out_BND.shape
    as_tokens = mask_token_D is not None
    token, pos = (mask_token_D, pos_embed_ND) if as_tokens else (out_BND, out_BND)
    block_r, block_d = _blocks(D)
    if out_BND.numel():
        grid = (triton.cdiv(B * N, block_r), triton.cdiv(D, block_d))
        strides = y_BKD.stride(0), y_BKD.stride(1)
        with torch.cuda.device_of(out_BND):
            _scatter_patches_kernel[grid](
                y_BKD, inverse_BN, token, pos, out_BND, B * N, N, D, *strides, as_tokens, block_r, block_d
            )


def place_patches(visible_BKD: Tensor, inverse_BN: Tensor, out_BND: Tensor) -> None:
    """out[b, n] = visible[b, inverse[b, n]], zeros where no patch belongs."""
    scatter_patches(visible_BKD, inverse_BN, None, None, out_BND)


def add_positions(
    tokens_BKD: Tensor, ids_BT: Tensor | None, positions_RD: Tensor, prefix_FD: Tensor, out_BTD: Tensor
) -> None:
    """out[b, t] = (prefix[t], then tokens[b, t - F]) + positions[ids[b, t]], or positions[t] without ids.

    Rows of the tokens dense, the others contiguous.
    """
    B, T, D = out_BTD.shape
    block_r, block_d = _blocks(D)
    if out_BTD.numel():
        grid = (triton.cdiv(B * T, block_r), triton.cdiv(D, block_d))
        sizes = (B * T, T, len(prefix_FD), len(positions_RD), D, tokens_BKD.stride(0), tokens_BKD.stride(1))
        with torch.cuda.device_of(out_BTD):
            _add_positions_kernel[grid](
                *(tokens_BKD, out_BTD if ids_BT is None else ids_BT, positions_RD, prefix_FD, out_BTD, *sizes),
                *(ids_BT is not None, block_r, block_d),
            )


def aot_cases() -> list[AotCase]:
    """ViT-B tokens (768) into the encoder and the gradient out of it, decoder tokens (512) with mask token."""

    def gather(dtype: str, D: int) -> AotCase:
        block_r, block_d = _blocks(D)
        return AotCase(
            f"tokens.gather_{D}_{dtype}",
            _gather_patches_kernel,
            {"x_ptr": f"*{dtype}", "ids_ptr": "*i64", "out_ptr": f"*{dtype}"}
            | dict.fromkeys(("R", "K", "N", "D", "stride_b", "stride_n"), "i32"),
            {"BLOCK_R": block_r, "BLOCK_D": block_d},
            ("D", "stride_b", "stride_n"),
            vector_loads=True,
        )

    def scatter(dtype: str, D: int, as_tokens: bool) -> AotCase:
        block_r, block_d = _blocks(D)
        pointers = dict.fromkeys(("y_ptr", "token_ptr", "pos_ptr", "out_ptr"), f"*{dtype}")
        return AotCase(
            f"tokens.{'scatter' if as_tokens else 'place'}_{D}_{dtype}",
            _scatter_patches_kernel,
            pointers | {"inverse_ptr": "*i32"} | dict.fromkeys(("R", "N", "D", "stride_b", "stride_k"), "i32"),
            {"AS_TOKENS": as_tokens, "BLOCK_R": block_r, "BLOCK_D": block_d},
            ("D", "stride_b", "stride_k"),
            vector_loads=True,
        )

    def positions(dtype: str, D: int) -> AotCase:
        block_r, block_d = _blocks(D)
        pointers = {"tokens_ptr": f"*{dtype}", "ids_ptr": "*i64"}
        pointers |= dict.fromkeys(("positions_ptr", "prefix_ptr", "out_ptr"), f"*{dtype}")
        return AotCase(
            f"tokens.positions_{D}_{dtype}",
            _add_positions_kernel,
            pointers | dict.fromkeys(("R", "T", "F", "N", "D", "stride_b", "stride_k"), "i32"),
            {"HAS_IDS": True, "BLOCK_R": block_r, "BLOCK_D": block_d},
            ("D", "stride_b", "stride_k"),
            vector_loads=True,
        )

    inverse = AotCase(
        "tokens.inverse",
        _inverse_kernel,
        {"ids_ptr": "*i64", "inverse_ptr": "*i32"} | dict.fromkeys(("R", "K", "N"), "i32"),
        {"BLOCK": INVERSE_BLOCK},
    )
    return [
        inverse,
        gather("bf16", 768),
        gather("fp32", 768),
        scatter("bf16", 768, False),
        scatter("bf16", 512, True),
        scatter("fp32", 512, True),
        positions("fp32", 768),
    ]
