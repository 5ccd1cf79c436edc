"""fp32 matrix products of a frozen model by oneDNN, where the library that PyTorch was built with is slower.

PyTorch's fp32 products go to MKL, which leaves half of the width of AVX-512 unused on processors that are not Intel's.
oneDNN, which PyTorch brings for convolutions, uses all of it: on an AMD Zen 5 a product takes half of the time. The
precision is the same (fp32 inputs, fp32 sums), the order of the sums is not, so last bits differ.

Inside `fast_products`, our own layers (`_fp32.py`) ask for it, and every other model's `F.linear` is caught on its way.
Only weights that get no gradient are taken: those of a model on loan to an attack.

Shapes: X (M, K), W (N, K) as a linear layer has it.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

LARGE_PRODUCT = 2**22
"""Multiplications of a product that gains."""
LARGE_WEIGHT = 2**15
"""Numbers in the largest matrix of a model that is worth looking at; a ViT of width 96 has 36,864."""
_scope = threading.local()


@contextmanager
def fast_products(model: nn.Module) -> Iterator[None]:
    """Inside, in this thread, large fp32 products of frozen weights on the CPU are oneDNN's where that is faster."""
    sizes = [p.numel() for p in model.parameters() if p.ndim == 2 and p.device.type == "cpu"]
    if not helps() or max(sizes, default=0) < LARGE_WEIGHT or active():
        yield
        return
    _scope.active = True
    try:
        with _Linear() if _has_others_layers(model) else nullcontext():
            yield
    finally:
        _scope.active = False


def active() -> bool:
    """Whether this thread is inside `fast_products`, and the products are faster."""
    return getattr(_scope, "active", False)


@cache
def helps() -> bool:
    """Whether this is an AMD processor with AVX-512, and PyTorch has both MKL and oneDNN."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether x·Wᵀ, x (…, K), is a product that gains."""
    return (
        active()
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and not (weight.requires_grad and torch.is_grad_enabled())
        and x.numel() * weight.shape[0] >= LARGE_PRODUCT
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·Wᵀ + b in fp32 by oneDNN, (…, N); x (…, K), b (N,). Has no gradient."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


def _has_others_layers(model: nn.Module) -> bool:
    """Whether a large matrix belongs to a layer that is not ours: catching it costs a little on every operation."""

    def search(module: nn.Module, inside_ours: bool) -> bool:
        ours = type(module).__module__.startswith("mimir_fast.")
        large = any(p.ndim == 2 and p.numel() >= LARGE_WEIGHT for p in module.parameters(recurse=False))
        return (large and not (ours or inside_ours)) or any(search(child, ours) for child in module.children())

    return search(model, False)


class _Product(torch.autograd.Function):
    """`product` with the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return product(grad.contiguous(), weight.t()), None, None


class _Linear(TorchFunctionMode):
    """Catches `F.linear`, which `nn.Linear` is made of."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and not kwargs and _plain(args) and takes(args[0], args[1]):
            x, weight, bias = args if len(args) == 3 else (*args, None)
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
        and torch._C._len_torch_dispatch_stack() == 0
        and not torch.compiler.is_compiling()
    )
