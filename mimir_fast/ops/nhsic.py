"""Normalised HSIC in its CCA form, the estimator of the MIMIR authors' code, by two Cholesky factorisations.

    nHSIC = tr(R_x R_y)    R = K̄ (K̄ + cI)⁻¹,  c = eps·N,  K̄ = HKH      (Fukumizu et al. 2007, NOCCO)

With P = (K̄ + cI)⁻¹, R = I − cP is symmetric and nHSIC = Σ R_x ∘ R_y: two positive definite inverses, on the device,
where the authors centre one side only, move the matrices to the host and invert them there. The value is the same. The
gradient is explicit, ∂/∂K_x = c·P_x R_y P_x, already centred because R_y 1 = 0 and P_x 1 = 1/c.
Shapes: N samples, flattened to (N, D).
"""

from typing import Any

import torch
from torch import Tensor

from mimir_fast.ops._checks import as_samples, check_positive
from mimir_fast.ops._op import differentiated_again, gradients_of, register_op
from mimir_fast.ops._precision import accumulation_dtype
from mimir_fast.ops.dependence.bandwidth import Sigma, gamma, widths
from mimir_fast.ops.dependence.rbf import rbf_minus_one, rbf_minus_one_reference


def center(k_NN: Tensor) -> Tensor:
    """H K H: rows and columns of a kernel matrix (N, N) with a mean of zero."""
    return k_NN - k_NN.mean(0, keepdim=True) - k_NN.mean(1, keepdim=True) + k_NN.mean()


def nhsic_reference(x: Tensor, y: Tensor, *, sigma: Sigma = 5.0, eps: float = 1e-5) -> Tensor:
    """The definition of `nhsic`, with general solves, in the dtype of the inputs."""
    x_ND, y_ND = as_samples(x, y)
    sigma_x, sigma_y = widths(sigma)
    k = rbf_minus_one_reference(x_ND, gamma(x_ND, sigma_x, "reference"))
    l_ = rbf_minus_one_reference(y_ND, gamma(y_ND, sigma_y, "reference"))
    return _nhsic_from_kernels_reference(k, l_, eps)


def _nhsic_from_kernels_reference(k_NN: Tensor, l_NN: Tensor, eps: float) -> Tensor:
    n = k_NN.shape[0]
    identity = torch.eye(n, dtype=k_NN.dtype, device=k_NN.device)
    # Not torch.linalg.solve: its second derivative by forward mode twice is wrong (torch 2.14).
    r_x, r_y = (torch.linalg.inv(c + eps * n * identity) @ c for c in (center(k_NN), center(l_NN)))
    return (r_x * r_y.mT).sum()


def nhsic(x: Tensor, y: Tensor, *, sigma: Sigma = 5.0, eps: float = 1e-5) -> Tensor:
    r"""Scalar in [0, N − 1] for x (N, …) and y (N, …), bandwidth exp(−d²/(2σ²D)), regularisation eps·N.

    $$\mathrm{nHSIC} = \mathrm{tr}(R_x R_y), \qquad R = \bar K (\bar K + \epsilon N I)^{-1}, \quad \bar K = HKH$$

    O(N³) time and N×N memory; the N×N algebra is in float64 (their smallest eigenvalue is eps·N beside values up to N),
    the distances in float32. Nothing waits for the device.

    Args:
        x, y: any floating dtype, N ≥ 2 samples in the first dimension, the rest is flattened.
        sigma: width of both kernels, > 0 (the authors' 5), or (σ of x, σ of y).
        eps: regularisation, > 0 (the authors' 1e-5). It has to stand above the rounding of the kernels, about 1e-7 in
            float32: below, K̄ + eps·N·I may have negative eigenvalues and no Cholesky factor.
    Returns:
        scalar, float32 (float64 if an input is), differentiable to both inputs, any number of times. NaN, with
        NaN gradients, where a factorisation failed: raise eps, or give float64.
    Raises:
        TypeError: an input is not a floating-point tensor.
        ValueError: unequal or too few samples, mixed devices, σ or eps ≤ 0; NaN or Inf (on CUDA only under
            MIMIR_FAST_DEBUG=1).
    """
    x_ND, y_ND = as_samples(x, y)
    check_positive("eps", eps)
    sigma_x, sigma_y = widths(sigma)
    k = rbf_minus_one(x_ND, gamma(x_ND, sigma_x, "reference"))
    l_ = rbf_minus_one(y_ND, gamma(y_ND, sigma_y, "reference"))
    value, _, _ = _nhsic_from_kernels(k.double(), l_.double(), eps)
    return value.to(accumulation_dtype(x, y))


