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

from mimir_fast.ops._checks import as_samples, check_finite, check_tensors
from mimir_fast.ops._dispatch import runs_triton
from mimir_fast.ops._precision import accumulation_dtype, full_precision
from mimir_fast.ops.dependence.bandwidth import Bandwidth, Sigma, gamma, widths
from mimir_fast.ops.dependence.pair_tiles import inner_product, kernel_from_gram_, pair_weights
from mimir_fast.ops.global_batch import all_gather, check_same_shapes, group_size
from mimir_fast.ops.hsic import Estimator, Normalizer, check_estimator, hsic, hsic_from_sums


def global_hsic(
    x: Tensor,
    y: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    sigma: Sigma = 5.0,
    bandwidth: Bandwidth = "reference",
    estimator: Estimator = "biased",
    normalizer: Normalizer = "n2",
) -> Tensor:
    r"""`hsic` of the samples of all ranks, at 1/R of its work on each.

    $$\mathrm{tr}(KHLH) = \sum_{ij} k_{ij} l_{ij} - \frac{2}{N} \sum_i r_i q_i + \frac{1}{N^2} \sum_i r_i \sum_j q_j,
    \qquad r_i = \sum_j k_{ij}, \; q_i = \sum_j l_{ij}$$

    of which each rank makes its own rows.

    The same value on every rank. As for `gather_batch`, the gradient is that of this rank's samples times R, right for
    gradients of parameters that are averaged over the ranks, as DDP and FSDP do. Extra memory: the N gathered samples,
    those of two ranks centred, and a few n×n tiles.

    Args:
        x, y: (n, …) the samples of this rank, equally many on each, which is compared.
        group: the ranks taking part; all by default. The other options are those of `hsic`.
    Returns:
        scalar, float32 (float64 if an input is), differentiable once. Without torch.distributed it is `hsic`.
    Raises:
        TypeError, ValueError: as `hsic`; the least number of samples is that of the global batch. Ranks hold batches of
            other shapes.
        RuntimeError: a second derivative is asked for.
    """
    num_ranks = group_size(group)
    if num_ranks == 1:
        return hsic(x, y, sigma=sigma, bandwidth=bandwidth, estimator=estimator, normalizer=normalizer)
    sigma_x, sigma_y = widths(sigma)
    check_tensors(x=x, y=y)
    check_same_shapes(group, x=x, y=y)  # first: what follows may fail on a rank whose batch is too small
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
            to_x = _Gradient(rows_x, gamma_x, grad_r) if ctx.needs_input_grad[0] else None
            to_y = _Gradient(rows_y, gamma_y, grad_q) if ctx.needs_input_grad[1] else None
            for columns in ctx.blocks:
                k, l_ = rows_x.tile(columns), rows_y.tile(columns)
                if to_x:
                    to_x.add(k, l_, grad_s, columns)
                if to_y:
                    to_y.add(l_, k, grad_s, columns)
            grads = [
                to.result().mul_(len(ctx.blocks)).to(dtype) if to else None
                for to, dtype in zip((to_x, to_y), ctx.dtypes, strict=True)
            ]
        return (*grads, None, None, None, None, None)


class _Rows:
    """The rows of K − 1 of this rank's samples, a tile (a rank's columns) at a time.

    The samples are centred for a tile and forgotten: a centred copy of all of them may be larger than they are.
    """

    def __init__(
        self, x_ND: Tensor, gamma: Tensor, block: "type[_Block | _TritonBlock]", dtype: torch.dtype, own: slice
    ):
        self._x, self._gamma, self._block, self.own = x_ND, gamma, block, own
        self._mean_D = x_ND.mean(dim=0, dtype=dtype)
        self.mine = self.last = block(x_ND[own], self._mean_D)
        self.sums = torch.zeros(len(self.mine.norms), dtype=torch.float64, device=x_ND.device)

    def tile(self, columns: slice, *, sums: bool = False) -> Tensor:
        """k (n, n) of this rank's rows and the given columns; `sums` adds its row sums to `self.sums`."""
        diagonal = columns == self.own
        self.last = self.mine if diagonal else self._block(self._x[columns], self._mean_D)
        k = self.mine.products(self.last)
        kernel_from_gram_(k, self.mine.norms, self.last.norms, self._gamma, diagonal, self.sums if sums else None, None)
        return k


class _Gradient:
    """Collects −4γ Σ_j C_ij (x_i − x_j) of this rank's samples from the tiles of C, each after its tile of K."""

    def __init__(self, rows: _Rows, gamma: Tensor, grad_r_N: Tensor):
        self._rows, self._gamma = rows, gamma
        self._half_N = (grad_r_N / 2).to(rows.mine.norms.dtype)
        self._sums_n = torch.zeros_like(rows.sums)  # C 1
        self._product_nD: Tensor | None = None  # C X

    def add(self, k: Tensor, l_: Tensor, grad_s: Tensor, columns: slice) -> None:
        """Add the columns of the tile that `rows` made last."""
        halves = self._half_N[self._rows.own], self._half_N[columns]
        part = self._rows.last.weighted(pair_weights(k, l_, grad_s, *halves, self._sums_n, None))
        self._product_nD = part if self._product_nD is None else self._product_nD.add_(part)

    def result(self) -> Tensor:
        """(n, D), once all columns were added."""
        assert self._product_nD is not None
        mine = self._rows.mine.rows()
        sums = self._sums_n.to(mine.dtype)[:, None]
        return self._product_nD.addcmul_(sums, mine, value=-1).mul_(4 * self._gamma)


class _Block:
    """Some centred samples and their products, by the BLAS in the dtype of the mean."""

    def __init__(self, x_nD: Tensor, mean_D: Tensor):
        self._rows_nD = x_nD.to(mean_D.dtype) - mean_D
        self.norms = self._rows_nD.square().sum(dim=1)

    def rows(self) -> Tensor:
        """(n, D) centred."""
        return self._rows_nD

    def products(self, other: Any) -> Tensor:
        """(n, m) of these samples with the other block's."""
        return self._rows_nD @ other._rows_nD.mT

    def weighted(self, weights_mn: Tensor) -> Tensor:
        """(m, D) sums of these samples."""
        return weights_mn @ self._rows_nD


class _TritonBlock:
    """The same on tensor cores, each number as the sum of two in bfloat16."""

    def __init__(self, x_nD: Tensor, mean_D: Tensor):
        from mimir_kernels import gram

        self._gram, self._rows = gram, gram.center_rows(x_nD, mean_D)
        self.norms = self._rows.norms_N

    def rows(self) -> Tensor:
        """(n, D), see `_Block.rows`."""
        return self._rows.hi_ND.float().add_(self._rows.lo_ND)

    def products(self, other: Any) -> Tensor:
        """(n, m), see `_Block.products`."""
        return self._gram.products(self._rows, other._rows)

    def weighted(self, weights_mn: Tensor) -> Tensor:
        """(m, D), see `_Block.weighted`."""
        return self._gram.weighted(weights_mn, self._rows)


def _rows(x_ND: Tensor, gamma: Tensor, other_ND: Tensor, own: slice) -> _Rows:
    """The rows of x's kernel matrix, in the precision that both inputs need."""
    block = _TritonBlock if runs_triton(x_ND, other_ND) else _Block
    return _Rows(x_ND, gamma, block, accumulation_dtype(x_ND, other_ND), own)
