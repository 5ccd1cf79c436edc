"""Projected gradient ascent in L2 and L1 balls; what pgd.py is for L∞.

    L2   step along ∇L / ‖∇L‖₂, project by scaling δ
    L1   step along the signs of the largest part of the gradient, among pixels that can still move that way; project
         onto the ball and [0, 1] together: doing one after the other wastes most of the ball in high dimensions. The
         part is 20 % at first and then a fraction of the pixels that an image's δ has; while these become no fewer, the
         image's steps become shorter. A fixed part fits no other image size and no other model

Madry et al., arXiv 1706.06083 (L2); Tramèr & Boneh, arXiv 1904.13000, §4 (sparse L1 steps); Croce & Hein, arXiv
2103.01208, §3 (the L1 ball and the box together) and Algorithm 1 (the part and the step length that adapt). Starts are
functions of (seed, step, sample), as everywhere here.

Shapes: B images, C channels, H × W pixels, D = C·H·W.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mimir_fast.attacks.pgd import Loss, Objective, check_images, cross_entropy, linf_ascent, random_start, samples_of
from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.layers.borrowing import AttackMode, borrowed
from mimir_fast.ops.random_uniform import random_uniform
from mimir_fast.philox import Stream, normal

ONE_STEP_PART = 0.05
"""Of the pixels, those that an L1 attack of one step moves: it has nothing to adapt to."""


@dataclass
class LpThreat:
    """Radius, step size and number of steps of an L2 or L1 attack on images in [0, 1]."""

    norm: Literal["l2", "l1"] = "l2"
    """Shape of the ball."""
    eps: float = 0.5
    """Radius: 0.5 (L2) and 12 (L1) are usual on CIFAR-10."""
    alpha: float = 0.125
    """Length of a step, in the ball's own norm; L1: of the first one, those after it adapt, eps at most."""
    num_steps: int = 20
    """Steps."""
    random_start: bool = True
    """Start at random in the ball (otherwise at the clean image)."""

    def __post_init__(self) -> None:
        if self.norm not in ("l2", "l1"):
            raise ValueError(f"norm={self.norm!r}, wanted 'l2' or 'l1'; L∞ is LinfThreat")
        if self.eps < 0 or self.alpha < 0 or self.num_steps < 0:
            raise ValueError(
                f"eps={self.eps:g}, alpha={self.alpha:g}, num_steps={self.num_steps}: none may be negative"
            )


Threat = LinfThreat | LpThreat


def size_of(delta: Tensor, norm: str) -> Tensor:
    """(B,) size of perturbations (B, …) in the norm `linf`, `l2` or `l1`."""
    return torch.linalg.vector_norm(delta.flatten(1), {"linf": torch.inf, "l2": 2, "l1": 1}[norm], dim=1)


def project(x: Tensor, images: Tensor, eps: float | Tensor, norm: Literal["l2", "l1"]) -> Tensor:
    """The point of the ball around `images` and of [0, 1] that x (B, C, H, W) is moved to; the nearest one for L1.

    Args:
        eps: radius, or one an image, (B, 1).
    """
    delta = (x - images).flatten(1)
    if norm == "l2":
        length = delta.norm(dim=1, keepdim=True)
        # The clamp only shortens δ: images are in [0, 1] themselves. A hair inside, for rounding.
        delta = delta * (eps * (1 - 1e-6) / length.clamp_min(1e-12)).clamp(max=1)
        return (images + delta.view_as(x)).clamp(0, 1)
    clean = images.flatten(1)
    low, high = -clean, 1 - clean

    def shrunk(amount: Tensor) -> Tensor:
        return torch.maximum(torch.minimum(delta.sign() * (delta.abs() - amount).clamp_min(0), high), low)

    # ‖shrunk(λ)‖₁ falls with λ: bisection finds the least λ that fits, to the last bits of fp32.
    least = torch.zeros(len(x), 1, device=x.device, dtype=x.dtype)
    inside = eps * (1 - 1e-6)  # a hair, for rounding
    most = torch.where(shrunk(least).abs().sum(1, keepdim=True) <= inside, least, delta.abs().amax(1, keepdim=True))
    for _ in range(32):
        middle = (least + most) / 2
        fits = shrunk(middle).abs().sum(1, keepdim=True) <= inside
        least, most = torch.where(fits, least, middle), torch.where(fits, middle, most)
    return (clean + shrunk(most)).view_as(x).clamp(0, 1)


