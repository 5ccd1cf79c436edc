"""The loss around the weights, and around the images.

    L(θ + a·θ₁ + b·θ₂)   two random filter-normalised directions: each filter (row) of a direction has the norm of the
                         same filter of θ, so the picture does not depend on how the weights happen to be scaled. What
                         has one dimension (biases, gains of norms) stays still or moves along itself; see `biases`.
                         Li et al., arXiv 1712.09913, §4, and their code's `--xignore biasbn`.
    L(x + a·g + b·r)     g the signs of the gradient at x, r random signs: a plane every attack in the ball starts in. A
                         surface that is flat along g and rough along r has a gradient that leads nowhere, which the
                         weights' surface cannot show.

The model is never changed: each point is a functional call with other weights. Losses are per image, (B, G, G).
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mimir_fast.attacks.pgd import cross_entropy
from mimir_fast.layers.borrowing import borrowed
from mimir_fast.ops.random_uniform import random_uniform
from mimir_fast.philox import Stream, normal

Weights = dict[str, Tensor]
Biases = Literal["still", "copied"]


def filter_normalized_direction(model: nn.Module, seed: int, which: int, biases: Biases = "still") -> Weights:
    """A random direction in weight space, fp32, on the parameters' device.

    Args:
        which: number of the direction.
        biases: parameters of one dimension stay still (Li et al.'s `biasbn`, as in their figures), or the direction is
            the parameter itself (their code without that option).
    """
    direction: Weights = {}
    for index, (name, weight) in enumerate(model.named_parameters()):
        if weight.ndim < 2:
            if biases == "copied":
                direction[name] = weight.detach().float()
            continue
        rows = weight.detach().flatten(1).float()
        filters = torch.arange(len(rows), device=weight.device)
        noise = normal(seed, Stream.EVALUATION, 65536 * which + index, filters, rows.shape[1])
        scale = rows.norm(dim=1, keepdim=True) / (noise.norm(dim=1, keepdim=True) + 1e-10)
        direction[name] = (noise * scale).view_as(weight)
    return direction


def grid_steps(radius: float, num_points: int) -> Tensor:
    """(G,) values of a and of b, the middle one zero.

    Raises:
        ValueError: an even or too small grid.
    """
    if num_points < 3 or num_points % 2 == 0:
        raise ValueError(f"num_points={num_points}, wanted an odd number of at least 3, such as 11")
    return torch.linspace(-radius, radius, num_points)


def weight_surface(
    model: nn.Module, images: Tensor, labels: Tensor, *, radius: float = 1.0, num_points: int = 11, seed: int = 0,
    biases: Biases = "still",
) -> Tensor:  # fmt: skip
    """(B, G, G) cross entropy around the model's weights, [:, i, j] at a = steps[i], b = steps[j].

    Args:
        images: (B, C, H, W) float in [0, 1]: clean or adversarial ones, fixed for all points.
        radius: largest |a| and |b|; at 1 a direction is as long as the weights.
        num_points: G, odd so that the weights themselves are on the grid.
    Raises:
        ValueError: an even or too small grid, or a model without weight matrices.
    """
    steps = grid_steps(radius, num_points).tolist()
    losses = torch.zeros(len(images), num_points, num_points)
    with borrowed(model, "eval") as module, torch.no_grad():
        first, second = (filter_normalized_direction(module, seed, which, biases) for which in (0, 1))
        weights = {name: p for name, p in module.named_parameters() if name in first}
        if not any(w.ndim > 1 for w in weights.values()):
            raise ValueError(f"{type(module).__name__} has no weight matrices to move: no loss surface of it")
        for i, a in enumerate(steps):
            for j, b in enumerate(steps):
                moved = {name: w + (a * first[name] + b * second[name]).to(w.dtype) for name, w in weights.items()}
                losses[:, i, j] = cross_entropy(functional_call(module, moved, (images,)), labels).cpu()
    return losses


def input_surface(
    model: nn.Module, images: Tensor, labels: Tensor, samples: Tensor, *, radius: float, num_points: int = 11,
    seed: int = 0,
) -> Tensor:  # fmt: skip
    """(B, G, G) cross entropy around each image, [:, i, j] at a = steps[i] along the gradient's signs, b = steps[j].

    Args:
        radius: largest |a| and |b| in units of images in [0, 1]; images are cut to [0, 1].
        samples: (B,) int64, the coordinates of the random signs.
    """
    steps = grid_steps(radius, num_points).tolist()
    losses = torch.zeros(len(images), num_points, num_points)
    with borrowed(model, "eval") as module:
        x = images.detach().clone().requires_grad_()
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(cross_entropy(module(x), labels).sum(), x)
        draws = random_uniform(seed, Stream.EVALUATION, 1 << 24, samples.to(images.device), images[0].numel())
        along, across = grad.sign(), (draws - 0.5).sign().view_as(images)
        with torch.no_grad():
            for i, a in enumerate(steps):
                for j, b in enumerate(steps):
                    moved = (images + a * along + b * across).clamp(0, 1)
                    losses[:, i, j] = cross_entropy(module(moved), labels).cpu()
    return losses