def _definition(k_NN: Tensor, l_NN: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`_nhsic_from_kernels_reference` as the op is called; no backward pass of ours reads the inverses then."""
    nothing = k_NN.new_empty(0, 0)
    return _nhsic_from_kernels_reference(k_NN, l_NN, eps), nothing, nothing


@register_op("nhsic_from_kernels", _definition)
def _nhsic_from_kernels(k_NN: Tensor, l_NN: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    n = k_NN.shape[0]
    p_x, p_y = (_inverse(_regularised(k, eps * n)) for k in (k_NN, l_NN))
    return (_identity_minus(p_x, eps * n) * _identity_minus(p_y, eps * n)).sum(), p_x, p_y


@_nhsic_from_kernels.register_fake
def _(k_NN: Tensor, l_NN: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return k_NN.new_empty(()), torch.empty_like(k_NN), torch.empty_like(l_NN)


def _regularised(k_NN: Tensor, c: float) -> Tensor:
    """HKH + cI (N, N), symmetric to the last bit, as Cholesky needs it."""
    # The BLAS may round k_ij and k_ji differently. Cholesky reads one triangle only, whose rows would then not sum to
    # zero; and along the vector of ones the inverse magnifies by 1/c.
    centered = center((k_NN + k_NN.mT) / 2)
    centered.diagonal().add_(c)
    return centered


def _inverse(a_NN: Tensor) -> Tensor:
    """Of a symmetric positive definite matrix."""
    # cholesky_ex reports a failure in a tensor on the device, where `cholesky` makes the host wait to look at it.
    # HKH + cI is positive definite but for rounding; where c is below the rounding of K it may not be, and the factor
    # is then half finished: NaN says so. LAPACK's result is column by column, hence the transpose, which a symmetric
    # matrix does not notice.
    factor, failed = torch.linalg.cholesky_ex(a_NN)
    inverse = torch.cholesky_inverse(factor).mT.contiguous()
    return inverse.masked_fill_(failed != 0, torch.nan)


def _identity_minus(p_NN: Tensor, c: float) -> Tensor:
    """R = I − cP (N, N), from the inverse P."""
    r = p_NN * -c
    r.diagonal().add_(1)
    return r


@torch.library.custom_op("mimir_fast::nhsic_from_kernels_backward", mutates_args=())
def _nhsic_from_kernels_backward(
    grad: Tensor, k_NN: Tensor, l_NN: Tensor, p_x_NN: Tensor, p_y_NN: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    c = eps * p_x_NN.shape[0]
    grad_k = p_x_NN @ _identity_minus(p_y_NN, c) @ p_x_NN
    grad_l = p_y_NN @ _identity_minus(p_x_NN, c) @ p_y_NN
    return grad_k.mul_(c * grad), grad_l.mul_(c * grad)


@_nhsic_from_kernels_backward.register_fake
def _(grad: Tensor, k_NN: Tensor, l_NN: Tensor, p_x_NN: Tensor, p_y_NN: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(k_NN), torch.empty_like(l_NN)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.eps = inputs[2]
    ctx.save_for_backward(*inputs[:2], *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    k, l_, p_x, p_y = ctx.saved_tensors
    if differentiated_again(grad):

        def definition(k: Tensor, l_: Tensor) -> Tensor:
            return _nhsic_from_kernels_reference(k, l_, ctx.eps)

        return *gradients_of(definition, (k, l_), ctx.needs_input_grad[:2], (grad,)), None
    grad_k, grad_l = _nhsic_from_kernels_backward(grad, k, l_, p_x, p_y, ctx.eps)
    return grad_k, grad_l, None


_nhsic_from_kernels.register_autograd(_backward, setup_context=_save_for_backward)
