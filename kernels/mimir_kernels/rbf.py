"""Gaussian kernel matrices K − 1 from a Gram matrix, and the sums the estimators need, in one element-wise pass.

    k_ij = expm1(−γ·max(n_i + n_j − 2 g_ij, 0)),  k_ii = 0        r_i = Σ_j k_ij        p_i = Σ_j k_ij l_ij

1 is never added: with wide kernels K is 0.9996 off the diagonal, and 1 would leave three digits to the rest.
Shapes: N samples, B = ⌈N / BLOCK⌉ blocks of columns, S splits and T tiles as in gram.py.

Traffic: reads the S·N²/2 partial Gram entries twice (each tile also serves its mirror image), writes N². For N ≤ 4096
all of it stays in or near L2; a program owns ROWS×BLOCK entries, few enough that N = 512 gives 256 programs. Row sums
of 128 entries are fp32, everything beyond is summed in float64 in a fixed order.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimir_kernels.aot import AotCase
from mimir_kernels.gram import CenteredRows, gram_splits

Gram = Callable[[CenteredRows], Tensor]

ROWS = 8  # 32 bytes down a column: a whole sector when a tile is read across
SPLITS_AT_ONCE = 4  # independent loads in flight


@triton.jit
def expm1(u):
    """exp(u) − 1 for u ≤ 0, to 2 ulp: Taylor's series where the subtraction would cancel (remainder < 1e-8)."""
    series = 1.0 + u * (1 / 2 + u * (1 / 6 + u * (1 / 24 + u * (1 / 120 + u * (1 / 720 + u * (1 / 5040 + u / 40320))))))
    return tl.where(u > -0.5, u * series, tl.exp(u) - 1.0)


@triton.jit
def rbf_minus_one_tile(gram, norms_i, norms_j, rows, cols, num_rows, gamma):
    """A tile of K − 1 from one of the Gram matrix; zero on the diagonal and beyond the matrix."""
    d2 = norms_i[:, None] + norms_j[None, :] - 2.0 * gram
    d2 = tl.where(d2 < 0.0, 0.0, d2)  # a NaN stays, as it would not in tl.maximum on a GPU
    off_diagonal = (rows[:, None] != cols[None, :]) & (rows < num_rows)[:, None] & (cols < num_rows)[None, :]
    return tl.where(off_diagonal, expm1(-gamma * d2), 0.0)


@triton.jit
def _rbf_rows_kernel(
    tiles_ptr, norms_ptr, gamma_ptr, other_ptr, k_ptr, sums_ptr, products_ptr, num_rows, num_tiles, num_splits,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, HAS_OTHER: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one block of columns → k (N, N), sums (B, N) and, with another matrix l, products (B, N)."""
    row_strip, col_block = tl.program_id(0), tl.program_id(1)
    row_block = row_strip * ROWS // BLOCK
    rows = row_strip * ROWS + tl.arange(0, ROWS)
    cols = col_block * BLOCK + tl.arange(0, BLOCK)
    # Only the lower triangle is read: k is symmetric to the last bit, which Cholesky factors of it need.
    high, low = tl.maximum(row_block, col_block), tl.minimum(row_block, col_block)
    tile = high * (high + 1) // 2 + low
    r, c = (rows - row_block * BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    within = tl.where(rows[:, None] >= cols[None, :], r * BLOCK + c, c * BLOCK + r)

    gram = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for s in range(0, num_splits, SPLITS):
        splits = s + tl.arange(0, SPLITS)
        base = (splits.to(tl.int64) * num_tiles + tile) * BLOCK * BLOCK
        ptrs = tiles_ptr + base[:, None, None] + within[None, :, :]
        gram += tl.sum(tl.load(ptrs, mask=(splits < num_splits)[:, None, None], other=0.0), axis=0)
    norms_i = tl.load(norms_ptr + rows, mask=rows < num_rows, other=0.0)
    norms_j = tl.load(norms_ptr + cols, mask=cols < num_rows, other=0.0)
    k = rbf_minus_one_tile(gram, norms_i, norms_j, rows, cols, num_rows, tl.load(gamma_ptr).to(tl.float32))

    inside = (rows < num_rows)[:, None] & (cols < num_rows)[None, :]
    entries = rows[:, None].to(tl.int64) * num_rows + cols[None, :]
    tl.store(k_ptr + entries, k, mask=inside)
    slots = col_block.to(tl.int64) * num_rows + rows
    tl.store(sums_ptr + slots, tl.sum(k, axis=1), mask=rows < num_rows)
    if HAS_OTHER:
        other = tl.load(other_ptr + entries, mask=inside, other=0.0)
        tl.store(products_ptr + slots, tl.sum(k * other, axis=1), mask=rows < num_rows)


def rbf_minus_one(
    x: CenteredRows, gamma: Tensor, other_NN: Tensor | None = None, gram: Gram = gram_splits
) -> tuple[Tensor, Tensor, Tensor]:
    """K − 1 of mean-centred rows with its row sums, and the sum of its product with another matrix.

    Args:
        gamma: scalar tensor on the same device, any floating dtype.
        other_NN: (N, N) fp32 contiguous.
        gram: `gram_splits`, that with its options bound, or `gram_by_library`.
    Returns:
        k (N, N) fp32, row sums (N,) float64, Σ k∘other float64 scalar (0 without other).
    """
    num_rows = len(x.hi_ND)
    tiles = gram(x)
    num_splits, num_tiles, block, _ = tiles.shape
    blocks = triton.cdiv(num_rows, block)
    k_NN = tiles.new_empty((num_rows, num_rows))
    sums = tiles.new_empty((2, blocks, num_rows))
    _rbf_rows_kernel[(triton.cdiv(num_rows, ROWS), blocks)](
        tiles, x.norms_N, gamma, k_NN if other_NN is None else other_NN, k_NN, sums[0], sums[1],
        num_rows, num_tiles, num_splits,
        BLOCK=block, ROWS=ROWS, SPLITS=min(SPLITS_AT_ONCE, triton.next_power_of_2(num_splits)),
        HAS_OTHER=other_NN is not None, num_warps=4,
    )  # fmt: skip
    if other_NN is None:
        return k_NN, sums[0].sum(dim=0, dtype=torch.float64), sums.new_zeros((), dtype=torch.float64)
    return k_NN, sums[0].sum(dim=0, dtype=torch.float64), sums[1].sum(dtype=torch.float64)


def aot_cases() -> list[AotCase]:
    """With and without a second matrix, for one split and many, at both tile sizes."""
    signature = dict.fromkeys(("tiles_ptr", "norms_ptr", "other_ptr", "k_ptr", "sums_ptr", "products_ptr"), "*fp32")
    signature |= {"gamma_ptr": "*fp64"} | dict.fromkeys(("num_rows", "num_tiles", "num_splits"), "i32")
    return [
        AotCase(
            f"rbf.rows_block{block}_splits{splits}{'_product' if has_other else ''}",
            _rbf_rows_kernel,
            signature,
            {"BLOCK": block, "ROWS": ROWS, "SPLITS": splits, "HAS_OTHER": has_other},
            divisible_by_16=("num_rows",),
        )
        for block in (64, 128)
        for splits in (1, SPLITS_AT_ONCE)
        for has_other in (False, True)
    ]
