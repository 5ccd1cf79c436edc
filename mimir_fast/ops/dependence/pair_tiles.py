"""`pair_sums` and its adjoint, tile by tile: half of the Gram matrix, nothing of size N×N.

A tile of X Xᵀ is one call of the BLAS; while it lies in the cache, the rest (distances, expm1, row sums, products) is
done by C++ (csrc/pair_tiles.cpp) or, without a compiler, on a GPU, or in float64, by PyTorch. Only tiles on and below
the diagonal are visited: the mirror image of a tile has its column sums as row sums. The order of tiles and panels
depends on N and D alone and sums are float64, so the same input gives the same bits. Samples are centred a panel of
features at a time, so that no copy of all of them is made.
Shapes: N samples, D features, tiles of rows I and columns J, panels of P features.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from mimir_fast import _native
from mimir_fast.ops._dispatch import runs_native
from mimir_fast.ops._precision import accumulation_dtype
from mimir_fast.ops._products import multiply, multiply_add
from mimir_fast.ops.dependence.bandwidth import Centered, gamma_of_median, median_floor

# Up to this many samples the two N×N matrices (16 MB each on a CPU, 64 MB on a GPU) are cheaper to keep for the
# backward pass than to compute again.
KEPT_ROWS = {"cpu": 2048, "cuda": 4096}

Tile = tuple[slice, slice]


def forward(
    x_ND: Tensor, y_ND: Tensor, gamma_x: Tensor, gamma_y: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(s, r, q, k, l, γ_x, γ_y) of `pair_sums`: float64 sums, k and l as (N, N), or (0, 0) unless `keep`, and the γ
    used: those given, or where one is empty that of the median rule, from the Gram matrix of this pass."""
    n, device, dtype = x_ND.shape[0], x_ND.device, accumulation_dtype(x_ND, y_ND)
    kept = [torch.empty((n, n) if keep else (0, 0), dtype=dtype, device=device) for _ in range(2)]
    kernel_x = TiledKernel(Centered(x_ND, dtype), gamma_x, kept[0])
    # HSIC(x, x), as in CKA, needs one kernel matrix only.
    same = x_ND.is_set_to(y_ND) and gamma_x.is_set_to(gamma_y)
    kernel_y = kernel_x if same else TiledKernel(Centered(y_ND, dtype), gamma_y, kept[1])
    for kernel, samples in ((kernel_x, x_ND), (kernel_y, y_ND)):
        if not kernel.gamma.numel():
            kernel.use_median(median_floor(samples))
    s = torch.zeros((), dtype=torch.float64, device=device)
    for rows, columns in lower_tiles(n, device):
        k = kernel_x.tile(rows, columns, sums=True)
        l_ = k if same else kernel_y.tile(rows, columns, sums=True)
        s += inner_product(k, l_) * (1 if rows == columns else 2)
    if same:
        kept[1].copy_(kept[0])
    q = kernel_y.sums.clone() if same else kernel_y.sums
    return s, kernel_x.sums, q, kept[0], kept[1], kernel_x.gamma, kernel_y.gamma


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
) -> tuple[Tensor, Tensor]:
    """(∂x, ∂y) of `pair_sums`; (0, D) where not needed. k and l are (N, N), or (0, 0) to be computed again."""
    dtype = accumulation_dtype(x_ND, y_ND)
    # With the kernel matrices at hand, an input that needs no gradient is not looked at.
    kept = len(k_NN) > 0
    x = Centered(x_ND, dtype) if need_x or not kept else None
    y = Centered(y_ND, dtype) if need_y or not kept else None
    to_x = Laplacian(x, gamma_x, grad_r) if need_x and x else None
    to_y = Laplacian(y, gamma_y, grad_q) if need_y and y else None
    empty_x, empty_y = (z.new_empty(0, z.shape[1]) for z in (x_ND, y_ND))
    if kept:
        return (
            to_x.of(k_NN, l_NN, grad_s) if to_x else empty_x,
            to_y.of(l_NN, k_NN, grad_s) if to_y else empty_y,
        )
    assert x is not None and y is not None
    kernel_x, kernel_y = TiledKernel(x, gamma_x), TiledKernel(y, gamma_y)
    for rows, columns in lower_tiles(len(x), x_ND.device):
        k, l_ = kernel_x.tile(rows, columns), kernel_y.tile(rows, columns)
        if to_x:
            to_x.add(k, l_, grad_s, rows, columns)
        if to_y:
            to_y.add(l_, k, grad_s, rows, columns)
    return to_x.result() if to_x else empty_x, to_y.result() if to_y else empty_y


