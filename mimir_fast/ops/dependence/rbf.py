"""The Gaussian kernel matrix, for the estimators that need all of it (inverses, eigenvalues).

    K_ij − 1 = expm1(−γ ‖x_i − x_j‖²)      ∂x_i = −4γ Σ_j C_ij (x_i − x_j),  C = K ∘ (G + Gᵀ)/2  for a gradient G to K

The 1 is left out: with the authors' σ the entries of K lie around 0.9996, centring removes the 1 anyway, and with it
only three digits would be left for the rest.
This is an op of its own so that the fused tiles of `pair_tiles.py` compute it, and so that its backward pass is one
matrix product instead of the chain through distances.
Shapes: N samples, D features.
"""

from typing import Any

import torch
from torch import Tensor

from mimir_fast.ops._checks import check_finite
from mimir_fast.ops._dispatch import runs_triton, unless_too_large
from mimir_fast.ops._op import differentiated_again, gradients_of, register_op
from mimir_fast.ops._precision import accumulation_dtype, full_precision
from mimir_fast.ops.dependence.bandwidth import Centered, squared_distances
from mimir_fast.ops.dependence.pair_tiles import TiledKernel, laplacian_product, lower_tiles


def rbf_minus_one_reference(x_ND: Tensor, gamma: float | Tensor) -> Tensor:
    """The definition of `rbf_minus_one`, differentiable any number of times."""
    return torch.expm1(-gamma * squared_distances(x_ND))


def rbf_minus_one(x_ND: Tensor, gamma: Tensor) -> Tensor:
    """(N, N) K − 1, float32 (float64 for float64 input), differentiable to x; gamma: float64 scalar, no gradient.

    Raises:
        ValueError: NaN or Inf in x (on CUDA only under MIMIR_FAST_DEBUG=1).
    """
    return _rbf_minus_one(x_ND, gamma)


def _definition(x_ND: Tensor, gamma: Tensor) -> Tensor:
    """`rbf_minus_one_reference` in the precision of the op."""
    with full_precision(x_ND.device):
        return rbf_minus_one_reference(x_ND.to(accumulation_dtype(x_ND)), gamma)


@register_op("rbf_minus_one", _definition)
def _rbf_minus_one(x_ND: Tensor, gamma: Tensor) -> Tensor:
    k_NN, sums_N = _matrix_and_sums(x_ND, gamma)
    check_finite(sums_N, samples=x_ND)
    return k_NN


def _matrix_and_sums(x_ND: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """K − 1 and its row sums (N,) float64."""
    if runs_triton(x_ND):
        from mimir_kernels import rbf as kernels
        from mimir_kernels.gram import center_rows

        with torch.cuda.device_of(x_ND), unless_too_large():  # Triton launches on the current device
            return kernels.rbf_minus_one(center_rows(x_ND), gamma)[:2]
    n, dtype = x_ND.shape[0], accumulation_dtype(x_ND)
    k_NN = x_ND.new_empty((n, n), dtype=dtype)
    with full_precision(x_ND.device):
        kernel = TiledKernel(Centered(x_ND, dtype), gamma, into=k_NN)
        for rows, columns in lower_tiles(n, x_ND.device):
            kernel.tile(rows, columns, sums=True)
    return k_NN, kernel.sums


@_rbf_minus_one.register_fake
def _(x_ND: Tensor, gamma: Tensor) -> Tensor:
    return x_ND.new_empty((x_ND.shape[0], x_ND.shape[0]), dtype=accumulation_dtype(x_ND))


@torch.library.custom_op("mimir_fast::rbf_minus_one_backward", mutates_args=())
def _rbf_minus_one_backward(grad_NN: Tensor, x_ND: Tensor, gamma: Tensor, k_NN: Tensor) -> Tensor:
    weights = (k_NN + 1).mul_((grad_NN + grad_NN.mT) / 2)
    if runs_triton(x_ND):
        from mimir_kernels.gram import center_rows
        from mimir_kernels.laplacian import laplacian_product as kernel

        with torch.cuda.device_of(x_ND), unless_too_large():
            grad_x = torch.empty_like(x_ND, dtype=torch.float32, memory_format=torch.contiguous_format)
            kernel(weights, center_rows(x_ND), gamma, grad_x, 0)
            return grad_x.to(x_ND.dtype)
    with full_precision(x_ND.device):
        sums_N = weights.sum(dim=1, dtype=torch.float64)
        return laplacian_product(weights, sums_N, Centered(x_ND, k_NN.dtype), gamma)


@_rbf_minus_one_backward.register_fake
def _(grad_NN: Tensor, x_ND: Tensor, gamma: Tensor, k_NN: Tensor) -> Tensor:
    return x_ND.new_empty(x_ND.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _backward(ctx: Any, grad_NN: Tensor) -> tuple[Tensor | None, None]:
    x, gamma, k = ctx.saved_tensors
    if differentiated_again(grad_NN):
        (grad_x,) = gradients_of(lambda x: _definition(x, gamma), (x,), (True,), (grad_NN,))
        return grad_x, None
    return _rbf_minus_one_backward(grad_NN, x, gamma, k), None


_rbf_minus_one.register_autograd(_backward, setup_context=_save_for_backward)
