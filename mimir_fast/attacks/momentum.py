"""Images made on other models: MI-FGSM on an ensemble, and PGN, which looks for flat regions that models share.

    MI-FGSM   g ← μ·g + ∇L / ‖∇L‖₁,   x ← Π( x + α·sign g )          Dong et al., arXiv 1710.06081, Algorithms 1 and 2
    PGN       ∇L is the mean, over N random neighbours x' of x, of  (1 − δ)·∇L(x') + δ·∇L(x' − α·∇L(x')/‖∇L(x')‖₁)
                                                                     Ge et al., arXiv 2306.05225, Algorithm 1

L is the cross entropy of the models' mean logits; of many models, such as LGV's, each gradient is of the next few. In
L2 and L1 balls the step is the steepest one along g.

Shapes: B images, C channels, H × W pixels, K classes.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import cycle, islice

import torch
from torch import Tensor, nn

from mimir_fast.attacks.lgv import visits
from mimir_fast.attacks.lp import Threat, project, steepest
from mimir_fast.attacks.pgd import check_images, cross_entropy, image_bounds, samples_of
from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.layers.borrowing import borrowed
from mimir_fast.ops.random_uniform import random_uniform
from mimir_fast.philox import Stream

_STEP = 4 << 20  # of the random numbers: apart from those of other attacks


def momentum_ensemble(
    models: Sequence[nn.Module], images: Tensor, labels: Tensor, threat: Threat, *, decay: float = 1.0,
    together: int | None = None, neighbours: int = 0, reach: float = 3.0, balance: float = 0.5,
    samples: Tensor | None = None, seed: int = 0,
) -> Tensor:  # fmt: skip
    """Images (B, C, H, W) in the threat's ball that the models together misclassify; another one may, too.

    Args:
        models: one or more that take images in [0, 1] and return logits of the same classes; left untouched.
        threat: eps, alpha and num_steps; the start is the clean image.
        decay: μ; 0 forgets, which is I-FGSM.
        together: models of a gradient, the next ones in the order of `lgv.visits`; None: all of them. LGV takes one.
        neighbours: N of PGN; 0 for MI-FGSM.
        reach: PGN's neighbours differ from x by up to `reach`·eps a pixel; L2 and L1: by as much on average.
        balance: PGN's δ.
        samples, seed: coordinates of the random neighbours, see `pgd`; the seed is that of the order, too.
    Raises:
        ValueError: no models, or images are not float (B, C, H, W) in [0, 1].
    """
    check_images(images)
    if not models:
        raise ValueError("momentum_ensemble needs a model to attack")
    samples = samples_of(images, samples)
    images, column = images.detach(), (-1, 1, 1, 1)
    wide = reach * _a_pixel(threat, images[0].numel() if len(images) else 1)
    with ExitStack() as stack:
        modules = [stack.enter_context(borrowed(model, "eval")) for model in models]
        few = len(models) if together is None else min(together, len(models))
        order = visits(len(models), seed) if few < len(models) else range(len(models))
        turns = cycle([modules[number] for number in order])

        def slope(x: Tensor) -> Tensor:
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                logits = torch.stack([module(x).float() for module in islice(turns, few)]).mean(dim=0)
                (grad,) = torch.autograd.grad(cross_entropy(logits, labels).sum(), x)
            return grad

        def scaled(grad: Tensor) -> Tensor:
            return grad / grad.flatten(1).abs().sum(dim=1).clamp_min(1e-12).view(column)

        x, velocity = images, torch.zeros_like(images)
        low, high = image_bounds(images, threat.eps) if isinstance(threat, LinfThreat) else (images, images)
        for step in range(threat.num_steps):
            if neighbours:
                grad = torch.zeros_like(x)
                for number in range(neighbours):
                    at = _STEP + step * neighbours + number
                    noise = 2 * random_uniform(seed, Stream.ATTACK_START, at, samples, x[0].numel()) - 1
                    near = x + wide * noise.view_as(x)
                    first = slope(near)
                    second = slope(near - threat.alpha * scaled(first))
                    grad += (1 - balance) * first + balance * second
            else:
                grad = slope(x)
            velocity = decay * velocity + scaled(grad)
            if isinstance(threat, LinfThreat):
                x = (x + threat.alpha * velocity.sign()).clamp(low, high)
            else:
                x = project(x + steepest(velocity, x, threat.alpha, threat.norm), images, threat.eps, threat.norm)
        return x.detach()


def _a_pixel(threat: Threat, size: int) -> float:
    """Radius of the ball as a change of every pixel."""
    if isinstance(threat, LinfThreat):
        return threat.eps
    return threat.eps / (size**0.5 if threat.norm == "l2" else size)
