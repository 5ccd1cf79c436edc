"""A Gaussian kernel matrix as a product of two thin ones, where its spectrum decays fast enough.

    K ≈ F Fᵀ,  F (N, R)      pivoted Cholesky: the column of the largest residual, until that is below 1e-6

Few features, or few different rows (labels, one-hot vectors), give R in the tens; hundreds of features give R near N.
Only the columns that are asked for are computed: O(N·(R + D)) memory, O(N·R·(R + D)) work (Fine & Scheinberg, JMLR
2001).
Shapes: N samples, D features, rank R.
"""

import torch
from torch import Tensor

from mimir_fast.ops.dependence.bandwidth import centered_rows

TOLERANCE = 1e-6
"""The largest error of an entry of K, which lies in (0, 1]; HSIC is then right to about as many digits."""


def rbf_factor(x_ND: Tensor, gamma: Tensor, max_rank: int) -> Tensor | None:
    """(N, R) float64 with exp(−γ‖x_i − x_j‖²) = (F Fᵀ)_ij within `TOLERANCE`, or None if R > max_rank.

    The host waits for each column. No gradient.
    """
    x = centered_rows(x_ND.detach(), torch.float64)
    norms = x.square().sum(dim=1)
    factor_RN = x.new_empty(max_rank, len(x))
    residual = torch.ones_like(norms)  # of the diagonal; it bounds that of every entry
    for rank in range(max_rank + 1):
        largest, pivot = residual.max(dim=0)
        if largest <= TOLERANCE:
            return factor_RN[:rank].T.contiguous()
        if rank == max_rank:
            break
        distances = (norms + norms[pivot] - 2 * (x @ x[pivot])).clamp_min_(0)
        column = torch.exp(-gamma * distances) - factor_RN[:rank, pivot] @ factor_RN[:rank]
        factor_RN[rank] = column / largest.sqrt()
        residual -= factor_RN[rank].square()
        residual[pivot] = 0
    return None
