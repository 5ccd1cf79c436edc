"""What may happen to a residual branch in training: stochastic depth scales it, ARD gates its gradients.

Nothing random is drawn in a model: factors and gates are arguments of a forward pass, so a forward without them is
deterministic, as an attack wants it. R is the number of branches of a layer: attention and MLP in most families.
Shapes: B images, L layers, R branches a layer.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mimir_fast.ops.random_uniform import random_uniform
from mimir_fast.philox import Stream

DropPathLaw = Literal["linear", "constant"]


class LayerBranches(NamedTuple):
    """Of one layer: factors (B, R) or None, gates (B, R) or None."""

    scale: Tensor | None
    gate: Tensor | None


class Branches(NamedTuple):
    """Of all layers.

    Attributes:
        scales: (B, L, R) factors of the branches (stochastic depth), or None.
        gates: (B, L, R) 1 or 0: whether gradients flow back through the branch, whose value stays (ARD); or None.
        keep_rate: part of the patch tokens that each layer lets through (AGAT); 1 drops none.
    """

    scales: Tensor | None = None
    gates: Tensor | None = None
    keep_rate: float = 1.0

    def of_layer(self, layer: int) -> LayerBranches:
        """The rows of one layer."""
        return LayerBranches(*(None if t is None else t[:, layer] for t in (self.scales, self.gates)))


def shape_branch(branch: Tensor, of: LayerBranches | None, which: int) -> Tensor:
    """The branch (B, …) as it enters the residual sum."""
    if of is None:
        return branch
    column = (-1, *[1] * (branch.ndim - 1))
    if of.gate is not None:
        branch = torch.where(of.gate[:, which].view(column).bool(), branch, branch.detach())
    if of.scale is not None:
        branch = branch * of.scale[:, which].view(column).to(branch.dtype)
    return branch


def draw_drop_path(
    rate: float, num_layers: int, num_branches: int, samples_B: Tensor, *, seed: int, step: int,
    law: DropPathLaw = "linear",
) -> Tensor | None:  # fmt: skip
    """(B, L, R) float32 factors of the residual branches of one training step; None where nothing can be dropped.

    A branch of layer l is 0 with probability rate·l/(L−1), or rate by the constant law, else 1/(1 − that), so its mean
    is unchanged (stochastic depth: Huang et al., arXiv 1603.09382). Functions of (seed, step, sample), like all
    randomness here.
    """
    if rate == 0:
        return None
    first = 0 if law == "linear" else rate
    rates_L = torch.linspace(first, rate, num_layers, device=samples_B.device).view(1, num_layers, 1)
    draws = random_uniform(seed, Stream.DROP_PATH, step, samples_B, num_layers * num_branches)
    return (draws.view(len(samples_B), num_layers, num_branches) >= rates_L) / (1 - rates_L)
