"""The loss around the weights, L(θ + a·θ₁ + b·θ₂), along two random filter-normalised directions.

Each filter (row) of a direction is scaled to the norm of the same filter of θ; biases and norm weights do not move, so
the picture does not depend on how the weights happen to be scaled (Li et al., arXiv 1712.09913, §4).
The model is never changed: each point is a functional call with other weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mimir_fast.attacks.modes import borrowed_in_mode
from mimir_fast.attacks.pgd import cross_entropy
from mimir_fast.philox import Stream, normal

Weights = dict[str, Tensor]


@dataclass
class LossSurface:
    """Mean losses on a grid.

    Attributes:
        steps: (G,) values of a and of b.
        loss: (G, G) mean cross entropy, `loss[i, j]` at a = steps[i], b = steps[j].
    """

    steps: Tensor
    loss: Tensor


def filter_normalized_direction(model: nn.Module, seed: int, which: int) -> Weights:
    """A random direction in weight space, fp32, on the parameters' device.

    Args:
        which: number of the direction.
    """
    direction: Weights = {}
    for index, (name, weight) in enumerate(model.named_parameters()):
        if weight.ndim < 2:
            continue
        rows = weight.detach().flatten(1).float()
        filters = torch.arange(len(rows), device=weight.device)
        noise = normal(seed, Stream.EVALUATION, 65536 * which + index, filters, rows.shape[1])
        scale = rows.norm(dim=1, keepdim=True) / (noise.norm(dim=1, keepdim=True) + 1e-10)
        direction[name] = (noise * scale).view_as(weight)
    return direction


def loss_surface(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    radius: float = 1.0,
    num_points: int = 11,
    seed: int = 0,
) -> LossSurface:
    """The grid around the model's weights.

    Args:
        images: (B, C, H, W) float in [0, 1]: clean or adversarial ones, fixed for all points.
        radius: largest |a| and |b|; at 1 a direction is as long as the weights.
        num_points: G, odd so that the weights themselves are on the grid.
    Raises:
        ValueError: an even or too small grid, or a model whose weights cannot be replaced.
    """
    if num_points < 3 or num_points % 2 == 0:
        raise ValueError(f"num_points={num_points}, wanted an odd number of at least 3, such as 11")
    steps = torch.linspace(-radius, radius, num_points)
    losses = torch.zeros(num_points, num_points)
    with borrowed_in_mode(model, "eval") as module, torch.no_grad():
        first, second = (filter_normalized_direction(module, seed, which) for which in (0, 1))
        if not first:
            raise ValueError(f"{type(module).__name__} has no weight matrices to move: no loss surface of it")
        weights = {name: p for name, p in module.named_parameters() if name in first}
        for i, a in enumerate(steps.tolist()):
            for j, b in enumerate(steps.tolist()):
                moved = {name: w + (a * first[name] + b * second[name]).to(w.dtype) for name, w in weights.items()}
                logits = functional_call(module, moved, (images,))
                losses[i, j] = cross_entropy(logits, labels).mean()
    return LossSurface(steps, losses)
