"""Signed-gradient ascent: the loop under every attack here but APGD.

    x ← Π( x + α·sign ∇ₓ Σᵢ objective(x)ᵢ ),   Π: onto the L∞ ball of radius ε around the clean input, and to [0, 1]

In pixels or in patches, on a loss, a distance or an information: the objective is a function of the input alone. Values
are summed, not averaged: only the sign of the gradient is used, and a mean over a large batch underflows in half
precision. Shapes: B samples, anything behind.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.ops.linf_step import linf_step

Objective = Callable[[Tensor], Tensor]
"""Inputs (B, …) → (B,) values, or their sum, to be maximised."""

BeforeStep = Callable[[int, Tensor], Tensor]
"""(step, input (B, …)) → the input the step starts from."""


def ascend(
    objective: Objective,
    clean: Tensor,
    start: Tensor,
    threat: LinfThreat,
    *,
    before_step: BeforeStep | None = None,
) -> Tensor:
    """The perturbed input (B, …), detached, within eps of `clean` and in [0, 1] up to rounding.

    Args:
        clean: (B, …) float in [0, 1], the centre of the ball.
        start: (B, …) inside the ball.
        threat: its eps, alpha and num_steps.
        before_step: changes the input ahead of each step (ARD + PRM erases part of the perturbation).
    """
    x = start.detach()
    ours: Tensor | None = None  # where steps are written: `start` is the caller's, and may be `clean` itself
    for step in range(threat.num_steps):
        if before_step is not None:
            x = before_step(step, x)
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(objective(x).sum(), x)
        x, ours = x.detach(), torch.empty_like(x) if ours is None else ours
        with torch.no_grad():
            x = linf_step(x, grad, clean, alpha=threat.alpha, eps=threat.eps, out=ours)
    return x
