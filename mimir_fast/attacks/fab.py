"""FAB, targeted: walks along the boundary between the true class and another one, towards the image.

    f(x) = z_t − z_y;   at each step the boundary is taken for the plane f(x) + ∇f·(x' − x) = 0
    x ← (1 − α)·(x + η·d(x)) + α·(x₀ + η·d(x₀)),   d: the smallest step onto the plane within [0, 1]
    α = min(‖d(x)‖ / (‖d(x)‖ + ‖d(x₀)‖), 0.1),  η = 1.05;  a misclassified x is drawn back: x ← x₀ + 0.9·(x − x₀)

Croce & Hein, arXiv 1907.02044, Algorithm 1 and Eq. 8; parameters of AutoAttack (arXiv 2003.01690). FAB looks for the
nearest misclassified point; here a row is broken, and leaves, at the first one within ε.

The smallest step onto a plane w·x' = b in the box moves pixels down the plane's side until they are at 0 or 1:

    L∞   d_i = −sign(w_i)·min(λ, room_i);    L2   d_i = −sign(w_i)·min(λ·|w_i|, room_i)

with the least λ whose |w|·|d| is the distance |w·x − b|. That is concave and piecewise linear in λ: Newton's iteration
from λ = 0 rises to it in a few passes, where the authors sort all pixels. Out of reach, all pixels move to the border.

Shapes: R rows, C channels, H × W pixels, D = C·H·W, K classes.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from mimir_fast.attacks.losses import targeted_margin
from mimir_fast.attacks.pgd import is_correct
from mimir_fast.attacks.rows import select_all

ALPHA_MAX, ETA, BETA = 0.1, 1.05, 0.9
NEWTON_STEPS = 40
"""At most; fewer than ten are usual."""


class FabRows:
    """A search of `num_steps` steps; see `rows.Rows`.

    Args:
        module: takes images in [0, 1], returns logits (R, K).
        images: (R, C, H, W) float in [0, 1].
        labels, targets: (R,) int64, true classes and those to reach.
    """

    def __init__(
        self, module: nn.Module, images: Tensor, labels: Tensor, targets: Tensor, eps: float, num_steps: int = 100,
        norm: Literal["linf", "l2"] = "linf",
    ) -> None:  # fmt: skip
        self.module, self.eps, self.norm, self.left = module, eps, norm, num_steps
        self.images, self.labels, self.targets, self.x = images, labels, targets, images

    def finished(self) -> bool:
        """Whether all steps are taken."""
        return self.left == 0

    def step(self) -> tuple[Tensor, Tensor]:
        """One step; broken is who is misclassified within ε."""
        self.left -= 1
        x, count = self.x.detach().requires_grad_(), len(self.x)
        with torch.enable_grad():
            ahead = targeted_margin(self.module(x), self.labels, self.targets)
            (grad,) = torch.autograd.grad(ahead.sum(), x)
        with torch.no_grad():
            x, w, start = self.x.flatten(1), grad.flatten(1), self.images.flatten(1)
            offset = (w * x).sum(1) - ahead.detach()
            both = to_plane(torch.cat([x, start]), torch.cat([w, w]), torch.cat([offset, offset]), self.norm)
            size = both.abs().amax(1) if self.norm == "linf" else both.norm(dim=1)
            size = size.clamp_min(1e-8)
            weight = (size[:count] / (size[:count] + size[count:])).clamp(0, ALPHA_MAX)[:, None]
            moved = (x + ETA * both[:count]) * (1 - weight) + (start + ETA * both[count:]) * weight
            x = moved.clamp(0, 1)
            point = x.view_as(self.images)
            wrong = ~is_correct(self.module(point), self.labels)
            delta = x - start
            distance = delta.abs().amax(1) if self.norm == "linf" else delta.norm(dim=1)
            self.x = torch.where(wrong[:, None], start + BETA * delta, x).view_as(self.images)
        return wrong & (distance <= self.eps), point

    def select(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        select_all(self, rows, "images", "labels", "targets", "x")


def to_plane(x: Tensor, w: Tensor, b: Tensor, norm: Literal["linf", "l2"]) -> Tensor:
    """(R, D): the smallest steps from x (R, D) in [0, 1] onto the planes w·x' = b, w (R, D), b (R,), within [0, 1]."""
    ahead = (w * x).sum(1) - b
    down = torch.where(ahead[:, None] >= 0, -w, w)  # the way to the plane
    room = torch.where(down > 0, 1 - x, x) * (w != 0)
    slope = w.abs()
    wanted = ahead.abs()[:, None]
    # In units of λ, a pixel's border is at `border`, and until then |w|·|d| grows by `rate` with λ.
    rate, border = (slope, room) if norm == "linf" else (slope * slope, room / slope.clamp_min(1e-30))
    full = slope * room
    step = torch.zeros_like(wanted)
    for _ in range(NEWTON_STEPS):
        free = border > step
        gain = (rate * free).sum(1, keepdim=True)
        missing = wanted - (full * ~free).sum(1, keepdim=True)
        # Out of reach no pixel is free in the end, and λ is past every border.
        after = torch.where(gain > 0, missing / gain, torch.full_like(step, torch.inf)).maximum(step)
        if x.device.type == "cpu" and bool((after == step).all()):
            break
        step = after
    moved = torch.minimum(step if norm == "linf" else (step * slope).nan_to_num(nan=0.0), room)
    return moved * down.sign()
