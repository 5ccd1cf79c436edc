"""ReColor: one smooth change of colours for a whole image, whatever is at its pixels.

    x'(p) = x(p) + f(x(p)),   f: a lattice of colour changes, interpolated linearly,  |f| ≤ `change` in every channel

Laidlaw & Feizi, "Functional Adversarial Attacks", arXiv 1906.00001, §3.2, in RGB and without their term for smoothness:
the lattice has G points along each channel, few enough that neighbouring colours move together. Grey images have a
curve of G points. Signed-gradient ascent of the lattice. Not a perturbation within any small ball.

Shapes: B images, C channels (1 or 3), H × W pixels, G points a channel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimir_fast.attacks.losses import margin
from mimir_fast.attacks.pgd import check_images, samples_of
from mimir_fast.layers.borrowing import borrowed
from mimir_fast.ops.random_uniform import random_uniform
from mimir_fast.philox import Stream

_STEP = 5 << 20  # of the random numbers: apart from those of other attacks


def recolored(images: Tensor, lattice: Tensor) -> Tensor:
    """Images (B, C, H, W), changed by a lattice (B, C, G) of grey values or (B, C, G, G, G) of colours."""
    if images.shape[1] == 1:  # a lattice one point high
        lattice = lattice[:, :, None, :]
        place = torch.stack([2 * images[:, 0] - 1, torch.zeros_like(images[:, 0])], dim=-1)
        change = F.grid_sample(lattice, place, align_corners=True, padding_mode="border")
    else:
        place = (2 * images - 1).permute(0, 2, 3, 1).flip(-1)[:, None]  # grid_sample counts the last axis first
        change = F.grid_sample(lattice, place, align_corners=True, padding_mode="border")[:, :, 0]
    return (images + change).clamp(0, 1)


def recolor(
    model: nn.Module, images: Tensor, labels: Tensor, *, change: float, num_steps: int, points: int = 8,
    samples: Tensor | None = None, seed: int = 0,
) -> Tensor:  # fmt: skip
    """Recoloured images (B, C, H, W): no colour moves further than `change` in a channel.

    Args:
        change: in units of [0, 1]; the paper takes 0.06.
        points: G.
        samples, seed: coordinates of the random start, see `pgd`.
    Raises:
        ValueError: neither 1 nor 3 channels.
    """
    check_images(images, half=False)
    channels = images.shape[1]
    if channels not in (1, 3):
        raise ValueError(f"recolor knows images of 1 or 3 channels, got {channels}")
    samples = samples_of(images, samples)
    shape = (len(images), channels, *[points] * channels)
    draws = random_uniform(seed, Stream.ATTACK_START, _STEP, samples, channels * points**channels)
    lattice = change * (2 * draws - 1).view(shape).to(images.dtype)
    with borrowed(model, "eval") as module:
        for _ in range(num_steps):
            lattice = lattice.detach().requires_grad_()
            with torch.enable_grad():
                loss = margin(module(recolored(images, lattice)), labels).sum()
                (grad,) = torch.autograd.grad(loss, lattice)
            lattice = (lattice.detach() + 2.5 * change / num_steps * grad.sign()).clamp(-change, change)
        return recolored(images, lattice.detach()).detach()
