"""The numbers of a dtype within eps of x. `x + eps` rounds, and may land outside of the ball; these bounds do not."""

import torch
from torch import Tensor


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
