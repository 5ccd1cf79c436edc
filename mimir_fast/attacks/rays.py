"""RayS: an L∞ attack that sees the predicted class and nothing else, and searches among the corners of the ball.

    direction d ∈ {−1, 1}^D; distance r: the least for which x + r·d is misclassified, by bisection
    flip the signs of one block of d after the other, of halves, quarters, … of the pixels in their order; where the
    image is misclassified at a distance below r, keep the flip and bisect again

Chen & Gu, arXiv 2006.12792, Algorithms 1 to 3. Nothing is estimated and nothing is drawn, so a model that rounds its
images is no harder than another. An image is left alone once its r lies within the ball.

Shapes: B images, C channels, H × W pixels, D = C·H·W.
"""

import torch
from torch import Tensor, nn

from mimir_fast.attacks.pgd import check_images, image_bounds, is_correct
from mimir_fast.layers.borrowing import borrowed

BISECTIONS = 10
CLOSER = 1e-3
"""A flip is kept only where it brings the border nearer by this part."""


@torch.no_grad()
def rays(model: nn.Module, images: Tensor, labels: Tensor, eps: float, *, queries: int = 1000) -> Tensor:
    """Images (B, C, H, W) within eps, in L∞, and in [0, 1]: misclassified where a corner so near was found.

    Args:
        model: takes images in [0, 1], returns logits (B, K), of which only the largest's place is used; left untouched.
        eps: radius in units of [0, 1].
        queries: images that may be shown to the model for each image.
    Raises:
        ValueError: images are not float (B, C, H, W) in [0, 1].
    """
    check_images(images, gradients=False, half=False)
    size = images[0].numel() if len(images) else 1
    signs, column = torch.ones_like(images).flatten(1), (-1, 1)
    distances = torch.ones(len(images), device=images.device)  # across [0, 1]: black and white
    asked, inside = torch.zeros_like(distances), eps * (1 - 1e-6)
    with borrowed(model, "eval") as module:

        def wrong(rows: Tensor, radius: Tensor, directions: Tensor) -> Tensor:
            x = (images[rows].flatten(1) + radius.view(column) * directions).clamp(0, 1)
            asked[rows] += 1
            return ~is_correct(module(x.view_as(images[rows])), labels[rows])

        def shorten(rows: Tensor, directions: Tensor) -> None:
            """Take these directions, at the least distance at which they lead over the border."""
            near, far = torch.zeros_like(distances[rows]), distances[rows]
            for _ in range(BISECTIONS):
                middle = (near + far) / 2
                over = wrong(rows, middle, directions)
                near, far = torch.where(over, near, middle), torch.where(over, middle, far)
            signs[rows], distances[rows] = directions, far

        level, block, known = 0, 0, torch.zeros(len(images), dtype=torch.bool, device=images.device)
        while True:
            rows = ((asked < queries) & ~(known & (distances <= inside))).nonzero()[:, 0]
            if len(rows) == 0:
                break
            length = -(-size // 2**level)
            directions = signs[rows].clone()
            directions[:, block * length : (block + 1) * length] *= -1
            # Nearer than now, or, where no border is known, anywhere.
            radius = torch.where(known[rows], (1 - CLOSER) * distances[rows], distances[rows])
            over = wrong(rows, radius, directions)
            if bool(over.any()):
                known[rows[over]] = True
                shorten(rows[over], directions[over])
            block += 1
            if block * length >= size:
                level, block = (level + 1 if length > 1 else 0), 0
        x = images + (torch.where(known, distances, 0).view(column) * signs).view_as(images)
        return x.clamp(*image_bounds(images, eps))
