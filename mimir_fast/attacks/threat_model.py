"""What the adversary may do: an L∞ ball of radius eps around images in [0, 1]."""

import math
from dataclasses import dataclass

from mimir_fast.validation import check_number, without

SINGLE_STEP = 1.25
"""Of a single step from a random start, in units of eps: FastAT's (Wong et al., arXiv 2001.03994)."""


def check_radius(name: str, value: float) -> None:
    """Raises ValueError unless `value` lies in [0, 1], as images do; 8 is taken for 8/255."""
    hint = f"images live in [0, 1] and {name} with them"
    if isinstance(value, (int, float)) and 1 < value < math.inf:
        hint += f"; {value:g} looks like {value:g}/255: type {value:g}/255"
    check_number(name, value, at_least=0, at_most=1, hint=hint)


@dataclass
class LinfThreat:
    """Radius, step size and number of steps of an L∞ attack."""

    eps: float = 8 / 255
    """Radius of the ball, in units of images in [0, 1]: 8/255, not 8."""
    alpha: float = 10 / 255
    """Step size, same units."""
    num_steps: int = 1
    """Signed-gradient steps."""
    random_start: bool = True
    """Start uniformly in the ball (otherwise at the clean image)."""

    def __post_init__(self) -> None:
        check_radius("eps", self.eps)
        check_radius("alpha", self.alpha)
        check_number("num_steps", self.num_steps, at_least=0)

    def idle(self) -> dict[str, str]:
        """Options that do nothing as the others are."""
        return without(self.num_steps, "--{}num_steps is 0", "alpha")
