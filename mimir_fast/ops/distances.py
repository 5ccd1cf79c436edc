"""Squared distances between samples, D_ij = ‖x_i − x_j‖², the numerically careful way.

The samples are centred first: distances do not change, but ‖x‖² no longer dwarfs them.
Shapes: N samples, flattened to D numbers each.
"""

import torch
from torch import Tensor


def centered_rows(x_ND: Tensor, dtype: torch.dtype) -> Tensor:
    """x minus its mean over the samples, contiguous, in `dtype`. Any shift is exact for distances; the mean is best."""
    x = x_ND.to(dtype)
    return (x - x.mean(dim=0, keepdim=True)).contiguous()


def squared_distances(x_ND: Tensor) -> Tensor:
    """(N, N) squared Euclidean distances in the dtype of x, ≥ 0, diagonal exactly 0. The definition."""
    x = x_ND - x_ND.mean(dim=0, keepdim=True)
    gram = x @ x.mT
    norms = gram.diagonal()  # of the same product: its rounding cancels
    d2 = (norms[:, None] + norms[None, :] - 2 * gram).clamp_min(0)
    return d2 * (1 - torch.eye(x.shape[0], dtype=x.dtype, device=x.device))
