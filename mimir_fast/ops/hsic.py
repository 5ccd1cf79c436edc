"""Hilbert-Schmidt independence criterion with RBF kernels.

    HSIC_b(x, y) = tr(K H L H) / c        K_ij = exp(−γ_x ‖x_i − x_j‖²),  L likewise,  H = I − 11ᵀ/N

Gretton et al. 2005; MIMIR (arXiv 2312.04960) Eq. 25/29. With the authors' σ the off-diagonal kernel is about 0.9996, so
K − 1 = expm1(·) is what is stored: centring removes the 1 anyway, and keeping it would eat the mantissa.
Shapes: N samples, flattened to (N, D).
"""

from typing import Literal

import torch
from torch import Tensor

Bandwidth = Literal["paper", "reference", "median"]
Estimator = Literal["biased", "unbiased"]
Normalizer = Literal["n2", "(n-1)^2"]


def squared_distances(x_ND: Tensor) -> Tensor:
    """(N, N) squared Euclidean distances, from mean-centred rows (distances stay, cancellation goes), diagonal zero."""
    x = x_ND - x_ND.mean(dim=0, keepdim=True)
    gram = x @ x.T
    norms = gram.diagonal()
    d2 = (norms[:, None] + norms[None, :] - 2 * gram).clamp_min(0)
    return d2 * (1 - torch.eye(len(x), dtype=x.dtype, device=x.device))


def rbf_minus_one(x_ND: Tensor, sigma: float, bandwidth: Bandwidth) -> Tensor:
    """(N, N) matrix K − 1 of the Gaussian kernel."""
    d2 = squared_distances(x_ND)
    return torch.expm1(-gamma(d2, x_ND.shape[1], sigma, bandwidth) * d2)


def gamma(d2_NN: Tensor, dim: int, sigma: float, bandwidth: Bandwidth) -> float | Tensor:
    """The factor of −d² in the exponent: 1/(2σ²), 1/(2σ²·D), or 1/(2·median d²), detached."""
    if bandwidth == "paper":
        return 1 / (2 * sigma**2)
    if bandwidth == "reference":
        return 1 / (2 * sigma**2 * dim)
    n = len(d2_NN)
    off_diagonal = d2_NN.detach()[~torch.eye(n, dtype=torch.bool, device=d2_NN.device)]
    return 1 / (2 * off_diagonal.median().clamp_min(1e-12))


def center(k_NN: Tensor) -> Tensor:
    """H K H."""
    return k_NN - k_NN.mean(0, keepdim=True) - k_NN.mean(1, keepdim=True) + k_NN.mean()


def hsic(
    x: Tensor,
    y: Tensor,
    *,
    sigma_x: float = 5.0,
    sigma_y: float = 5.0,
    bandwidth: Bandwidth = "reference",
    estimator: Estimator = "biased",
    normalizer: Normalizer = "n2",
) -> Tensor:
    """Scalar dependence of x (N, …) and y (N, …); zero in the limit if and only if they are independent.

    Args:
        bandwidth: `paper` exp(−d²/(2σ²)), `reference` exp(−d²/(2σ²D)) as in the authors' code, `median` heuristic.
        estimator: `biased` (V-statistic) or `unbiased` (Song et al. 2012, Eq. 5).
        normalizer: of the biased estimator, 1/N² (paper) or 1/(N−1)² (Gretton).
    """
    k = rbf_minus_one(x.flatten(1).float(), sigma_x, bandwidth)
    l_ = rbf_minus_one(y.flatten(1).float(), sigma_y, bandwidth)
    n = len(k)
    if estimator == "biased":
        scale = n**2 if normalizer == "n2" else (n - 1) ** 2
        return (center(k) * center(l_)).sum() / scale
    r, q = k.sum(1), l_.sum(1)
    return ((k * l_).sum() + r.sum() * q.sum() / ((n - 1) * (n - 2)) - 2 * (r @ q) / (n - 2)) / (n * (n - 3))
