"""Streaming tiles for large N: both kernel matrices exist one tile at a time, in registers.

    s = Σ_ij k_ij l_ij    r_i = Σ_j k_ij    q_i = Σ_j l_ij        C_ij = (k_ij + 1)·(g_s·l_ij + h_i + h_j)

A program computes its tile of X·Xᵀ, turns it into k where it stands, does the same for y, and leaves with a few sums
(forward) or with the tile of the gradient's weights (backward). k and l never reach memory.
Shapes: N samples, D_x and D_y features, panels of P rows (a row of tiles is BLOCK_M samples).

Forward: lower tiles only, N²(D_x + D_y) multiply-adds (threefold on tensor cores). The mirror image of a tile has its
column sums as row sums. Several tiles add to the same r_i, and addition in the order of arrival is not reproducible;
so each tile has slots of its own, summed in float64 afterwards. Slots for all tiles would be N²/32 numbers; done a
panel of 32 blocks of rows at a time they are O(N).

Backward: a panel of P rows of C, 2·P·N·(D_x + D_y) FLOP again, written once (4·P·N bytes) and multiplied with x by
laplacian.py. Recomputing the tile next to the product instead would take the whole of D in one program's registers.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimir_kernels.aot import CAPABILITIES, AotCase
from mimir_kernels.gram import CenteredRows, gram_tile, triangular_index
from mimir_kernels.interpret import INTERPRETED
from mimir_kernels.rbf import rbf_minus_one_tile

# With one tile of k waiting in registers while l is computed, 128×128 spills and 128×64 does not, on any architecture.
BLOCK_M, BLOCK_N, BLOCK_D = 128, 64, 32
NUM_WARPS, NUM_STAGES = 8, 3
PANEL_BLOCKS = 32  # rows of tiles whose partial sums are kept at a time: 1 kB of slots a sample


@triton.jit
def _rbf_tile(
    hi_ptr, lo_ptr, norms_ptr, gamma_ptr, rows, cols, num_rows, num_features,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, BLOCK_N) of K − 1 at the given rows and columns."""
    gram = gram_tile(
        hi_ptr, lo_ptr, rows, cols, num_rows, num_features, 0, num_features, BLOCK_M, BLOCK_N, BLOCK_D, INTERPRET
    )
    norms_i = tl.load(norms_ptr + rows, mask=rows < num_rows, other=0.0)
    norms_j = tl.load(norms_ptr + cols, mask=cols < num_rows, other=0.0)
    return rbf_minus_one_tile(gram, norms_i, norms_j, rows, cols, num_rows, tl.load(gamma_ptr).to(tl.float32))


