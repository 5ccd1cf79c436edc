"""Fixed two-dimensional sine-cosine position embedding (MAE, arXiv 2111.06377, App. A)."""

import torch
from torch import Tensor


def sincos_positions(dim: int, grid_size: int, *, cls_token: bool = True) -> Tensor:
    """(1, [1 +] grid², dim) float32; half of the channels encode the column, half the row; the cls row is zero.

    Raises:
        ValueError: dim is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"a 2-d sine-cosine embedding needs dim divisible by 4, got {dim}")
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, dim/2)
    columns = axis[None].expand(grid_size, -1, -1)
    rows = axis[:, None].expand(-1, grid_size, -1)
    table = torch.cat([columns, rows], dim=-1).reshape(grid_size**2, dim)
    if cls_token:
        table = torch.cat([torch.zeros(1, dim, dtype=torch.float64), table])
    return table.float().unsqueeze(0)
