"""Convolutions over squares of pixels or tokens that do not overlap, as matrix products.

Shapes: k the side of a square, C channels, D outputs; squares (…, k·k·C) in (row, column, channel) order.
"""

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from mimir_fast.layers.inspection import is_plain
from mimir_fast.layers.linear import linear_by


def conv_of_squares(conv: nn.Module, squares: Tensor, side: int, *, tf32: bool = False) -> Tensor:
    """(…, D): a k × k convolution of stride k; in the weight's dtype.

    Args:
        side: k.
        tf32: stay a convolution on CUDA, which cuDNN computes in TF32 where that is allowed; (B, N, k·k·C) only.
    """
    if not is_plain(nn.Conv2d, conv):
        images = squares.reshape(-1, side, side, squares.shape[-1] // side**2).permute(0, 3, 1, 2)
        return conv(images).view(*squares.shape[:-1], -1)
    weight, bias = cast(nn.Conv2d, conv).weight.permute(0, 2, 3, 1).flatten(1), cast(nn.Conv2d, conv).bias
    squares = squares.to(weight.dtype)
    return convolve(squares, weight, bias) if tf32 and squares.is_cuda else linear_by(weight, bias, squares)


def convolve(x_BNP: Tensor, weight_DP: Tensor, bias_D: Tensor | None) -> Tensor:
    """`F.linear` as a 1 × 1 convolution, (B, N, D). Both are in channels-last order: nothing is copied."""
    y_BD1N = F.conv2d(x_BNP.transpose(1, 2).unsqueeze(2), weight_DP[..., None, None], bias_D)
    return y_BD1N.squeeze(2).transpose(1, 2)
