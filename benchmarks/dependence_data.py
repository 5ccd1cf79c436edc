"""Inputs that look like the estimators' real ones: images that resemble one another, latents that depend on them.

x is a smooth mixture of a few factors around mid-grey plus pixel noise, cut to [0, 1] as images are; y is a non-linear
function of the same factors. With σ = 5 the off-diagonal kernel of x lies near 0.998, which is what costs `exp` its
digits. Random normal data would hide that.
Shapes: N samples, D features.
"""

import torch
from torch import Tensor

from benchmarks.case import generator

FACTORS = 32


def image_like(
    n: int, d_x: int, d_y: int, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[Tensor, Tensor]:
    """x (N, D_x) in [0, 1] and y (N, D_y), leaves that require gradients."""
    rng = generator(device, seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=rng)

    factors = normal(n, FACTORS)
    x = torch.addmm(normal(n, d_x), factors, normal(FACTORS, d_x), beta=0.05, alpha=0.25 / FACTORS**0.5)
    y = torch.addmm(normal(n, d_y), factors, normal(FACTORS, d_y), beta=0.1, alpha=FACTORS**-0.5)
    return x.add_(0.5).clamp_(0, 1).to(dtype).requires_grad_(), y.tanh_().to(dtype).requires_grad_()