def kept_rows(device: torch.device) -> int:
    """The largest N whose kernel matrices are kept."""
    return KEPT_ROWS.get(device.type, KEPT_ROWS["cuda"])


def lower_tiles(n: int, device: torch.device) -> Iterator[Tile]:
    """(rows I, columns J) on and below the diagonal; of each I the diagonal tile first, as `TiledKernel` needs."""
    # Three tiles of float32 fit the second-level cache of a CPU core; a GPU wants more work at a time.
    size = 4096 if device.type != "cpu" else 256 if n <= 2048 else 512
    blocks = [slice(i, min(i + size, n)) for i in range(0, n, size)]
    for index, rows in enumerate(blocks):
        for columns in (rows, *blocks[:index]):
            yield rows, columns


class TiledKernel:
    """The matrix K − 1 of x, of which one tile exists at a time (or all, in `into`), and its row sums so far."""

    def __init__(self, x: Centered, gamma: Tensor, into: Tensor | None = None):
        self.x, self.gamma = x, gamma
        self.norms = x.x.new_empty(len(x), dtype=x.dtype)
        self.sums = torch.zeros(len(x), dtype=torch.float64, device=x.x.device)
        self._whole: Tensor | None = None
        self._buffer = self.norms.new_empty(0)
        if into is not None and len(into):
            self._fill(into)

    def _fill(self, gram_NN: Tensor) -> None:
        """Make all tiles of the Gram matrix at once; `tile` finds them there."""
        everything = slice(0, len(self.x))
        for number, panel in enumerate(self.x.panels()):
            part = self.x.part(everything, panel)
            for rows, columns in lower_tiles(len(self.x), gram_NN.device):
                tile = gram_NN[rows, columns]
                multiply_add(tile, part[rows], part[columns], first=number == 0)
        self.norms.copy_(gram_NN.diagonal())
        self._whole = gram_NN

    def use_median(self, floor: Tensor) -> None:
        """Set γ by the median rule, from the whole Gram matrix."""
        n = len(self.x)
        if self._whole is None:
            self._fill(self.norms.new_empty(n, n))
        assert self._whole is not None
        i, j = torch.tril_indices(n, n, -1, device=self.norms.device)
        d2 = (self.norms[i] + self.norms[j]).sub_(self._whole[i, j], alpha=2)
        self.gamma = gamma_of_median(d2.clamp_min_(0), floor)

    def tile(self, rows: slice, columns: slice, *, sums: bool = False) -> Tensor:
        """k_IJ, overwritten by the next call; `sums` adds its row sums and those of its mirror image to `self.sums`."""
        gram = self._gram(rows, columns) if self._whole is None else self._whole[rows, columns]
        on_diagonal = rows == columns
        row_sums = self.sums[rows] if sums else None
        column_sums = self.sums[columns] if sums and not on_diagonal else None
        kernel_from_gram_(gram, self.norms[rows], self.norms[columns], self.gamma, on_diagonal, row_sums, column_sums)
        if self._whole is not None and not on_diagonal:
            self._whole[columns, rows] = gram.mT
        return gram

    def _gram(self, rows: slice, columns: slice) -> Tensor:
        """A tile of X Xᵀ in the buffer; of the diagonal ones the norms are kept, so that a distance of 0 is 0."""
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        if self._buffer.numel() < shape[0] * shape[1]:
            self._buffer = self._buffer.new_empty(shape[0] * shape[1])
        gram = self._buffer[: shape[0] * shape[1]].view(shape)
        for number, panel in enumerate(self.x.panels()):
            left = self.x.part(rows, panel)
            right = left if rows == columns else self.x.part(columns, panel)
            multiply_add(gram, left, right, first=number == 0)
        if rows == columns:
            self.norms[rows] = gram.diagonal()
        return gram


