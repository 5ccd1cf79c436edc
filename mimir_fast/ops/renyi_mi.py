"""Matrix-based Rényi mutual information of order α (Yu et al. 2019; MIMIR App. F).

With trace-normalised kernels A = K/tr K:  S_α(A) = log2(tr A^α) / (1 − α),  I = S(A) + S(B) − S(A∘B / tr(A∘B)).
α = 2 needs no eigenvalues: tr A² = ‖A‖_F².
"""

import torch
from torch import Tensor

from mimir_fast.ops.hsic import Bandwidth, rbf_minus_one


def renyi_mi(
    x: Tensor, y: Tensor, *, alpha: float = 2.0, sigma: float = 5.0, bandwidth: Bandwidth = "median"
) -> Tensor:
    """Scalar in bits, 0 ≤ I ≤ log2 N, for x (N, …) and y (N, …)."""
    n = len(x)
    a = (1 + rbf_minus_one(x.flatten(1).float(), sigma, bandwidth)) / n
    b = (1 + rbf_minus_one(y.flatten(1).float(), sigma, bandwidth)) / n
    joint = a * b * n
    return _entropy(a, alpha) + _entropy(b, alpha) - _entropy(joint, alpha)


def _entropy(a: Tensor, alpha: float) -> Tensor:
    power = a.square().sum() if alpha == 2 else torch.linalg.eigvalsh(a).clamp_min(1e-12).pow(alpha).sum()
    return torch.log2(power) / (1 - alpha)
