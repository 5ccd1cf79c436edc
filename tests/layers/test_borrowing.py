"""An attack asks for the input's gradient only, and leaves the model as it was."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mimir_fast.layers.borrowing import borrowed


class Both(torch.autograd.Function):
    """A product that gives both gradients if the weight wants one, as fused ops do."""

    weights_seen: ClassVar[list[bool]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight = ctx.saved_tensors
        Both.weights_seen.append(ctx.needs_input_grad[1])
        return grad @ weight.mT, x.mT @ grad if ctx.needs_input_grad[1] else None


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3))
        self.fixed = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return Both.apply(x, self.weight) * self.fixed  # type: ignore[no-any-return]


def test_fused_ops_compute_no_weight_gradient_in_an_attack() -> None:
    Both.weights_seen.clear()
    layer, x = Layer(), torch.randn(2, 3, requires_grad=True)
    with borrowed(layer) as module:
        with borrowed(module):  # an attack within an attack
            pass
        torch.autograd.grad(module(x).sum(), x)
    assert layer.weight.requires_grad and not layer.fixed.requires_grad
    layer(x).sum().backward()
    assert Both.weights_seen == [False, True]
    assert layer.weight.grad is not None


def test_a_graph_made_before_the_attack_still_reaches_the_weights() -> None:
    layer, x = Layer(), torch.randn(2, 3)
    loss = layer(x).square().sum()
    with borrowed(layer) as module:
        start = x.clone().requires_grad_()
        torch.autograd.grad(module(start).sum(), start)
    loss.backward()
    assert layer.weight.grad is not None
