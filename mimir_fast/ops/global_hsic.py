"""HSIC of the global batch, the work shared between the ranks by blocks of rows.

Rank r computes the rows of K and L that belong to its samples: n×N pairs instead of N×N. Its row sums are then
complete, and one gather of 2n + 1 numbers gives every rank (s, r, q) of the global batch. In the backward pass the
weights C_ij = (k_ij + 1)·(g_s·l_ij + (g_r,i + g_r,j)/2) of its own rows give the whole gradient of its own samples,
since K is symmetric: nothing is communicated.
Shapes: n samples of this rank, R ranks, N = R·n samples of the global batch, D features.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mimir_fast.ops._checks import as_samples, must_be_finite
from mimir_fast.ops._precision import accumulation_dtype, full_precision
from mimir_fast.ops.bandwidth import Bandwidth, gamma
from mimir_fast.ops.distances import centered_rows
from mimir_fast.ops.global_batch import all_gather, group_size
from mimir_fast.ops.hsic import Estimator, Normalizer, check_estimator, hsic, hsic_from_sums
from mimir_fast.ops.pair_tiles import inner_product, kernel_from_gram_, pair_weights


def global_hsic(
    x: Tensor,
    y: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    sigma_x: float = 5.0,
    sigma_y: float = 5.0,
    bandwidth: Bandwidth = "reference",
    estimator: Estimator = "biased",
    normalizer: Normalizer = "n2",
) -> Tensor:
    """`hsic` of the samples of all ranks, at 1/R of its work on each.

    The same value on every rank. As for `gather_batch`, the gradient is that of this rank's samples times R, right for
    gradients of parameters that are averaged over the ranks, as DDP and FSDP do. Extra memory: the N gathered samples,
    and a few n×n tiles.

    Args:
        x, y: (n, …) the samples of this rank, equally many on each.
        group: the ranks taking part; all by default. The other options are those of `hsic`.
    Returns:
        scalar, float32 (float64 if an input is). First derivatives only. Without torch.distributed it is `hsic`.
    Raises:
        TypeError, ValueError: as `hsic`; the least number of samples is that of the global batch.
    """
    num_ranks = group_size(group)
    if num_ranks == 1:
        widths: dict[str, Any] = {"sigma_x": sigma_x, "sigma_y": sigma_y, "bandwidth": bandwidth}
        return hsic(x, y, **widths, estimator=estimator, normalizer=normalizer)
    x_nD, y_nD = as_samples(x, y, minimum=-(-check_estimator(estimator, normalizer) // num_ranks))
    with torch.no_grad():
        x_ND, y_ND = all_gather(x_nD, group), all_gather(y_nD, group)
        gamma_x, gamma_y = gamma(x_ND, sigma_x, bandwidth), gamma(y_ND, sigma_y, bandwidth)
    s, r_N, q_N = _GlobalPairSums.apply(x_nD, y_nD, x_ND, y_ND, gamma_x, gamma_y, group)
    return hsic_from_sums(s, r_N, q_N, estimator, normalizer).to(accumulation_dtype(x, y))


class _KernelRows:
    """The rows of K − 1 of this rank's samples, as R tiles of n×n."""

    def __init__(self, x_ND: Tensor, gamma: Tensor, dtype: torch.dtype, own: slice):
        self.x, self.gamma, self.own = centered_rows(x_ND, dtype), gamma, own
        self.norms = self.x.square().sum(dim=1)

    def tile(self, columns: slice, sums: Tensor | None = None) -> Tensor:
        """k of this rank's rows and the given columns; its row sums are added to `sums`."""
        k = self.x[self.own] @ self.x[columns].mT
        norms = self.norms[self.own], self.norms[columns]
        kernel_from_gram_(k, *norms, self.gamma, columns == self.own, sums, None)
        return k


class _GlobalPairSums(torch.autograd.Function):
    """`pair_sums` of the gathered samples; gradients go to this rank's own."""

    @staticmethod
    def forward(
        ctx: Any,
        x_nD: Tensor,
        y_nD: Tensor,
        x_ND: Tensor,
        y_ND: Tensor,
        gamma_x: Tensor,
        gamma_y: Tensor,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, rank, num_ranks = x_nD.shape[0], dist.get_rank(group), group_size(group)
        ctx.save_for_backward(x_ND, y_ND, gamma_x, gamma_y)
        ctx.blocks = [slice(i * n, (i + 1) * n) for i in range(num_ranks)]
        ctx.own, ctx.dtypes = ctx.blocks[rank], (x_nD.dtype, y_nD.dtype)
        dtype = accumulation_dtype(x_ND, y_ND)
        kernel_x, kernel_y = _KernelRows(x_ND, gamma_x, dtype, ctx.own), _KernelRows(y_ND, gamma_y, dtype, ctx.own)
        partial = torch.zeros(1 + 2 * n, dtype=torch.float64, device=x_nD.device)
        s, r, q = partial[:1], partial[1 : 1 + n], partial[1 + n :]
        with full_precision(x_nD.device):
            for columns in ctx.blocks:
                s += inner_product(kernel_x.tile(columns, r), kernel_y.tile(columns, q))
        # Added in the order of the ranks by each of them: the same bits everywhere, unlike an all-reduce.
        gathered = all_gather(partial[None], group)
        total = gathered[:, 0].sum()
        must_be_finite(total, x=x_ND, y=y_ND)
        return total, gathered[:, 1 : 1 + n].flatten(), gathered[:, 1 + n :].flatten()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_s: Tensor, grad_r: Tensor, grad_q: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, y_ND, gamma_x, gamma_y = ctx.saved_tensors
        dtype = accumulation_dtype(x_ND, y_ND)
        kernel_x, kernel_y = _KernelRows(x_ND, gamma_x, dtype, ctx.own), _KernelRows(y_ND, gamma_y, dtype, ctx.own)
        to_x = _OwnGradient(kernel_x, grad_r) if ctx.needs_input_grad[0] else None
        to_y = _OwnGradient(kernel_y, grad_q) if ctx.needs_input_grad[1] else None
        with full_precision(x_ND.device):
            for columns in ctx.blocks:
                k, l_ = kernel_x.tile(columns), kernel_y.tile(columns)
                if to_x:
                    to_x.add(k, l_, grad_s, columns)
                if to_y:
                    to_y.add(l_, k, grad_s, columns)
        grads = [
            to.result().mul_(len(ctx.blocks)).to(dtype) if to else None
            for to, dtype in zip((to_x, to_y), ctx.dtypes, strict=True)
        ]
        return (*grads, None, None, None, None, None)


class _OwnGradient:
    """Collects −4γ Σ_j C_ij (x_i − x_j) for this rank's i from the tiles of its rows."""

    def __init__(self, kernel: _KernelRows, grad_r_N: Tensor):
        self.kernel, self.half = kernel, (grad_r_N / 2).to(kernel.x.dtype)
        self.product = torch.zeros_like(kernel.x[kernel.own])
        self.sums = torch.zeros(len(self.product), dtype=torch.float64, device=kernel.x.device)

    def add(self, k: Tensor, l_: Tensor, grad_s: Tensor, columns: slice) -> None:
        """Take in one tile."""
        halves = self.half[self.kernel.own], self.half[columns]
        weights = pair_weights(k, l_, grad_s, *halves, self.sums, None)
        self.product.addmm_(weights, self.kernel.x[columns])

    def result(self) -> Tensor:
        """(n, D)."""
        sums = self.sums.to(self.product.dtype)[:, None]
        return self.product.addcmul_(sums, self.kernel.x[self.kernel.own], value=-1).mul_(4 * self.kernel.gamma)
