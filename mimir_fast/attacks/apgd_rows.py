"""The steps of APGD on rows: momentum, and step sizes that halve by themselves. See apgd.py for the algorithm.

Shapes: R rows, C channels, H × W pixels, K classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mimir_fast.attacks.losses import loss_of_rows
from mimir_fast.attacks.lp import project, steepest
from mimir_fast.attacks.pgd import Loss, image_bounds, is_correct
from mimir_fast.attacks.rows import select_all

MOMENTUM = 0.75
RHO = 0.75


class LinfBall:
    """Signed steps, and the box around the images that is the ball."""

    def __init__(self, images: Tensor, eps: float) -> None:
        self.eps, (self.low, self.high) = eps, image_bounds(images, eps)

    def step(self, x: Tensor, grad: Tensor, eta: Tensor) -> Tensor:
        """Up the gradient, η far."""
        return x + eta * grad.sign()

    def project(self, x: Tensor) -> Tensor:
        """Into the ball and [0, 1]."""
        return x.clamp(self.low, self.high)

    def select(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        select_all(self, rows, "low", "high")


class L2Ball:
    """Steps of length η."""

    def __init__(self, images: Tensor, eps: float) -> None:
        self.eps, self.images = eps, images

    def step(self, x: Tensor, grad: Tensor, eta: Tensor) -> Tensor:
        """Up the gradient, η far."""
        return x + eta * steepest(grad, x, 1.0, "l2")

    def project(self, x: Tensor) -> Tensor:
        """Into the ball and [0, 1]."""
        return project(x, self.images, self.eps, "l2")

    def select(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        select_all(self, rows, "images")


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


class ApgdRows:
    """A search of one look at the start and `num_steps` steps; see `rows.Rows`.

    Args:
        module: takes images in [0, 1], returns logits (R, K).
        start: (R, C, H, W), in the ball.
        loss: (logits, labels) → (R,), to be maximised.
        told_gradient: told the loss's gradient (R, C, H, W) at the start.
    """

    grad: Tensor
    eta: Tensor
    best_grad: Tensor
    best_value: Tensor
    best_at_check: Tensor
    rises: Tensor
    was_halved: Tensor
    value_before: Tensor

    def __init__(
        self, module: nn.Module, labels: Tensor, start: Tensor, ball: Ball, num_steps: int, loss: Loss, *,
        told_gradient: Callable[[Tensor], None] = lambda gradient: None,
    ) -> None:  # fmt: skip
        self.told_gradient = told_gradient
        self.module, self.labels, self.ball, self.loss = module, labels, ball, loss
        self.x = self.x_before = self.best = start
        self.num_steps, self.taken = num_steps, -1
        self.schedule, self.since_check = Schedule.of(num_steps), 0

    def finished(self) -> bool:
        """Whether all steps are taken."""
        return self.taken >= self.num_steps

    def step(self) -> tuple[Tensor, Tensor]:
        """One step; the first call only looks at the start."""
        self.taken += 1
        if self.taken == 0:
            return self._begin(), self.x
        momentum = MOMENTUM if self.taken > 1 else 1.0
        x, ball = self.x, self.ball
        z = ball.project(ball.step(x, self.grad, self.eta))
        x, self.x_before = ball.project(x + momentum * (z - x) + (1 - momentum) * (x - self.x_before)), x

        # The last point is only looked at: nobody will step from it.
        value, grad, wrong = self._evaluate(x, gradient=not self.finished())
        better = value > self.best_value
        self.best = torch.where(_wide(better), x, self.best)
        self.best_grad = torch.where(_wide(better), grad, self.best_grad)
        self.best_value = torch.where(better, value, self.best_value)
        self.rises = self.rises + (value > self.value_before)
        self.x, self.grad, self.value_before = x, grad, value
        self.since_check += 1
        if self.since_check == self.schedule.interval:
            self._judge()
        return wrong, x

    def select(self, rows: Tensor) -> None:
        """Go on with these rows only."""
        names = "labels x x_before grad eta best best_grad best_value rises value_before best_at_check was_halved"
        select_all(self, rows, *names.split())
        self.ball.select(rows)
        self.loss = loss_of_rows(self.loss, rows)

    def _begin(self) -> Tensor:
        value, self.grad, wrong = self._evaluate(self.x, gradient=not self.finished())
        self.told_gradient(self.grad)
        self.best_grad, self.best_value, self.best_at_check = self.grad, value, value
        self.eta = torch.full((len(self.x), 1, 1, 1), 2 * self.ball.eps, device=self.x.device, dtype=self.x.dtype)
        self.rises, self.was_halved = torch.zeros_like(value), torch.ones_like(value, dtype=torch.bool)
        self.value_before = torch.zeros_like(value)  # the authors' record of losses starts with the first step, from 0
        return wrong

    def _judge(self) -> None:
        """Halve the step of who oscillates or is stuck, and let it go on from its best point."""
        oscillates = self.rises <= RHO * self.since_check
        stuck = ~self.was_halved & (self.best_at_check >= self.best_value)
        halve = oscillates | stuck
        self.eta = torch.where(_wide(halve), self.eta / 2, self.eta)
        self.x = torch.where(_wide(halve), self.best, self.x)
        self.grad = torch.where(_wide(halve), self.best_grad, self.grad)
        self.was_halved, self.best_at_check = halve, self.best_value
        self.rises, self.since_check = torch.zeros_like(self.rises), 0
        self.schedule.shorten()

    def _evaluate(self, x: Tensor, *, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(loss (R,), its gradient to x or zeros, misclassified (R,) bool) at x."""
        x = x.detach().requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            logits = self.module(x)
            value = self.loss(logits, self.labels)
            grad = torch.autograd.grad(value.sum(), x)[0] if gradient else torch.zeros_like(x)
        truth = self.labels if self.labels.ndim == 1 else self.labels.argmax(dim=1)
        return value.detach(), grad, ~is_correct(logits.detach(), truth)


def _wide(mask: Tensor) -> Tensor:
    return mask.view(-1, 1, 1, 1)
