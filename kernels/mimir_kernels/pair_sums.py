"""The one pass over all pairs of samples behind HSIC, CKA and the Rényi information of order 2, and its adjoint.

With k_ij = exp(−γ_x ‖x_i − x_j‖²) − 1 and l_ij likewise of y (zero on the diagonal):

    s = Σ_ij k_ij l_ij        r_i = Σ_j k_ij        q_i = Σ_j l_ij
    C_ij = (k_ij + 1)·(g_s·l_ij + (g_r,i + g_r,j)/2)        ∂x_i = −4 γ_x Σ_j C_ij (x_i − x_j)

Two regimes, by N alone:
- N ≤ 4096: k and l are kept as N×N matrices (2·67 MB at most). A batch has too few tiles to fill a GPU, so the Gram
  matrix is split along D (gram.py) and an element-wise pass makes k, l and the sums (rbf.py). Backward is one
  element-wise kernel for C and one product (laplacian.py).
- beyond: streaming tiles (pair_tiles.py), O(N) memory. Backward makes C a panel of rows at a time, recomputing tiles.
Shapes: N samples, D_x and D_y features, panels of P rows.

FLOP, threefold on tensor cores: forward N²(D_x + D_y); backward 2N²·D for each gradient, and streaming recomputes
2N²(D_x + D_y) besides. Everything is summed in a fixed order: the same input gives the same bits on the same GPU model.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimir_kernels.aot import AotCase
from mimir_kernels.gram import CenteredRows, center_rows, gram_splits
from mimir_kernels.laplacian import laplacian_product
from mimir_kernels.pair_tiles import BLOCK_M, pair_sums, pair_weights, pair_weights_panel
from mimir_kernels.rbf import Gram, rbf_minus_one

DENSE_ROWS = 4096
PANEL_BYTES = 256 * 2**20
ULPS = 8


@triton.jit
def _dense_weights_kernel(
    k_ptr, l_ptr, grad_s_ptr, half_ptr, weights_ptr, num_rows, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """C from k and l, ROWS×BLOCK entries a program: 12 bytes read or written for each."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (cols < num_rows)[None, :]
    entries = rows[:, None].to(tl.int64) * num_rows + cols[None, :]
    k = tl.load(k_ptr + entries, mask=inside, other=0.0)
    l = tl.load(l_ptr + entries, mask=inside, other=0.0)
    half_i = tl.load(half_ptr + rows, mask=rows < num_rows, other=0.0)
    half_j = tl.load(half_ptr + cols, mask=cols < num_rows, other=0.0)
    grad_s = tl.load(grad_s_ptr).to(tl.float32)
    tl.store(weights_ptr + entries, pair_weights(k, l, grad_s, half_i, half_j, rows, cols), mask=inside)