class Laplacian:
    """−4γ Σ_j C_ij (x_i − x_j) with C_ij = (k_ij + 1)·(g_s·l_ij + (g_r,i + g_r,j)/2), from all of C or lower tiles."""

    def __init__(self, x: Centered, gamma: Tensor, grad_r: Tensor):
        self.x = x
        self._gamma = gamma
        self._half = (grad_r / 2).to(x.dtype)
        self._sums = torch.zeros(len(x), dtype=torch.float64, device=grad_r.device)  # C 1
        self._product = x.x.new_empty(0, dtype=x.dtype)  # C X

    def of(self, k_NN: Tensor, l_NN: Tensor, grad_s: Tensor) -> Tensor:
        """(N, D) gradient in the dtype of x, a panel at a time."""
        weights = pair_weights(k_NN, l_NN, grad_s, self._half, self._half, self._sums, None)
        return laplacian_product(weights, self._sums, self.x, self._gamma)

    def add(self, k: Tensor, l_: Tensor, grad_s: Tensor, rows: slice, columns: slice) -> None:
        """Add the tile of C at (rows, columns) and, off the diagonal, its mirror image."""
        if not len(self._product):
            self._product = self._product.new_zeros(self.x.x.shape)
        mirrored = rows != columns
        row_sums, column_sums = self._sums[rows], self._sums[columns] if mirrored else None
        weights = pair_weights(k, l_, grad_s, self._half[rows], self._half[columns], row_sums, column_sums)
        for panel in self.x.panels():
            multiply_add(self._product[rows, panel], weights, self.x.part(columns, panel).mT)
            if mirrored:
                multiply_add(self._product[columns, panel], weights.mT, self.x.part(rows, panel).mT)

    def result(self) -> Tensor:
        """(N, D) gradient of the tiles that were added; ends the collection."""
        for panel in self.x.panels():
            part = self.x.part(slice(0, len(self.x)), panel)
            _from_product(self._product[:, panel], self._sums, part, self._gamma)
        return self._product


def laplacian_product(weights_NN: Tensor, sums_N: Tensor, x: Centered, gamma: Tensor) -> Tensor:
    """−4γ Σ_j W_ij (x_i − x_j), (N, D) in the dtype of x, for symmetric W with these row sums, a panel at a time.

    The gradient of any function of distances has this form.
    """
    found = torch.empty_like(x.x, memory_format=torch.contiguous_format)
    for panel in x.panels():
        part = x.part(slice(0, len(x)), panel)
        found[:, panel] = _from_product(multiply(weights_NN, part.mT), sums_N, part, gamma)
    return found


def _from_product(product_NP: Tensor, sums_N: Tensor, part_NP: Tensor, gamma: Tensor) -> Tensor:
    """The gradient from W X, in place."""
    return product_NP.addcmul_(sums_N.to(part_NP.dtype)[:, None], part_NP, value=-1).mul_(4 * gamma)


def kernel_from_gram_(
    gram: Tensor,
    norms_i: Tensor,
    norms_j: Tensor,
    gamma: Tensor,
    on_diagonal: bool,
    row_sums: Tensor | None,
    column_sums: Tensor | None,
) -> None:
    """Turn a tile of X Xᵀ into one of K − 1, in place, and add its row and column sums to the float64 vectors given."""
    if runs_cpp(gram):
        shape, sums = (gram.stride(0), *gram.shape), (row_sums, column_sums)
        _native.run("kernel_from_gram", gram, *shape, norms_i, norms_j, float(gamma), on_diagonal, *sums)
        return
    gram.mul_(-2).add_(norms_i[:, None] + norms_j).clamp_min_(0)
    if on_diagonal:
        gram.fill_diagonal_(0)
    gram.mul_(-gamma).expm1_()
    if row_sums is not None:
        row_sums += gram.sum(dim=1, dtype=torch.float64)
    if column_sums is not None:
        column_sums += gram.sum(dim=0, dtype=torch.float64)


def inner_product(k: Tensor, l_: Tensor) -> Tensor | float:
    """Σ k∘l of two tiles, in float64."""
    if runs_cpp(k):
        total: float = _native.run("inner_product", k, k.stride(0), l_, l_.stride(0), *k.shape)
        return total
    return (k * l_).sum(dtype=torch.float64)


def pair_weights(
    k: Tensor,
    l_: Tensor,
    grad_s: Tensor,
    half_i: Tensor,
    half_j: Tensor,
    row_sums: Tensor,
    column_sums: Tensor | None,
) -> Tensor:
    """(k + 1)·(g_s·l + half_i + half_j) as a new tile, its row and column sums added to the float64 vectors given."""
    if runs_cpp(k):
        weights = k.new_empty(k.shape)
        operands, halves, sums = (k, k.stride(0), l_, l_.stride(0)), (half_i, half_j), (row_sums, column_sums)
        _native.run("pair_weights", *operands, *k.shape, float(grad_s), *halves, weights, *sums)
        return weights
    weights = (k + 1).mul_(grad_s * l_ + (half_i[:, None] + half_j))
    row_sums += weights.sum(dim=1, dtype=torch.float64)
    if column_sums is not None:
        column_sums += weights.sum(dim=0, dtype=torch.float64)
    return weights


def runs_cpp(tile: Tensor) -> bool:
    """Whether csrc/pair_tiles.cpp computes this tile: float32 on the CPU."""
    return runs_native("pair_weights", tile)
