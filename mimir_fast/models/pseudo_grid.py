"""Where the MIMIR authors' ConViT and XCiT assume the kept patches to lie: on a square grid of their own."""

import math


def pseudo_grid(num_tokens: int, grid: int) -> int:
    """Its side: √num_tokens.

    Args:
        grid: of the whole image, for the message.
    Raises:
        ValueError: the tokens form no square.
    """
    side = math.isqrt(num_tokens)
    if side**2 != num_tokens:
        raise ValueError(
            f"positions=official puts the kept patches on a square grid, and {num_tokens} of {grid**2} form none: use "
            "--model.positions true, or keep a square number of patches (an even grid and mask_ratio 0.75 do)"
        )
    return side