@triton.jit
def _pair_sums_kernel(
    x_hi_ptr, x_lo_ptr, y_hi_ptr, y_lo_ptr, x_norms_ptr, y_norms_ptr, gamma_x_ptr, gamma_y_ptr,
    row_slots_ptr, col_slots_ptr, products_ptr,
    first_tile, first_block, panel_rows, num_rows, x_features, y_features, row_slots_stride, col_slots_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    SAME: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Lower tile → row_slots[r|q, j, row of the panel], col_slots[r|q, block of the panel, column], products[tile]."""
    # A square of the lower triangle is two tiles wide.
    t = first_tile + tl.program_id(0)
    i, j = triangular_index(t // 2)
    j = 2 * j + t % 2
    rows = i * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = j * BLOCK_N + tl.arange(0, BLOCK_N)
    below = rows[:, None] > cols[None, :]  # each pair once, whether the tile touches the diagonal or not
    row_slots = row_slots_ptr + j.to(tl.int64) * panel_rows + (i - first_block) * BLOCK_M + tl.arange(0, BLOCK_M)
    col_slots = col_slots_ptr + (i - first_block).to(tl.int64) * num_rows + cols
    k = _rbf_tile(
        x_hi_ptr, x_lo_ptr, x_norms_ptr, gamma_x_ptr, rows, cols, num_rows, x_features,
        BLOCK_M, BLOCK_N, BLOCK_D, INTERPRET,
    )  # fmt: skip
    k = tl.where(below, k, 0.0)
    tl.store(row_slots, tl.sum(k, axis=1))
    tl.store(col_slots, tl.sum(k, axis=0), mask=cols < num_rows)
    if SAME:  # y is x, as in HSIC(x, x)
        l = k
    else:
        l = _rbf_tile(
            y_hi_ptr, y_lo_ptr, y_norms_ptr, gamma_y_ptr, rows, cols, num_rows, y_features,
            BLOCK_M, BLOCK_N, BLOCK_D, INTERPRET,
        )  # fmt: skip
        l = tl.where(below, l, 0.0)
        tl.store(row_slots + row_slots_stride, tl.sum(l, axis=1))
        tl.store(col_slots + col_slots_stride, tl.sum(l, axis=0), mask=cols < num_rows)
    tl.store(products_ptr + tl.program_id(0), 2.0 * tl.sum(tl.sum(k * l, axis=1).to(tl.float64), axis=0))


@triton.jit
def pair_weights(k, l, grad_s, half_i, half_j, rows, cols):
    """C_ij of a tile; the diagonal is left out: x_i − x_i is zero, and it would only cancel."""
    weights = (k + 1.0) * (grad_s * l + (half_i[:, None] + half_j[None, :]))
    return tl.where(rows[:, None] == cols[None, :], 0.0, weights)


@triton.jit
def _pair_weights_kernel(
    x_hi_ptr, x_lo_ptr, y_hi_ptr, y_lo_ptr, x_norms_ptr, y_norms_ptr, gamma_x_ptr, gamma_y_ptr,
    grad_s_ptr, half_r_ptr, half_q_ptr, x_weights_ptr, y_weights_ptr,
    first_row, end_row, num_rows, x_features, y_features,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    NEED_X: tl.constexpr, NEED_Y: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One tile of the weights of ∂x and of ∂y, rows first_row … end_row − 1 → weights[row − first_row, column]."""
    rows = first_row + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = _rbf_tile(
        x_hi_ptr,
        x_lo_ptr,
        x_norms_ptr,
        gamma_x_ptr,
        rows,
        cols,
        num_rows,
        x_features,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        INTERPRET,
    )
    l = _rbf_tile(
        y_hi_ptr,
        y_lo_ptr,
        y_norms_ptr,
        gamma_y_ptr,
        rows,
        cols,
        num_rows,
        y_features,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        INTERPRET,
    )
    grad_s = tl.load(grad_s_ptr).to(tl.float32)
    inside = (rows < end_row)[:, None] & (cols < num_rows)[None, :]
    entries = (rows - first_row)[:, None].to(tl.int64) * num_rows + cols[None, :]
    if NEED_X:
        half_i = tl.load(half_r_ptr + rows, mask=rows < num_rows, other=0.0)
        half_j = tl.load(half_r_ptr + cols, mask=cols < num_rows, other=0.0)
        tl.store(x_weights_ptr + entries, pair_weights(k, l, grad_s, half_i, half_j, rows, cols), mask=inside)
    if NEED_Y:
        half_i = tl.load(half_q_ptr + rows, mask=rows < num_rows, other=0.0)
        half_j = tl.load(half_q_ptr + cols, mask=cols < num_rows, other=0.0)
        tl.store(y_weights_ptr + entries, pair_weights(l, k, grad_s, half_i, half_j, rows, cols), mask=inside)


def pair_sums(
    x: CenteredRows, y: CenteredRows, gamma_x: Tensor, gamma_y: Tensor, *, same: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """s (scalar), r (N,) and q (N,), float64. `same`: y and its γ are x and its γ."""
    num_rows, device = len(x.hi_ND), x.hi_ND.device
    num_sums = 1 if same else 2
    num_blocks = triton.cdiv(num_rows, BLOCK_M)
    panel = min(PANEL_BLOCKS, num_blocks)
    row_slots = torch.empty((num_sums, 2 * num_blocks, panel * BLOCK_M), device=device)
    col_slots = torch.empty((num_sums, panel, num_rows), device=device)
    sums = torch.zeros((num_sums, num_rows), dtype=torch.float64, device=device)
    s = sums.new_zeros(())
    for first in range(0, num_blocks, panel):
        last = min(first + panel, num_blocks)
        first_tile, end_tile = first * (first + 1), last * (last + 1)
        products = sums.new_empty(end_tile - first_tile)
        # A tile above the diagonal is nobody's: its slots must read as zero.
        row_slots.zero_()
        col_slots.zero_()
        _pair_sums_kernel[(end_tile - first_tile,)](
            x.hi_ND, x.lo_ND, y.hi_ND, y.lo_ND, x.norms_N, y.norms_N, gamma_x, gamma_y, row_slots, col_slots, products,
            first_tile, first, panel * BLOCK_M, num_rows, x.hi_ND.shape[1], y.hi_ND.shape[1],
            row_slots.stride(0), col_slots.stride(0),
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D, SAME=same, INTERPRET=INTERPRETED,
            num_warps=NUM_WARPS, num_stages=NUM_STAGES,
        )  # fmt: skip
        rows = slice(first * BLOCK_M, min(last * BLOCK_M, num_rows))
        sums[:, rows] += row_slots.sum(dim=1, dtype=torch.float64)[:, : rows.stop - rows.start]
        sums += col_slots.sum(dim=1, dtype=torch.float64)
        s += products.sum()
    return s, sums[0], sums[-1]


def pair_weights_panel(
    x: CenteredRows, y: CenteredRows, gamma_x: Tensor, gamma_y: Tensor,
    grad_s: Tensor, half_r_N: Tensor, half_q_N: Tensor, x_weights_PN: Tensor | None, y_weights_PN: Tensor | None,
    first_row: int,
) -> None:  # fmt: skip
    """Write rows first_row … first_row + P − 1 of C for ∂x and for ∂y (None: not needed), fp32 contiguous."""
    given = [w for w in (x_weights_PN, y_weights_PN) if w is not None]
    panel_rows, num_rows = given[0].shape
    _pair_weights_kernel[(triton.cdiv(panel_rows, BLOCK_M), triton.cdiv(num_rows, BLOCK_N))](
        x.hi_ND, x.lo_ND, y.hi_ND, y.lo_ND, x.norms_N, y.norms_N, gamma_x, gamma_y, grad_s, half_r_N, half_q_N,
        given[0] if x_weights_PN is None else x_weights_PN, given[0] if y_weights_PN is None else y_weights_PN,
        first_row, first_row + panel_rows, num_rows, x.hi_ND.shape[1], y.hi_ND.shape[1],
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D,
        NEED_X=x_weights_PN is not None, NEED_Y=y_weights_PN is not None, INTERPRET=INTERPRETED,
        num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip


def aot_cases() -> list[AotCase]:
    """Forward and backward; the same tile on every architecture."""
    inputs = dict.fromkeys(("x_hi_ptr", "x_lo_ptr", "y_hi_ptr", "y_lo_ptr"), "*bf16")
    inputs |= dict.fromkeys(("x_norms_ptr", "y_norms_ptr"), "*fp32")
    inputs |= dict.fromkeys(("gamma_x_ptr", "gamma_y_ptr"), "*fp64")
    features = {"num_rows": "i32", "x_features": "i32", "y_features": "i32"}
    sums = inputs | {"row_slots_ptr": "*fp32", "col_slots_ptr": "*fp32", "products_ptr": "*fp64"} | features
    sums |= dict.fromkeys(("first_tile", "first_block", "panel_rows", "row_slots_stride", "col_slots_stride"), "i32")
    weights = inputs | {"grad_s_ptr": "*fp64", "first_row": "i32", "end_row": "i32"} | features
    weights |= dict.fromkeys(("half_r_ptr", "half_q_ptr", "x_weights_ptr", "y_weights_ptr"), "*fp32")
    tile = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_D": BLOCK_D, "INTERPRET": False}
    variants: list[tuple[str, Any, dict[str, str], dict[str, bool]]] = [
        ("sums", _pair_sums_kernel, sums, {"SAME": False}),
        ("sums_same", _pair_sums_kernel, sums, {"SAME": True}),
        ("weights", _pair_weights_kernel, weights, {"NEED_X": True, "NEED_Y": True}),
        ("weights_y", _pair_weights_kernel, weights, {"NEED_X": False, "NEED_Y": True}),
    ]
    return [
        AotCase(
            f"pair_tiles.{name}",
            kernel,
            signature,
            tile | flags,
            divisible_by_16=("x_features", "y_features", "num_rows"),
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
            vector_loads=True,
            tensor_cores=True,
            capabilities=CAPABILITIES,
        )
        for name, kernel, signature, flags in variants
    ]
