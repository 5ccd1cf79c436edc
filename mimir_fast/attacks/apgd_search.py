"""The loop of Auto-PGD, in a ball that knows how to step and to project; `apgd.py` has the formulas and the source.

Shapes: B images, C channels, H × W pixels, K classes.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mimir_fast.attacks.losses import loss_of_rows
from mimir_fast.attacks.lp import project, steepest
from mimir_fast.attacks.pgd import Loss, image_bounds, is_correct

MOMENTUM = 0.75
RHO = 0.75
Keep = Literal["best_loss", "adversarial", "first"]


class LinfBall:
    """Signed steps, and the box around the images that is the ball."""

    def __init__(self, images: Tensor, eps: float, bounds: tuple[Tensor, Tensor] | None = None) -> None:
        self.eps, self.images = eps, images
        self.low, self.high = image_bounds(images, eps) if bounds is None else bounds

    def step(self, x: Tensor, grad: Tensor, eta: Tensor) -> Tensor:
        """x, moved by η up the gradient; it may leave the ball."""
        return x + eta * grad.sign()

    def project(self, x: Tensor) -> Tensor:
        """The nearest point of the ball."""
        return x.clamp(self.low, self.high)

    def take(self, rows: Tensor) -> "LinfBall":
        """The balls of some images."""
        return LinfBall(self.images[rows], self.eps, (self.low[rows], self.high[rows]))


class L2Ball:
    """Steps of length η."""

    def __init__(self, images: Tensor, eps: float) -> None:
        self.eps, self.images = eps, images

    def step(self, x: Tensor, grad: Tensor, eta: Tensor) -> Tensor:
        """x, moved by η up the gradient; it may leave the ball."""
        return x + eta * steepest(grad, x, 1.0, "l2")

    def project(self, x: Tensor) -> Tensor:
        """The nearest point of the ball."""
        return project(x, self.images, self.eps, "l2")

    def take(self, rows: Tensor) -> "L2Ball":
        """The balls of some images."""
        return L2Ball(self.images[rows], self.eps)


Ball = LinfBall | L2Ball


@dataclass
class Schedule:
    """When progress is judged: after 22 % of the steps, then at intervals shorter by 3 % each, but 6 % at least."""

    interval: int
    decrease: int
    smallest: int

    @classmethod
    def of(cls, num_steps: int) -> "Schedule":
        """The authors' rounding: each number is cut to an integer, and 1 at least."""
        return cls(max(int(0.22 * num_steps), 1), max(int(0.03 * num_steps), 1), max(int(0.06 * num_steps), 1))

    def shorten(self) -> None:
        """Make the next interval shorter."""
        self.interval = max(self.interval - self.decrease, self.smallest)


@dataclass
class _Rows:
    """The state of the images that are still attacked, one row each.

    Attributes:
        place: among all images.
        value_before: the loss one step ago; the authors' record of losses starts with the first step, from 0.
        fooled, found: the last misclassified point, and whether there was one.
    """

    place: Tensor
    labels: Tensor
    x: Tensor
    x_before: Tensor
    grad: Tensor
    best: Tensor
    best_grad: Tensor
    best_value: Tensor
    best_at_check: Tensor
    was_halved: Tensor
    value_before: Tensor
    rises: Tensor
    eta: Tensor
    fooled: Tensor
    found: Tensor

    def take(self, rows: Tensor) -> "_Rows":
        """Some of them."""
        return _Rows(*(getattr(self, known.name)[rows] for known in fields(self)))


def search(
    module: nn.Module, labels: Tensor, start: Tensor, ball: Ball, num_steps: int, loss: Loss, keep: Keep
) -> Tensor:
    """The point (B, C, H, W) that is kept of each image after `num_steps` steps; the arguments are those of `apgd`."""
    column = (-1, 1, 1, 1)
    value, grad, wrong = _evaluate(module, start, labels, loss, gradient=True)
    zeros, yes = torch.zeros_like(value), torch.ones_like(value, dtype=torch.bool)
    eta = torch.full((len(start), 1, 1, 1), 2 * ball.eps, device=start.device, dtype=start.dtype)
    rows = _Rows(
        torch.arange(len(start), device=start.device), labels, start, start, grad, start, grad, value, value, yes,
        zeros, zeros, eta, start, wrong,
    )  # fmt: skip
    result, schedule, since_check = torch.empty_like(start), Schedule.of(num_steps), 0
    for i in range(num_steps):
        if keep == "first" and bool(rows.found.any()):
            result[rows.place[rows.found]] = rows.fooled[rows.found]
            left = ~rows.found
            rows, loss, ball = rows.take(left), loss_of_rows(loss, left), ball.take(left)
            if len(rows.place) == 0:
                return result
        momentum = MOMENTUM if i > 0 else 1.0
        x = rows.x
        z = ball.project(ball.step(x, rows.grad, rows.eta))
        rows.x, rows.x_before = ball.project(x + momentum * (z - x) + (1 - momentum) * (x - rows.x_before)), x

        # The last point is only looked at: nobody will step from it.
        value, rows.grad, wrong = _evaluate(module, rows.x, rows.labels, loss, gradient=i + 1 < num_steps)
        rows.fooled = torch.where(wrong.view(column), rows.x, rows.fooled)
        rows.found = rows.found | wrong
        better = value > rows.best_value
        rows.best = torch.where(better.view(column), rows.x, rows.best)
        rows.best_grad = torch.where(better.view(column), rows.grad, rows.best_grad)
        rows.best_value = torch.where(better, value, rows.best_value)
        rows.rises = rows.rises + (value > rows.value_before)
        rows.value_before = value

        since_check += 1
        if since_check == schedule.interval:
            _look_back(rows, since_check)
            since_check = 0
            schedule.shorten()
    if keep == "best_loss":
        return rows.best
    result[rows.place] = torch.where(rows.found.view(column), rows.fooled, rows.best)
    return result


def _look_back(rows: _Rows, steps: int) -> None:
    """Halve the steps of the images that make no progress, and put these back to their best point."""
    oscillates = rows.rises <= RHO * steps
    stuck = ~rows.was_halved & (rows.best_at_check >= rows.best_value)
    halve = oscillates | stuck
    column = halve.view(-1, 1, 1, 1)
    rows.eta = torch.where(column, rows.eta / 2, rows.eta)
    rows.x = torch.where(column, rows.best, rows.x)
    rows.grad = torch.where(column, rows.best_grad, rows.grad)
    rows.was_halved, rows.best_at_check = halve, rows.best_value
    rows.rises = torch.zeros_like(rows.rises)


def _evaluate(module: nn.Module, x: Tensor, labels: Tensor, loss: Loss, *, gradient: bool) -> tuple[Any, Any, Any]:
    """(loss (B,), its gradient to x or zeros, misclassified (B,) bool) at x."""
    x = x.detach().requires_grad_(gradient)
    with torch.set_grad_enabled(gradient):
        logits = module(x)
        value = loss(logits, labels)
        grad = torch.autograd.grad(value.sum(), x)[0] if gradient else torch.zeros_like(x)
    truth = labels if labels.ndim == 1 else labels.argmax(dim=1)
    return value.detach(), grad, ~is_correct(logits.detach(), truth)
