"""The smallest perturbation that changes the answer: a minimal-norm attack, then bisection over the radius with PGD.

FMN (Pintor et al., arXiv 2102.12827, Algorithm 1) follows the gradient of the margin m(x) = z_y − max_{i≠y} z_i inside
a ball that shrinks by γ where the image is misclassified, and grows where it is not; before the first success its
radius is ‖δ‖_p + m / ‖∇m‖_q, the distance to the border if the model were linear (1/p + 1/q = 1). The authors choose a
step length for each data set; here an image's first step is as long, in L2, as the linear model's way to the border, so
that no image size and no model needs a number of its own.

Then each image is attacked by PGD on the cross entropy in balls between the largest that held and the smallest that did
not. Both have one radius an image, so the loops here are not those of a fixed ball. Every number is an upper bound of
the true distance.

Shapes: B images, C channels, H × W pixels, K classes.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from mimir_fast.attacks.losses import margin
from mimir_fast.attacks.lp import LpThreat, Sparsity, project, size_of, steepest
from mimir_fast.attacks.pgd import check_images, cross_entropy, is_correct
from mimir_fast.layers.borrowing import AttackMode, borrowed

Norm = Literal["linf", "l2", "l1"]
DUAL = {"linf": "l1", "l2": "l2", "l1": "linf"}
GAMMA = (0.05, 0.0001)
"""By which part the ball changes in the first and in the last step of FMN; cosine annealing in between."""


def smallest_perturbation(
    model: nn.Module, images: Tensor, labels: Tensor, norm: Norm, *, num_steps: int = 100, rounds: int = 6,
    pgd_steps: int = 20, mode: AttackMode = "eval",
) -> Tensor:  # fmt: skip
    """The nearest misclassified version (B, C, H, W) of each image that FMN and bisection find.

    Nothing is random, and no image depends on the others of its batch. An image that is misclassified already is its
    own version; one that nothing breaks comes back as it was.

    Args:
        norm: in which nearness is measured.
        num_steps: of FMN.
        rounds: of the bisection; each halves the interval between the radii.
        pgd_steps: of PGD in each of them, from each of two starts.
    Raises:
        ValueError: images are not float (B, C, H, W) in [0, 1].
    """
    check_images(images, half=False)
    with borrowed(model, mode) as module:
        best = _Best(module, images.detach(), labels, norm)
        fmn(best, num_steps)
        bisect(best, rounds, pgd_steps)
    return best.x


class _Best:
    """The nearest misclassified version of each image so far.

    Attributes:
        x: (B, C, H, W); the image itself where there is none.
        size: (B,) of its perturbation; ∞ where there is none.
    """

    def __init__(self, module: nn.Module, images: Tensor, labels: Tensor, norm: Norm) -> None:
        self.module, self.images, self.labels, self.norm = module, images, labels, norm
        self.x, self.size = images, torch.full((len(images),), torch.inf, device=images.device)
        with torch.no_grad():
            self.look_at(images, module(images))

    def look_at(self, x: Tensor, logits: Tensor, done: Tensor | None = None) -> Tensor:
        """(B,) bool, where x is misclassified; kept where it is nearer than what was known, but of images `done`."""
        wrong = ~is_correct(logits.detach(), self.labels)
        size = size_of(x - self.images, self.norm)
        nearer = wrong & (size < self.size)
        if done is not None:
            nearer &= ~done
        self.x = torch.where(nearer.view(-1, 1, 1, 1), x, self.x)
        self.size = torch.where(nearer, size, self.size)
        return wrong

    def within(self, x: Tensor, radius: Tensor) -> Tensor:
        """x moved into the balls of radii (B,) around the images, and into [0, 1]."""
        if self.norm == "linf":
            r = radius.view(-1, 1, 1, 1)
            return x.clamp(self.images - r, self.images + r).clamp(0, 1)
        return project(x, self.images, radius[:, None], self.norm)


def fmn(best: _Best, num_steps: int) -> None:
    """The minimal-norm attack; `best` keeps the nearest point on the way."""
    images = best.images
    x, radius, length = images, torch.full_like(best.size, torch.inf), torch.zeros_like(best.size)
    for step in range(num_steps + 1):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            logits = best.module(x)
            value = -margin(logits, best.labels)
            (grad,) = torch.autograd.grad(value.sum(), x)
        x, grad = x.detach(), grad.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        wrong = best.look_at(x, logits)
        if step == num_steps:
            return
        turned = (1 + math.cos(math.pi * step / num_steps)) / 2
        gamma = GAMMA[1] + (GAMMA[0] - GAMMA[1]) * turned
        linear = value.detach().abs() / size_of(grad, DUAL[best.norm])
        if step == 0:
            length = linear.nan_to_num(nan=0.0) * size_of(torch.ones_like(x), "l2" if best.norm == "linf" else "linf")
        linear = size_of(x - images, best.norm) + linear
        # Beyond the linear model's border by γ: on it, rounding decides.
        grown = torch.where(best.size.isfinite(), radius, linear.nan_to_num(nan=torch.inf)) * (1 + gamma)
        radius = torch.where(wrong, torch.minimum(radius * (1 - gamma), best.size), grown)
        alpha = (length * (0.01 + 0.99 * turned)).view(-1, 1, 1, 1)
        x = best.within(x - alpha * steepest(grad, x, 1.0, "l2"), radius)


def bisect(best: _Best, rounds: int, pgd_steps: int) -> None:
    """PGD between the largest radius that held and the smallest that did not, `rounds` times.

    It starts from the image, and then from the nearest point known: each finds what the other misses.
    """
    low = torch.zeros_like(best.size)
    # From one corner of [0, 1]^D to the other: nothing is out of reach.
    reach = size_of(torch.ones_like(best.images), best.norm)
    for _ in range(rounds):
        radius = (low + torch.minimum(best.size, reach)) / 2
        broken = torch.zeros_like(radius, dtype=torch.bool)
        for start in (best.images, best.x):
            broken = _pgd(best, radius, start, pgd_steps, broken)
        low = torch.where(broken, low, radius)


def _pgd(best: _Best, radius: Tensor, start: Tensor, num_steps: int, broken: Tensor) -> Tensor:
    """(B,) bool, where an image is `broken` already, or by PGD within its radius (B,)."""
    column, norm = radius.view(-1, 1, 1, 1), best.norm
    x = best.within(start, radius)
    sparsity = Sparsity(LpThreat("l1", 1.0, 1.0, num_steps), best.images, x) if norm == "l1" else None
    for step in range(num_steps + 1):
        if bool(broken.all()):
            break
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            logits = best.module(x)
            (grad,) = torch.autograd.grad(cross_entropy(logits, best.labels).sum(), x)
        x, grad = x.detach(), grad.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        broken = broken | best.look_at(x, logits, done=broken)
        if step == num_steps:
            break
        if sparsity:
            x = best.within(x + column * sparsity.step(grad, x), radius)
            sparsity.look_at(x)
            continue
        # Through the ball at first, then ever finer.
        alpha = column * (1 - step / num_steps)
        up = grad.sign() if norm == "linf" else steepest(grad, x, 1.0, "l2")
        x = best.within(x + alpha * up, radius)
    return broken
