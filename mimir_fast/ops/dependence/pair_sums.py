"""The one pass over all pairs of samples behind HSIC, CKA and the Rényi information of order 2.

With k_ij = exp(−γ_x ‖x_i − x_j‖²) − 1 and l_ij likewise of y (zero on the diagonal):

    s = Σ_ij k_ij l_ij        r_i = Σ_j k_ij        q_i = Σ_j l_ij

Every estimator is a small formula of (s, r, q) in float64, so one kernel and its adjoint serve them all. The adjoint:
from g_s, g_r, g_q, the gradient of a loss to the three,

    C_ij = (k_ij + 1)·(g_s·l_ij + (g_r,i + g_r,j)/2)        ∂x_i = −4 γ_x Σ_j C_ij (x_i − x_j)

and the mirror image for y. Both passes walk over tiles and keep O(N) numbers (`pair_tiles.py`, and on CUDA
kernels/mimir_kernels/pair_sums.py); only for small N, where it is cheap, does the forward pass keep k and l for the
backward pass.
Shapes: N samples, D features.
"""

from typing import Any

import torch
from torch import Tensor

from mimir_fast.ops._checks import check_finite
from mimir_fast.ops._dispatch import runs_triton, unless_too_large
from mimir_fast.ops._op import differentiated_again, gradients_of, register_op
from mimir_fast.ops._precision import accumulation_dtype, full_precision
from mimir_fast.ops.dependence import pair_tiles
from mimir_fast.ops.dependence.bandwidth import gamma
from mimir_fast.ops.dependence.rbf import rbf_minus_one_reference


def pair_sums_reference(x_ND: Tensor, y_ND: Tensor, gamma_x: Tensor, gamma_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of `pair_sums`; every kernel is tested against it."""
    k = rbf_minus_one_reference(x_ND, gamma_x).double()
    l_ = rbf_minus_one_reference(y_ND, gamma_y).double()
    return (k * l_).sum(), k.sum(dim=1), l_.sum(dim=1)


def pair_sums(x_ND: Tensor, y_ND: Tensor, gamma_x: Tensor, gamma_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """s (scalar), r (N,) and q (N,), float64, differentiable to x and y (any floating dtype).

    Args:
        gamma_x, gamma_y: float64 scalars on the device of x, or empty for the median rule (`gamma_or_later`); no
            gradient flows to them.
    """
    differentiable = torch.is_grad_enabled() and (x_ND.requires_grad or y_ND.requires_grad)
    keep = differentiable and x_ND.shape[0] <= pair_tiles.kept_rows(x_ND.device)
    s, r, q, *_ = _pair_sums(x_ND, y_ND, gamma_x, gamma_y, keep)
    return s, r, q


def _run(which: str, x_ND: Tensor, y_ND: Tensor, operands: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """`forward` or `backward` for these samples: by Triton, or tile by tile by C++ and PyTorch."""
    with full_precision(x_ND.device), torch.cuda.device_of(x_ND):  # Triton launches on the current device
        if runs_triton(x_ND, y_ND):
            from mimir_kernels import pair_sums as kernels

            with unless_too_large():
                found: tuple[Tensor, ...] = getattr(kernels, which)(*operands)
                return found
        found = getattr(pair_tiles, which)(*operands)
        return found


def _definition(
    x_ND: Tensor, y_ND: Tensor, gamma_x: Tensor, gamma_y: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`pair_sums_reference` as the op is called: in its precision, and with the median rule for an empty γ."""
    dtype = accumulation_dtype(x_ND, y_ND)
    gamma_x, gamma_y = (
        given if given.numel() else gamma(z_ND, 0, "median") for z_ND, given in ((x_ND, gamma_x), (y_ND, gamma_y))
    )
    with full_precision(x_ND.device):
        sums = pair_sums_reference(x_ND.to(dtype), y_ND.to(dtype), gamma_x, gamma_y)
    nothing = x_ND.new_empty(0, 0)
    return *sums, nothing, nothing, torch.stack([gamma_x, gamma_y])


@register_op("pair_sums", _definition)
def _pair_sums(
    x_ND: Tensor, y_ND: Tensor, gamma_x: Tensor, gamma_y: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """s, r, q, then for the backward pass k, l and (γ_x, γ_y)."""
    s, r, q, k, l_, *gammas = _run("forward", x_ND, y_ND, (x_ND, y_ND, gamma_x, gamma_y, keep))
    check_finite(s, x=x_ND, y=y_ND)
    return s, r, q, k, l_, torch.stack(gammas)


@_pair_sums.register_fake
def _(
    x_ND: Tensor, y_ND: Tensor, gamma_x: Tensor, gamma_y: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, kept = x_ND.shape[0], x_ND.shape[0] if keep else 0
    sums = x_ND.new_empty((), dtype=torch.float64)
    rows = x_ND.new_empty((n,), dtype=torch.float64)
    matrix = x_ND.new_empty((kept, kept), dtype=accumulation_dtype(x_ND, y_ND))
    return sums, rows, torch.empty_like(rows), matrix, torch.empty_like(matrix), sums.new_empty(2)


@torch.library.custom_op("mimir_fast::pair_sums_backward", mutates_args=())
def _pair_sums_backward(
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
    operands = grad_s, grad_r, grad_q, x_ND, y_ND, gamma_x, gamma_y, k_NN, l_NN, need_x, need_y
    grad_x, grad_y = _run("backward", x_ND, y_ND, operands)
    return grad_x.to(x_ND.dtype), grad_y.to(y_ND.dtype)


@_pair_sums_backward.register_fake
def _(
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
    # An unneeded gradient is an empty tensor: ops cannot return None.
    grad_x = x_ND.new_empty(x_ND.shape if need_x else (0, x_ND.shape[1]))
    return grad_x, y_ND.new_empty(y_ND.shape if need_y else (0, y_ND.shape[1]))


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:2], *output[3:])
    ctx.mark_non_differentiable(*output[3:])


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    need_x, need_y = ctx.needs_input_grad[:2]
    x, y, k, l_, gammas = ctx.saved_tensors
    if differentiated_again(*grads):

        def definition(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            return _definition(x, y, gammas[0], gammas[1], False)[:3]

        return *gradients_of(definition, (x, y), (need_x, need_y), grads[:3]), None, None, None
    grad_x, grad_y = _pair_sums_backward(*grads[:3], x, y, gammas[0], gammas[1], k, l_, need_x, need_y)
    return grad_x if need_x else None, grad_y if need_y else None, None, None, None


_pair_sums.register_autograd(_backward, setup_context=_save_for_backward)
