"""A convolution over visible patches: they are put on the grid with zeros in the holes, and picked again afterwards.

So nothing of a masked patch reaches a visible one, and what follows (norms with their statistics, activations) sees
visible patches only; with nothing masked it is the plain convolution. The idea of masked dense convolution is SparK's
(arXiv 2301.03580).
Shapes: B images, N = grid² patches, K visible, s pixels the side of a patch at the present resolution, C channels.
"""

from torch import Tensor, nn

from mimir_fast.models.encoder import fill_in
from mimir_fast.ops.patches import gather_patches


def conv_over_grid(conv: nn.Conv2d, x_BKP: Tensor, places_BK: Tensor | None, grid: int) -> Tensor:
    """(B, K, s'·s'·C') of the visible patches, s' = s / stride, both in (row, column, channel) order.

    Args:
        x_BKP: (B, K, s·s·C).
        places_BK: where they belong; None when all N are there in raster order.
    """
    B, P = len(x_BKP), x_BKP.shape[-1]
    C = conv.in_channels
    s = round((P // C) ** 0.5)
    full = x_BKP if places_BK is None else fill_in(x_BKP, places_BK, x_BKP.new_zeros(P), grid**2)
    image_BHWC = full.reshape(B, grid, grid, s, s, C).transpose(2, 3).reshape(B, grid * s, grid * s, C)
    out_BHWC = conv(image_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # channels last in memory, all the way
    t = out_BHWC.shape[1] // grid
    rows = out_BHWC.reshape(B, grid, t, grid, t, -1).transpose(2, 3).reshape(B, grid**2, -1)
    return rows if places_BK is None else gather_patches(rows, places_BK)
