"""One signed-gradient step inside an L∞ ball: the FGSM/PGD update.

    x_adv ← clamp(x + clip(x_adv + alpha·sign(grad) − x, −eps, eps), low, high)

Element-wise, so it is the same in image space (B, C, H, W) and in patch space (B, K, P).
Source: Madry et al., arXiv 1706.06083, Eq. 2 and §2.1.
"""

import torch
from torch import Tensor


def linf_step_reference(
    x_adv: Tensor, grad: Tensor, x: Tensor, alpha: float, eps: float | Tensor, low: float = 0.0, high: float = 1.0
) -> Tensor:
    """The definition; every kernel is tested against it."""
    moved = x_adv + alpha * grad.sign()
    projected = torch.minimum(torch.maximum(moved, x - eps), x + eps)
    return projected.clamp(low, high)


def linf_step(
    x_adv: Tensor,
    grad: Tensor,
    x: Tensor,
    *,
    alpha: float,
    eps: float | Tensor,
    clamp: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """The next iterate of an L∞ attack.

    Args:
        x_adv: the current iterate, any shape, float.
        grad: gradient of the loss to be maximised, same shape.
        x: the clean input, same shape, in `clamp`.
        alpha: step size in units of x (8/255, not 8).
        eps: radius of the ball, 0 ≤ eps ≤ 1.
        clamp: range of the data.
    Returns:
        a new tensor of the same shape with ‖·−x‖∞ ≤ eps and values in `clamp`.
    """
    return linf_step_reference(x_adv, grad, x, alpha, eps, *clamp)