def steepest(
    grad: Tensor, x: Tensor, alpha: float, norm: Literal["l2", "l1"], part: Tensor | float = ONE_STEP_PART
) -> Tensor:  # fmt: skip
    """A step of length alpha (B, C, H, W) up the gradient.

    Args:
        part: of the pixels that an L1 step moves, one number or (B,); one pixel at least.
    """
    # A slope that is not finite says nothing of the others' sizes; left in, it makes a step that no ball can hold.
    flat = grad.flatten(1).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    if norm == "l2":
        return (alpha * flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-12)).view_as(x)
    pixels = x.flatten(1)
    stuck = ((pixels <= 0) & (flat < 0)) | ((pixels >= 1) & (flat > 0))
    useful = flat.abs().masked_fill(stuck, 0)
    size = useful.shape[1]
    count = (torch.as_tensor(part, device=x.device).expand(len(x)) * size).long().clamp(1, size)
    least = useful.sort(dim=1, descending=True).values.gather(1, count[:, None] - 1)
    step = flat.sign() * ((useful >= least) & (useful > 0))
    return (alpha * step / step.abs().sum(1, keepdim=True).clamp_min(1)).view_as(x)


def sparsity_of(threat: LpThreat) -> dict[str, Any]:
    """All that says how L1 steps after the first choose their pixels and their length; JSON-able.

    Returns:
        `pixels`: the part of the pixels that an attack of one step moves. Of more steps, `first`: the part that the
        first one moves from a clean image; then, looked at `every` so many steps, the pixels of δ `divided_by` a
        number, and a step that is `longest_step` where δ's pixels became `fewer` by that factor, else `shorter_by` one,
        `shortest_step` at least.
    """
    if threat.num_steps == 1:
        return {"pixels": ONE_STEP_PART}
    every = max(1, threat.num_steps // Sparsity.LOOKS)
    return {
        "first": Sparsity.FIRST_PART, "every": every, "fewer": Sparsity.FEWER, "shorter_by": Sparsity.SHORTER,
        "divided_by": min(3.0, 1.5 ** max(1.0, Sparsity.LOOKS * every / max(1, threat.num_steps))),
        # Whatever step is given is the first one only: bounded by a short one, the search would not leave its start.
        "longest_step": max(threat.alpha, threat.eps), "shortest_step": min(threat.alpha, threat.eps / 10),
    }  # fmt: skip


class Sparsity:
    """How many pixels the next L1 step of each image moves, and how far: Croce & Hein, arXiv 2103.01208, Algorithm 1.

    They look 25 times, and let a step move two thirds of the pixels that δ has. An attack of fewer steps looks after
    each and takes a smaller fraction, down to a third: it could not become sparse in time. The first step from a clean
    image moves 20 %.
    """

    FIRST_PART, FEWER, LOOKS, SHORTER = 0.2, 0.95, 25, 1.5

    def __init__(self, threat: LpThreat, images: Tensor, start: Tensor) -> None:
        self.images, self.size = images, images[0].numel() if len(images) else 1
        self.rule, self.taken = sparsity_of(threat), 0
        count = self._pixels(start)
        if "pixels" in self.rule:
            self.part = torch.full_like(count, self.rule["pixels"])
        else:
            self.part = torch.where(count > 0, count / (self.rule["divided_by"] * self.size), self.rule["first"])
        self.alpha, self.before = torch.full_like(self.part, threat.alpha), torch.full_like(self.part, self.size)

    def _pixels(self, x: Tensor) -> Tensor:
        """(B,) how many pixels of δ are not zero."""
        return (x != self.images).flatten(1).sum(dim=1).to(x.dtype)

    def step(self, grad: Tensor, x: Tensor) -> Tensor:
        """Up the gradient, (B, C, H, W)."""
        return steepest(grad, x, 1.0, "l1", self.part) * self.alpha.view(-1, 1, 1, 1)

    def look_at(self, x: Tensor) -> None:
        """Adapt to where the step has led, if it is time."""
        self.taken += 1
        if "every" in self.rule and self.taken % self.rule["every"] == 0:
            count = self._pixels(x)
            became_fewer, self.before = count < self.rule["fewer"] * self.before, count
            shorter = (self.alpha / self.rule["shorter_by"]).clamp_min(self.rule["shortest_step"])
            self.alpha = torch.where(became_fewer, torch.full_like(shorter, self.rule["longest_step"]), shorter)
            self.part = count / (self.rule["divided_by"] * self.size)


def random_in_ball(
    images: Tensor, eps: float, norm: Literal["l2", "l1"], *, samples: Tensor | None = None, seed: int = 0,
    step: int | Tensor = 0, surface: bool = False,
) -> Tensor:  # fmt: skip
    """Images (B, C, H, W) at uniformly random points of the ball (or of its surface), cut to [0, 1]."""
    samples, size = samples_of(images, samples), images[0].numel() if len(images) else 1
    if norm == "l2":
        noise = normal(seed, Stream.ATTACK_START, step, samples, size)
        noise = noise / noise.norm(dim=1, keepdim=True)
    else:  # signs times exponential variables, over their sum: uniform on the L1 sphere
        draws = random_uniform(seed, Stream.ATTACK_START, step, samples, size)
        folded = (2 * draws - 1).abs().clamp_min(1e-7)
        noise = -(2 * draws - 1).sign() * folded.log()
        noise = noise / noise.abs().sum(dim=1, keepdim=True)
    if not surface:
        depth = random_uniform(seed + 1, Stream.ATTACK_START, step, samples, 1)
        noise = noise * depth ** (1 / size)
    return project(images + (eps * noise).view_as(images).to(images.dtype), images, eps, norm)


def start_of(
    images: Tensor, threat: Threat, *, samples: Tensor | None = None, seed: int = 0,
    step: int | Tensor = 0,
) -> Tensor:  # fmt: skip
    """Where an attack of any norm starts."""
    if not threat.random_start:
        return images
    if isinstance(threat, LinfThreat):
        return random_start(images, threat.eps, samples=samples, seed=seed, step=step)
    if threat.norm == "l2":
        return random_in_ball(images, threat.eps, "l2", samples=samples, seed=seed, step=step)
    # A uniform point of an L1 ball is a little noise on every pixel, which sparse steps take long to get rid of. Noise
    # from far outside is projected to few pixels, as where the authors of APGD-L1 start.
    samples = samples_of(images, samples)
    noise = normal(seed, Stream.ATTACK_START, step, samples, images[0].numel() if len(images) else 1)
    return project(images + noise.view_as(images).to(images.dtype), images, threat.eps, "l1")


def ascent(objective: Objective, images: Tensor, start: Tensor, threat: Threat) -> Tensor:
    """Gradient ascent of any objective in a ball of any norm; the last iterate (B, C, H, W), detached."""
    if isinstance(threat, LinfThreat):
        return linf_ascent(objective, images, start, threat)
    sparsity = Sparsity(threat, images, start) if threat.norm == "l1" else None
    x = start.detach()
    for _ in range(threat.num_steps):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            (grad,) = torch.autograd.grad(objective(x).sum(), x)
        x = x.detach()
        step = sparsity.step(grad, x) if sparsity else steepest(grad, x, threat.alpha, threat.norm)
        x = project(x + step, images, threat.eps, threat.norm)
        if sparsity:
            sparsity.look_at(x)
    return x.detach()


def attack_classifier(
    model: nn.Module, images: Tensor, labels: Tensor, threat: Threat, *, loss: Loss = cross_entropy,
    samples: Tensor | None = None, seed: int = 0, step: int | Tensor = 0, mode: AttackMode = "eval",
) -> Tensor:  # fmt: skip
    """PGD of any norm: adversarial images (B, C, H, W). Arguments as for `mimir_fast.attacks.pgd.pgd`."""
    check_images(images, values=mode == "eval" or images.device.type == "cpu")
    images = images.detach()
    start = start_of(images, threat, samples=samples, seed=seed, step=step)
    with borrowed(model, mode) as module:
        return ascent(lambda x: loss(module(x), labels), images, start, threat)
