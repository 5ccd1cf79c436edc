"""Positions of tokens: the fixed two-dimensional sine-cosine table (MAE, arXiv 2111.06377, App. A), and their sum."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mimir_fast.ops.positions import add_positions, behind_prefix
from mimir_fast.sizes import Size, area, height_width, said


def sincos_positions(dim: int, grid_size: Size, *, num_prefix: int = 1) -> Tensor:
    """(1, prefix + N, dim) float32; half of the channels encode the column, half the row; prefix rows are zero.

    Raises:
        ValueError: dim is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"a 2-d sine-cosine embedding needs dim divisible by 4, got {dim}")
    omega = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    down, across = height_width(grid_size)
    angles = torch.arange(max(down, across), dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, dim/2)
    columns = axis[None, :across].expand(down, -1, -1)
    rows = axis[:down, None].expand(-1, across, -1)
    table = torch.cat([columns, rows], dim=-1).reshape(down * across, dim)
    return F.pad(table, (0, 0, num_prefix, 0)).float().unsqueeze(0)


def with_positions(
    tokens_BKD: Tensor, places_BK: Tensor | None, positions_RD: Tensor, prefix_FD: Tensor | None = None
) -> Tensor:
    """(B, K, D): the tokens plus the positions of their places; (B, F + K, D) behind a prefix, which has the first F.

    Args:
        places_BK: None when all places are there in raster order.
    """
    ids = None if places_BK is None else behind_prefix(places_BK, 0 if prefix_FD is None else len(prefix_FD))
    return add_positions(tokens_BKD, ids, positions_RD, prefix_FD)


def pseudo_grid(num_tokens: int, grid: Size) -> int:
    """√num_tokens, the side of the square grid on which the MIMIR authors' ConViT and XCiT assume the kept patches.

    Args:
        grid: of the whole image, for the message.
    Raises:
        ValueError: the tokens form no square, or the image is none.
    """
    side = math.isqrt(num_tokens)
    if not isinstance(grid, int):
        raise ValueError(
            f"positions=official puts the kept patches on a square grid, and images of {said(grid)} patches are no "
            "squares: use --model.positions true"
        )
    if side**2 != num_tokens:
        raise ValueError(
            f"positions=official puts the kept patches on a square grid, and {num_tokens} of {area(grid)} form none: "
            "use --model.positions true, or keep a square number of patches (an even grid and mask_ratio 0.75 do)"
        )
    return side
