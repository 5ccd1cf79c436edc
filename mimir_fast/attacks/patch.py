"""A square patch of any colours at a random place of each image: few pixels, changed as far as they go.

Brown et al., arXiv 1712.09665, in the form of one patch an image, optimised for it (as the patch attacks of Rao et al.,
arXiv 2005.02313). Signed-gradient ascent of the margin; of several places the first that breaks the image is kept.

Shapes: B images, C channels, H × W pixels, S pixels the patch's side.
"""

import torch
from torch import Tensor, nn

from mimir_fast.attacks.losses import margin
from mimir_fast.attacks.pgd import check_images, samples_of
from mimir_fast.attacks.until_broken import until_broken
from mimir_fast.ops.random_uniform import random_uniform
from mimir_fast.philox import Stream

_STEP = 6 << 20  # of the random numbers: apart from those of other attacks


def patch_masks(images: Tensor, side: int, samples: Tensor, seed: int, places: Tensor) -> Tensor:
    """(B, 1, H, W) bool: a square of `side` pixels, at an equally likely place within each image (B, C, H, W).

    Args:
        places: (B,) int64 numbers of the places.
    """
    height, width = images.shape[-2:]
    draws = random_uniform(seed, Stream.ATTACK_START, _STEP + 2 * places, samples, 2)
    corners = (draws * torch.tensor([height - side + 1, width - side + 1], device=images.device)).long()
    y, x = (torch.arange(length, device=images.device) for length in (height, width))
    top, left = corners[:, :1], corners[:, 1:]
    rows, columns = (y >= top) & (y < top + side), (x >= left) & (x < left + side)
    return rows[:, None, :, None] & columns[:, None, None, :]


def patch(
    model: nn.Module, images: Tensor, labels: Tensor, *, side: int, num_steps: int, places: int = 1,
    samples: Tensor | None = None, seed: int = 0,
) -> Tensor:  # fmt: skip
    """Images (B, C, H, W) that differ from the clean ones within one square, and lie in [0, 1].

    Args:
        side: of the square, in pixels.
        num_steps: gradient steps at each place.
        places: random ones, one after the other, until the image is misclassified.
        samples, seed: coordinates of places and starts, see `pgd`.
    Raises:
        ValueError: the square does not fit into the images, or has no pixel.
    """
    check_images(images, half=False)
    if not 1 <= side <= min(images.shape[-2:]):
        raise ValueError(f"a patch of {side} pixels does not fit into images of {tuple(images.shape[-2:])}")
    known = samples_of(images, samples)

    def attempt(module: nn.Module, at: Tensor, numbers: Tensor) -> Tensor:
        clean, mask = images[at], patch_masks(images[at], side, known[at], seed, numbers)
        size = images[0].numel()
        content = random_uniform(seed, Stream.ATTACK_START, _STEP + 2 * numbers + 1, known[at], size).view_as(clean)
        for _ in range(num_steps):
            content = content.detach().requires_grad_()
            with torch.enable_grad():
                loss = margin(module(torch.where(mask, content, clean)), labels[at]).sum()
                (grad,) = torch.autograd.grad(loss, content)
            content = (content.detach() + 2.5 / num_steps * grad.sign()).clamp(0, 1)
        return torch.where(mask, content.detach(), clean)

    return until_broken(model, images, labels, attempt, places, rows=len(images))
