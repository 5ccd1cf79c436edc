"""Centred kernel alignment: HSIC made independent of scale.

    CKA(x, y) = HSIC(x, y) / √(HSIC(x, x) · HSIC(y, y))          (Cortes et al. 2012; Kornblith et al. 2019)

1 for equal representations up to rotation and (linear kernel, median bandwidth) isotropic scaling, 0 for independent
ones. The linear kernel needs no matrix of pairs: Σ_ij ⟨x_i, x_j⟩⟨y_i, y_j⟩ = ‖XᵀY‖²_F for centred X, Y.
Shapes: N samples, flattened to (N, D).
"""

from typing import Literal

import torch
from torch import Tensor

from mimir_fast.ops._checks import as_samples, check_choice, check_finite
from mimir_fast.ops._precision import accumulation_dtype, full_precision
from mimir_fast.ops.dependence.bandwidth import Bandwidth, centered_rows, gamma_or_later, median_floor
from mimir_fast.ops.dependence.pair_sums import pair_sums
from mimir_fast.ops.hsic import Estimator, check_estimator, hsic_from_sums

Kernel = Literal["rbf", "linear"]


def cka(
    x: Tensor,
    y: Tensor,
    *,
    kernel: Kernel = "rbf",
    sigma_x: float = 5.0,
    sigma_y: float = 5.0,
    bandwidth: Bandwidth = "reference",
    estimator: Estimator = "biased",
) -> Tensor:
    """Similarity of x (N, …) and y (N, …), in [0, 1] when biased; 0 if one of them is constant up to rounding.

    Args:
        x, y: any floating dtype, N samples in the first dimension, the rest is flattened.
        kernel: `rbf`, with the bandwidth options of `hsic`, or `linear` (which has none).
        estimator: `biased`, or `unbiased` (N ≥ 4; fair when features outnumber samples; may be negative).
    Returns:
        scalar, float32 (float64 if an input is), differentiable to both inputs.
    Raises:
        TypeError, ValueError: as `hsic`.
    """
    check_choice("kernel", kernel, ("rbf", "linear"))
    x_ND, y_ND = as_samples(x, y, minimum=check_estimator(estimator))
    if kernel == "linear":
        with full_precision(x.device):
            dtype = accumulation_dtype(x, y)
            a, b = centered_rows(x_ND, dtype), centered_rows(y_ND, dtype)
            sums = [linear_sums(u, v, zero_diagonal=estimator == "unbiased") for u, v in ((a, b), (a, a), (b, b))]
    else:
        x_gamma = x_ND, gamma_or_later(x_ND, sigma_x, bandwidth)
        y_gamma = y_ND, gamma_or_later(y_ND, sigma_y, bandwidth)
        sums = [
            pair_sums(u, v, gamma_u, gamma_v)
            for (u, gamma_u), (v, gamma_v) in ((x_gamma, y_gamma), (x_gamma, x_gamma), (y_gamma, y_gamma))
        ]
    xy, xx, yy = (hsic_from_sums(*triple, estimator) for triple in sums)
    check_finite(xy, x=x_ND, y=y_ND)
    constant = (xx <= 0) | (yy <= 0) | is_constant(x_ND) | is_constant(y_ND)
    return _ratio(xy, xx, yy, constant).to(accumulation_dtype(x, y))


def is_constant(x_ND: Tensor) -> Tensor:
    """Whether all samples are one, up to what rounding makes of its distance from the mean; a boolean scalar."""
    with torch.no_grad():
        variance = x_ND.to(accumulation_dtype(x_ND)).var(dim=0, correction=0)
        return variance.sum(dtype=torch.float64) <= median_floor(x_ND)


def _ratio(xy: Tensor, xx: Tensor, yy: Tensor, constant: Tensor) -> Tensor:
    """xy / √(xx·yy); of a constant input, 0/0 in exact arithmetic, 0 with a zero gradient. A NaN stays."""
    one = torch.ones_like(xx)
    # The ones keep 1/0 out of the gradient of the branch that is not taken.
    return torch.where(
        constant, 0, xy / (torch.where(constant, one, xx).sqrt() * torch.where(constant, one, yy).sqrt())
    )


def linear_sums(x_ND: Tensor, y_ND: Tensor, *, zero_diagonal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`pair_sums` (s, r, q) of the kernels ⟨x_i, x_j⟩ and ⟨y_i, y_j⟩ of centred rows, float64, without N×N matrices
    unless these are the smaller ones."""
    n, d_x, d_y = x_ND.shape[0], x_ND.shape[1], y_ND.shape[1]
    if d_x * d_y <= n * n:
        s = (x_ND.mT @ y_ND).square().sum(dtype=torch.float64)
    else:
        s = ((x_ND @ x_ND.mT) * (y_ND @ y_ND.mT)).sum(dtype=torch.float64)
    if not zero_diagonal:
        # Rows of a centred Gram matrix sum to zero.
        zeros = torch.zeros(n, dtype=torch.float64, device=x_ND.device)
        return s, zeros, zeros
    norms_x, norms_y = (z.square().sum(dim=1, dtype=torch.float64) for z in (x_ND, y_ND))
    return s - (norms_x * norms_y).sum(), -norms_x, -norms_y
