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

from mimir_fast.ops._checks import as_samples, check_finite
from mimir_fast.ops._dispatch import runs_triton
from mimir_fast.ops._precision import accumulation_dtype, full_precision
from mimir_fast.ops.dependence.bandwidth import Bandwidth, centered_rows, gamma
from mimir_fast.ops.dependence.pair_tiles import Laplacian, TiledKernel, inner_product, kernel_from_gram_, pair_weights
from mimir_fast.ops.global_batch import all_gather, group_size
from mimir_fast.ops.hsic import Estimator, Normalizer, check_estimator, hsic, hsic_from_sums


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
        scalar, float32 (float64 if an input is), differentiable once. Without torch.distributed it is `hsic`.
    Raises:
        TypeError, ValueError: as `hsic`; the least number of samples is that of the global batch.
        RuntimeError: a second derivative is asked for.
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
        s = torch.zeros(1, dtype=torch.float64, device=x_nD.device)
        with full_precision(x_nD.device), torch.cuda.device_of(x_nD):  # Triton launches on the current device
            rows_x, rows_y = _rows(x_ND, gamma_x, y_ND, ctx.own), _rows(y_ND, gamma_y, x_ND, ctx.own)
            for columns in ctx.blocks:
                s += inner_product(rows_x.tile(columns, sums=True), rows_y.tile(columns, sums=True))
        partial = torch.cat([s, rows_x.sums, rows_y.sums])
        # Added in the order of the ranks by each of them: the same bits everywhere, unlike an all-reduce.
        gathered = all_gather(partial[None], group)
        total = gathered[:, 0].sum()
        check_finite(total, x=x_ND, y=y_ND)
        return total, gathered[:, 1 : 1 + n].flatten(), gathered[:, 1 + n :].flatten()

    @staticmethod
    def backward(ctx: Any, grad_s: Tensor, grad_r: Tensor, grad_q: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # PyTorch's once_differentiable would let the second derivatives be zero
            raise RuntimeError(
                "global_hsic has first derivatives only: leave create_graph away, or use hsic on one rank"
            )
        x_ND, y_ND, gamma_x, gamma_y = ctx.saved_tensors
        with full_precision(x_ND.device), torch.cuda.device_of(x_ND):
            rows_x, rows_y = _rows(x_ND, gamma_x, y_ND, ctx.own), _rows(y_ND, gamma_y, x_ND, ctx.own)
            to_x = rows_x.gradient(grad_r) if ctx.needs_input_grad[0] else None
            to_y = rows_y.gradient(grad_q) if ctx.needs_input_grad[1] else None
            for columns in ctx.blocks:
                k, l_ = rows_x.tile(columns), rows_y.tile(columns)
                if to_x:
                    to_x.add(k, l_, grad_s, ctx.own, columns)
                if to_y:
                    to_y.add(l_, k, grad_s, ctx.own, columns)
            grads = [
                to.result().mul_(len(ctx.blocks)).to(dtype) if to else None
                for to, dtype in zip((to_x, to_y), ctx.dtypes, strict=True)
            ]
        return (*grads, None, None, None, None, None)


class _Rows:
    """The rows of K − 1 of this rank's samples, a tile at a time, by the BLAS; a tile lives until the next."""

    def __init__(self, x_ND: Tensor, gamma: Tensor, dtype: torch.dtype, own: slice):
        self._x, self._gamma, self._own = centered_rows(x_ND, dtype), gamma, own
        self._kernel = TiledKernel(self._x, gamma, norms_N=self._x.square().sum(dim=1))

    @property
    def sums(self) -> Tensor:
        """(n,) float64, of the tiles asked for with `sums`."""
        return self._kernel.sums[self._own]

    def tile(self, columns: slice, *, sums: bool = False) -> Tensor:
        """k (n, n) of this rank's rows and the given columns."""
        return self._kernel.tile(self._own, columns, sums=sums)

    def gradient(self, grad_r_N: Tensor) -> Laplacian:
        """The collector of the gradient, to which each tile of its weights is added."""
        return Laplacian(self._x, self._gamma, grad_r_N, self._own)


class _TritonRows:
    """The same on a GPU: one Gram product of all the rows on tensor cores, cut into tiles afterwards."""

    def __init__(self, x_ND: Tensor, gamma: Tensor, own: slice):
        from mimir_kernels import gram

        self._x, self._gamma, self._own = gram.center_rows(x_ND), gamma, own
        self._gram_nN = gram.gram_rows(self._x, own)
        self.sums = torch.zeros(len(self._gram_nN), dtype=torch.float64, device=x_ND.device)

    def tile(self, columns: slice, *, sums: bool = False) -> Tensor:
        """A tile of the kernel matrix, see `_Rows.tile`."""
        k, norms = self._gram_nN[:, columns], self._x.norms_N
        kernel_from_gram_(
            k, norms[self._own], norms[columns], self._gamma, columns == self._own, self.sums if sums else None, None
        )
        return k

    def gradient(self, grad_r_N: Tensor) -> "_TritonLaplacian":
        """The gradient of the rows, see `_Rows.gradient`."""
        return _TritonLaplacian(self._x, self._gamma, grad_r_N, self._own)


class _TritonLaplacian:
    """`Laplacian` of this rank's samples by the Triton product: it takes the weights of all columns at once."""

    def __init__(self, x: Any, gamma: Tensor, grad_r_N: Tensor, own: slice):
        self._x, self._gamma, self._own = x, gamma, own
        self._half = (grad_r_N / 2).float()
        self._weights_nN = x.norms_N.new_empty((own.stop - own.start, len(x.norms_N)))
        self._sums = torch.zeros(len(self._weights_nN), dtype=torch.float64, device=gamma.device)

    def add(self, k: Tensor, l_: Tensor, grad_s: Tensor, rows: slice, columns: slice) -> None:
        """Add a tile to the sums, see `Laplacian.add`."""
        weights = pair_weights(k, l_, grad_s, self._half[rows], self._half[columns], self._sums, None)
        self._weights_nN[:, columns] = weights

    def result(self) -> Tensor:
        """The gradient of all rows, see `Laplacian.result`."""
        from mimir_kernels.laplacian import laplacian_product

        grad = self._weights_nN.new_empty((len(self._weights_nN), self._x.hi_ND.shape[1]))
        laplacian_product(self._weights_nN, self._x, self._gamma, grad, self._own.start)
        return grad


def _rows(x_ND: Tensor, gamma: Tensor, other_ND: Tensor, own: slice) -> _Rows | _TritonRows:
    """The rows of x's kernel matrix, by Triton or by the BLAS, in the precision that both inputs need."""
    if runs_triton(x_ND, other_ND):
        return _TritonRows(x_ND, gamma, own)
    return _Rows(x_ND, gamma, accumulation_dtype(x_ND, other_ND), own)