def forward(
    x_ND: Tensor,
    y_ND: Tensor,
    gamma_x: Tensor,
    gamma_y: Tensor,
    keep: bool,
    *,
    gram: Gram = gram_splits,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The three sums, the kernel matrices if they are wanted for the backward pass, and the γ of both.

    Args:
        x_ND, y_ND: (N, D_x) and (N, D_y), fp32, bf16 or fp16, any strides, N ≥ 1; need not be centred.
        gamma_x, gamma_y: floating scalar tensors on the same device; the host does not read them. An empty one stands
            for the median rule, for N ≤ DENSE_ROWS.
        keep: return k and l as (N, N) fp32, else as (0, 0).
        gram: who computes the Gram matrices for N ≤ DENSE_ROWS, see `rbf.rbf_minus_one`.
    Returns:
        s (scalar), r (N,), q (N,) float64; k, l fp32; γ_x, γ_y.
    """
    num_rows = len(x_ND)
    # HSIC(x, x), as in CKA, needs one kernel matrix only.
    same = x_ND.is_set_to(y_ND) and gamma_x.is_set_to(gamma_y)
    x = center_rows(x_ND)
    y = x if same else center_rows(y_ND)
    nothing = x.norms_N.new_empty((0, 0))
    if num_rows > DENSE_ROWS and not keep:
        s, r, q = pair_sums(x, y, gamma_x, gamma_y, same=same)
        return s, r, q.clone() if same else q, nothing, nothing.clone(), gamma_x, gamma_y
    gamma_x, gram_x = _with_median(x, x_ND, gamma_x, gram)
    k, r, _ = rbf_minus_one(x, gamma_x, gram=gram_x)
    if same:
        gamma_y = gamma_x
        s, q, l = torch.linalg.vector_norm(k, dtype=torch.float64).square(), r.clone(), k
    else:
        gamma_y, gram_y = _with_median(y, y_ND, gamma_y, gram)
        l, q, s = rbf_minus_one(y, gamma_y, k, gram_y)
    if not keep:
        return s, r, q, nothing, nothing.clone(), gamma_x, gamma_y
    return s, r, q, k, l.clone() if same else l, gamma_x, gamma_y


def _with_median(x: CenteredRows, x_ND: Tensor, gamma: Tensor, gram: Gram) -> tuple[Tensor, Gram]:
    """γ, and who gives the Gram matrix: for an empty γ the median rule's, from tiles that then serve both."""
    if gamma.numel():
        return gamma, gram
    tiles = gram(x)
    num_rows, block = len(x.norms_N), tiles.shape[-1]
    blocks = triton.cdiv(num_rows, block)
    i, j = torch.tril_indices(blocks, blocks, device=gamma.device)
    inside = torch.arange(block, device=gamma.device)
    rows, cols = i[:, None] * block + inside, j[:, None] * block + inside
    norms = torch.nn.functional.pad(x.norms_N, (0, blocks * block - num_rows))
    d2 = (norms[rows][:, :, None] + norms[cols][:, None, :] - 2 * tiles.sum(dim=0)).clamp_min(0)
    # Each pair once: below the diagonal. The others sort to the end.
    pair = (rows[:, :, None] > cols[:, None, :]) & (rows < num_rows)[:, :, None]
    ordered = torch.where(pair, d2, torch.inf).flatten().sort().values
    median = ordered[(num_rows * (num_rows - 1) // 2 - 1) // 2]
    # What rounding leaves of equal samples, as `median_floor` of ops/dependence/bandwidth.py has it.
    norm = torch.linalg.vector_norm(x_ND, dtype=torch.float32).double()
    floor = ((ULPS * torch.finfo(torch.float32).eps * norm).square() / num_rows).clamp_min(1e-30)
    return 1 / (2 * torch.maximum(median.double(), floor)), lambda _: tiles


def backward(
    grad_s: Tensor,
    grad_r: Tensor,
    grad_q: Tensor,
    x_ND: Tensor,
    y_ND: Tensor,
    gamma_x: Tensor,
    gamma_y: Tensor,
    k_NN: Tensor,
    l_NN: Tensor,
    need_x: bool,
    need_y: bool,
    gram: Gram = gram_splits,
    **how: Any,
) -> tuple[Tensor, Tensor]:
    """∂x (N, D_x) and ∂y (N, D_y), fp32; (0, D) where not needed.

    Args:
        grad_s (scalar), grad_r (N,), grad_q (N,): gradients to the sums, floating.
        k_NN, l_NN: as `forward` returned them; empty ones are computed again.
        how: `config` and `splits` of `laplacian_product`.
        The rest as for `forward`.
    """
    num_rows, kept = len(x_ND), len(k_NN) > 0
    half_r, half_q = ((g / 2).to(torch.float32).contiguous() for g in (grad_r, grad_q))
    grad_x, grad_y = (
        torch.empty((num_rows if need else 0, t.shape[1]), device=t.device)
        for t, need in ((x_ND, need_x), (y_ND, need_y))
    )
    if not kept and num_rows > DENSE_ROWS:
        x, y = center_rows(x_ND), center_rows(y_ND)
        _streaming_backward(grad_s, half_r, half_q, x, y, gamma_x, gamma_y, grad_x, grad_y)
        return grad_x, grad_y
    # Training wants ∂z only: with the kernel matrices at hand the images (0.3 GB at N = 512) are not looked at again.
    rows_x = center_rows(x_ND) if need_x or not kept else None
    rows_y = center_rows(y_ND) if need_y or not kept else None
    k = k_NN if rows_x is None or kept else rbf_minus_one(rows_x, gamma_x, gram=gram)[0]
    l = l_NN if rows_y is None or kept else rbf_minus_one(rows_y, gamma_y, gram=gram)[0]
    weights = torch.empty_like(k)
    if need_x and rows_x is not None:
        _dense_weights(k, l, grad_s, half_r, weights)
        laplacian_product(weights, rows_x, gamma_x, grad_x, 0, **how)
    if need_y and rows_y is not None:
        _dense_weights(l, k, grad_s, half_q, weights)
        laplacian_product(weights, rows_y, gamma_y, grad_y, 0, **how)
    return grad_x, grad_y


def _dense_weights(k_NN: Tensor, l_NN: Tensor, grad_s: Tensor, half_N: Tensor, weights_NN: Tensor) -> None:
    num_rows = len(k_NN)
    _dense_weights_kernel[(triton.cdiv(num_rows, 4), triton.cdiv(num_rows, 512))](
        k_NN.contiguous(), l_NN.contiguous(), grad_s, half_N, weights_NN, num_rows, ROWS=4, BLOCK=512, num_warps=4
    )


def panel_rows(num_rows: int, num_panels: int) -> int:
    """Rows of C at a time: whole tiles, `num_panels` panels of fp32 within PANEL_BYTES."""
    rows = PANEL_BYTES // (4 * num_rows * num_panels)
    return min(num_rows, max(BLOCK_M, rows // BLOCK_M * BLOCK_M))


def _streaming_backward(
    grad_s: Tensor, half_r_N: Tensor, half_q_N: Tensor, x: CenteredRows, y: CenteredRows,
    gamma_x: Tensor, gamma_y: Tensor, grad_x: Tensor, grad_y: Tensor,
) -> None:  # fmt: skip
    num_rows, need_x, need_y = len(half_r_N), len(grad_x) > 0, len(grad_y) > 0
    rows = panel_rows(num_rows, need_x + need_y)
    buffers = torch.empty((need_x + need_y, rows, num_rows), device=half_r_N.device)
    for first in range(0, num_rows, rows):
        end = min(first + rows, num_rows)
        to_x = buffers[0, : end - first] if need_x else None
        to_y = buffers[-1, : end - first] if need_y else None
        pair_weights_panel(
            x, y, gamma_x, gamma_y, grad_s, half_r_N, half_q_N, to_x, to_y, first
        )  # fmt: skip
        if to_x is not None:
            laplacian_product(to_x, x, gamma_x, grad_x[first:end], first)
        if to_y is not None:
            laplacian_product(to_y, y, gamma_y, grad_y[first:end], first)


def aot_cases() -> list[AotCase]:
    """The element-wise weights of the dense regime."""
    pointers = {"k_ptr": "*fp32", "l_ptr": "*fp32", "grad_s_ptr": "*fp64", "half_ptr": "*fp32", "weights_ptr": "*fp32"}
    return [
        AotCase(
            "pair_sums.dense_weights",
            _dense_weights_kernel,
            pointers | {"num_rows": "i32"},
            {"ROWS": 4, "BLOCK": 512},
            divisible_by_16=("num_rows",),
            vector_loads=True,
        )
    ]
