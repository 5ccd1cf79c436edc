"""The ends of an L∞ ball as numbers of x's dtype: `x + eps` rounds, and may land outside; `ball_bounds` do not."""

import torch
from torch import Tensor


def ball_of(x: Tensor, eps: float | Tensor) -> tuple[Tensor, Tensor]:
    """x ± eps as the kernels have it: in 16 bits, where a rounding is up to half a grey level, rounded towards x."""
    return ball_bounds(x, eps, exact=torch.float32) if x.element_size() == 2 else (x - eps, x + eps)


def within(y: Tensor, x: Tensor, eps: float | Tensor, low: float, high: float) -> Tensor:
    """y cut to the range [low, high] and then to the ball around x.

    Both contain x, so that their order would not matter. The ball comes last because of an x that is outside of the
    range: it moves by eps at most, even where nobody looks at it.
    """
    lower, upper = ball_of(x, eps)
    return torch.minimum(torch.maximum(y.clamp(low, high), lower), upper)


def ball_bounds(x: Tensor, eps: float | Tensor, *, exact: torch.dtype) -> tuple[Tensor, Tensor]:
    """The smallest and the largest numbers of x's dtype in [x − eps, x + eps]; their slope in x is 1.

    Args:
        x: any shape, float.
        eps: radius, or a tensor of radii that broadcasts against x.
        exact: the dtype in which x ± eps is taken: one with about twice the digits of x's.
    Returns:
        two tensors of x's shape and dtype.
    """
    wide = x.to(exact)
    return -_not_above(eps - wide, x.dtype), _not_above(wide + eps, x.dtype)


def _not_above(value: Tensor, dtype: torch.dtype) -> Tensor:
    nearest = value.to(dtype)
    # Between half a unit in the last place and a whole one: the number below, whatever the exponent.
    facts = torch.finfo(dtype)
    below = (value - value.detach().abs().clamp_min(facts.tiny) * (facts.eps / 2)).to(dtype)
    return torch.where(nearest.to(value.dtype) > value, below, nearest)
