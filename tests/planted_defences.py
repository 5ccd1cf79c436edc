"""Planted defences: the small classifier of digits behind something that makes attacks fail, or only looks as if.

Each is a function of a net, made for the table of evaluation/test_planted_defences.py, and judged as a user's model is:
`--checkpoint planted_defences:judged`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from small_classifier import SmallNet
from torch import Tensor, nn

Change = Callable[[Tensor], Any]


class Around(nn.Module):
    """A net with something done to its images and to its logits."""

    def __init__(self, net: nn.Module, before: Change = lambda x: x, after: Change = lambda z: z) -> None:
        super().__init__()
        self.net, self.before, self.after = net, before, after

    def forward(self, images: Tensor) -> Any:
        return self.after(self.net(self.before(images)))


class Gradient(torch.autograd.Function):
    """The identity, whose gradient is changed on its way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Change) -> Tensor:
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.change(grad), None


def before(change: Change) -> Callable[[nn.Module], nn.Module]:
    """The defence that changes the images."""
    return lambda net: Around(net, before=change)


def after(change: Change) -> Callable[[nn.Module], nn.Module]:
    """The defence that changes the logits."""
    return lambda net: Around(net, after=change)


def gradient(change: Change) -> Callable[[nn.Module], nn.Module]:
    """The defence that changes the gradient and nothing else."""
    return lambda net: Around(net, before=lambda x: Gradient.apply(x, change))


def without_gradient(net: nn.Module) -> nn.Module:
    """The net under `torch.no_grad()`."""
    return Around(net, before=lambda x: x, after=lambda z: z.detach())


def straight_through(x: Tensor) -> Tensor:
    """Rounded, with the gradient of what was rounded: a defence its author has attacked as he should."""
    return x + ((4 * x).round() / 4 - x).detach()


def nearest_of(net: nn.Module) -> nn.Module:
    """Looks up the nearest of stored images and classifies that."""
    stored = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return Around(net, before=lambda x: stored[torch.cdist(x.flatten(1), stored.flatten(1)).argmin(1)])


def of_two(net: nn.Module) -> nn.Module:
    """Answers by one of two nets, by the toss of a coin."""
    other = SmallNet().eval()
    other.load_state_dict({k: v * 1.02 if v.is_floating_point() else v for k, v in net.state_dict().items()})

    class OfTwo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = net, other

        def forward(self, x: Tensor) -> Tensor:
            return torch.where(torch.rand(len(x), 1) < 0.5, self.first(x), self.second(x))

    return OfTwo()


def shifted(x: Tensor) -> Tensor:
    """Every other image or so by one pixel."""
    return torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x, x.roll(1, 3))


def blocks(x: Tensor) -> Tensor:
    """JPEG's way: the cosine transform of the 8 × 8 block, rounded to a coarse step, and back."""
    n = torch.arange(8.0)
    basis = torch.cos(torch.pi / 8 * (n[None] + 0.5) * n[:, None]) * 0.5
    basis[0] *= 0.5**0.5
    return basis.T @ ((basis @ x @ basis.T) * 2).round().div(2) @ basis


def constant(z: Tensor) -> Tensor:
    """Always class 3."""
    return 0 * z + 5 * F.one_hot(torch.full((len(z),), 3), z.shape[1])


CHOSEN: list[nn.Module] = []
"""The model that is judged next."""


def judged() -> nn.Module:
    """For `--checkpoint planted_defences:judged`."""
    return CHOSEN[0].eval()
