"""Normalised HSIC in its CCA form, the estimator of the MIMIR authors' code, by two Cholesky factorisations.

    nHSIC = tr(R_x R_y)    R = K̄ (K̄ + cI)⁻¹,  c = eps·N,  K̄ = HKH      (Fukumizu et al. 2007, NOCCO)

With P = (K̄ + cI)⁻¹ this is N − c·tr P_x − c·tr P_y + c²·⟨P_x, P_y⟩: symmetric positive definite solves, on the device.
"""

import torch
from torch import Tensor

from mimir_fast.ops.hsic import center, rbf_minus_one


def nhsic(x: Tensor, y: Tensor, *, sigma: float = 5.0, eps: float = 1e-5) -> Tensor:
    """Scalar in [0, N − 1] for x (N, …) and y (N, …), bandwidth exp(−d²/(2σ²D)), regularisation eps·N."""
    n = len(x)
    c = eps * n
    identity = torch.eye(n, device=x.device)

    def inverse(z: Tensor) -> Tensor:
        k = center(rbf_minus_one(z.flatten(1).float(), sigma, "reference"))
        return torch.cholesky_inverse(torch.linalg.cholesky(k + c * identity))

    p_x, p_y = inverse(x), inverse(y)
    return n - c * p_x.trace() - c * p_y.trace() + c**2 * (p_x * p_y).sum()
