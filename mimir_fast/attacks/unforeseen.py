"""Attacks a defence against small pixel changes was not trained for: bending, turning, and changing JPEG coefficients.

    elastic     signed-gradient ascent of a coarse displacement field, smoothly enlarged, at most `pixels` long per axis
    turn        the worst of a grid of rotations and shifts (Engstrom et al., arXiv 1712.02779)
    jpeg        signed-gradient ascent of 8 × 8 cosine coefficients, each within `eps` times JPEG's quantisation step

After Kang et al., "Testing Robustness Against Unforeseen Adversaries", arXiv 1908.08016 (its JPEG and Elastic attacks).
Written anew and not calibrated against adversarially trained models as theirs are: compare models with each other by
these numbers, not with published UAR scores.

Shapes: B images, C channels, H × W pixels, G × G grid.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimir_fast.attacks.pgd import check_images, cross_entropy
from mimir_fast.layers.borrowing import borrowed
from mimir_fast.ops.random_uniform import random_uniform
from mimir_fast.philox import Stream

# Luminance table of the JPEG standard (ITU-T T.81, Table K.1), in grey levels.
QUANTISATION = (
    (16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55), (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62), (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99),
)  # fmt: skip


def warp(images: Tensor, flow: Tensor) -> Tensor:
    """Images (B, C, H, W) looked up at places moved by `flow` (B, 2, H, W), in pixels (x, y); edges repeat."""
    height, width = images.shape[-2:]
    lines = (torch.arange(side, device=images.device, dtype=images.dtype) for side in (height, width))
    y, x = torch.meshgrid(*lines, indexing="ij")
    grid = torch.stack([(2 * (x + flow[:, 0]) + 1) / width - 1, (2 * (y + flow[:, 1]) + 1) / height - 1], dim=-1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False).clamp(0, 1)


def elastic(
    model: nn.Module, images: Tensor, labels: Tensor, *, pixels: float, num_steps: int, samples: Tensor, seed: int,
    grid: int = 8,
) -> Tensor:  # fmt: skip
    """Bent images (B, C, H, W): no point is moved further than about `pixels` along either axis."""
    check_images(images, half=False)
    size = 2 * grid * grid
    draws = random_uniform(seed, Stream.ATTACK_START, 1 << 20, samples.to(images.device), size)
    coarse = ((2 * draws - 1) * pixels).view(-1, 2, grid, grid)

    def bent(field: Tensor) -> Tensor:
        flow = F.interpolate(field, size=images.shape[-2:], mode="bicubic", align_corners=False)
        return warp(images, flow.clamp(-pixels, pixels))

    with borrowed(model, "eval") as module:
        for _ in range(num_steps):
            coarse = coarse.detach().requires_grad_()
            with torch.enable_grad():
                loss = cross_entropy(module(bent(coarse)), labels).sum()
                (grad,) = torch.autograd.grad(loss, coarse)
            step = 2.5 * pixels / num_steps
            coarse = (coarse.detach() + step * grad.sign()).clamp(-pixels, pixels)
        return bent(coarse.detach()).detach()


def turn(
    model: nn.Module, images: Tensor, labels: Tensor, *, degrees: float, shift: float, num_angles: int = 7,
    num_shifts: int = 3,
) -> Tensor:  # fmt: skip
    """Turned and shifted images (B, C, H, W): of a grid of both, the one of highest loss for each image.

    Args:
        degrees: largest rotation either way.
        shift: largest shift along each axis, as a part of its length.
    """
    check_images(images, gradients=False)
    height, width = images.shape[-2:]
    best, highest = images, torch.full((len(images),), -torch.inf, device=images.device)
    lines = (torch.arange(side, device=images.device, dtype=images.dtype) - (side - 1) / 2 for side in (height, width))
    y, x = torch.meshgrid(*lines, indexing="ij")
    down, across = (torch.linspace(-shift * side, shift * side, num_shifts).tolist() for side in (height, width))
    with borrowed(model, "eval") as module, torch.no_grad():
        for angle in torch.linspace(-degrees, degrees, num_angles).tolist():
            c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            for dx in across:
                for dy in down:
                    flow = torch.stack([c * x - s * y - x + dx, s * x + c * y - y + dy])
                    moved = warp(images, flow.expand(len(images), -1, -1, -1))
                    loss = cross_entropy(module(moved), labels)
                    better = loss > highest
                    best = torch.where(better.view(-1, 1, 1, 1), moved, best)
                    highest = torch.where(better, loss, highest)
    return best


def _cosines(device: torch.device) -> Tensor:
    """(8, 8) orthonormal DCT-II matrix."""
    k, n = torch.arange(8.0, device=device)[:, None], torch.arange(8.0, device=device)[None]
    matrix = torch.cos(math.pi * (2 * n + 1) * k / 16) / 2
    matrix[0] /= math.sqrt(2)
    return matrix


def jpeg(
    model: nn.Module, images: Tensor, labels: Tensor, *, eps: float, num_steps: int, samples: Tensor, seed: int
) -> Tensor:
    """Images (B, C, H, W) whose 8 × 8 cosine coefficients moved by at most eps · quantisation step; padded to 8s."""
    check_images(images, half=False)
    batch, channels, height, width = images.shape
    down, across = -(-height // 8), -(-width // 8)
    table = torch.tensor(QUANTISATION, device=images.device, dtype=images.dtype) / 255
    cosines = _cosines(images.device).to(images.dtype)
    shape = (batch, channels, down, across, 8, 8)
    draws = random_uniform(seed, Stream.ATTACK_START, 2 << 20, samples.to(images.device), math.prod(shape[1:]))
    delta = (2 * draws - 1).view(shape) * eps

    def changed(d: Tensor) -> Tensor:
        spatial = cosines.T @ (d * table) @ cosines  # the transform is linear: the change is added in pixels
        whole = spatial.permute(0, 1, 2, 4, 3, 5).reshape(batch, channels, 8 * down, 8 * across)
        return (images + whole[..., :height, :width]).clamp(0, 1)

    with borrowed(model, "eval") as module:
        for _ in range(num_steps):
            delta = delta.detach().requires_grad_()
            with torch.enable_grad():
                (grad,) = torch.autograd.grad(cross_entropy(module(changed(delta)), labels).sum(), delta)
            delta = (delta.detach() + 2.5 * eps / num_steps * grad.sign()).clamp(-eps, eps)
        return changed(delta.detach()).detach()
