"""Other people's linear layers by the faster library of `ops/_products.py`, while their model is only asked.

Our own layers (`_fp32.py`) take it always; inside `fast_products` every other model's `F.linear` is caught on its way.
Only weights that get no gradient are taken: those of a model on loan to an attack.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mimir_fast.ops import _products

LARGE_WEIGHT = 2**15
"""Numbers in the largest matrix of a model that is worth looking at; a ViT of width 96 has 36,864."""
_scope = threading.local()


@contextmanager
def fast_products(model: nn.Module) -> Iterator[None]:
    """Inside, in this thread, large fp32 products of frozen weights on the CPU are oneDNN's where that is faster."""
    if not _products.helps() or getattr(_scope, "active", False) or not _has_others_layers(model):
        yield
        return
    _scope.active = True
    try:
        with _Linear():
            yield
    finally:
        _scope.active = False


def _has_others_layers(model: nn.Module) -> bool:
    """Whether a large matrix belongs to a layer that is not ours: catching it costs a little on every operation."""

    def search(module: nn.Module, inside_ours: bool) -> bool:
        ours = type(module).__module__.startswith("mimir_fast.")
        own = [p for p in module.parameters(recurse=False) if p.ndim == 2 and p.device.type == "cpu"]
        large = any(p.numel() >= LARGE_WEIGHT for p in own)
        return (large and not (ours or inside_ours)) or any(search(child, ours) for child in module.children())

    return search(model, False)


class _Product(torch.autograd.Function):
    """`product` with the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _products.product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _products.product(grad.contiguous(), weight.t()), None, None


class _Linear(TorchFunctionMode):
    """Catches `F.linear`, which `nn.Linear` is made of."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and not kwargs and _plain(args):
            x, weight, bias = args if len(args) == 3 else (*args, None)
            if _products.takes(x.detach(), weight):
                return _Product.apply(x, weight, bias)
        return func(*args, **(kwargs or {}))


def _plain(args: Sequence[Any]) -> bool:
    """Whether nothing but ordinary tensors is multiplied, the bias gets no gradient, and fp32 is what was asked for."""
    x, weight, *rest = args
    bias = rest[0] if rest else None
    return (
        type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and weight.ndim == 2
        and (bias is None or type(bias) in (Tensor, nn.Parameter))
        and not (bias is not None and bias.requires_grad and torch.is_grad_enabled())
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )
