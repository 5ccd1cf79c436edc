"""Linear layers of a transformer in bfloat16 on the CPU, with what stands around them, as one op each.

    linear:  y = [r +] W·[LN](x) + b
    mlp:     y = [x +] W₂·gelu(W₁·LN(x) + b₁) + b₂

What bf16 autocast computes, by AMX tiles (csrc/bf16_layers.cpp): operands are rounded to bfloat16, sums are float32,
as are normalisation, GELU and residual sums. Gradients of weights are not rounded to bfloat16 on their way.
Weights are packed for the tiles first; inside `weights_stay()` once for all calls. Differentiable once, not twice: for
second derivatives leave autocast.
Shapes: x (…, K), r and y (…, N), W (N, K); of the mlp: W₁ (H, K), W₂ (K, H).
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mimir_fast import _native

# Asked once. Without AMX a library's products are as good; tests set it to `avx512` to run the other kernel.
_UNIT = _native.run("bf16_unit") if _native.has("bf16_mlp") else ""
PANEL = 32


class Norm(NamedTuple):
    """A layer normalisation in front: weight (K,), bias (K,), float32."""

    weight: Tensor
    bias: Tensor
    eps: float


def linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm | None = None, residual: Tensor | None = None
) -> Tensor:
    """The definition."""
    if norm is not None:
        x = F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    y = F.linear(x, weight, bias)
    return y if residual is None else residual + y


def mlp_reference(
    x: Tensor, norm: Norm, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, residual: bool = True
) -> Tensor:
    """The definition."""
    y = F.linear(F.gelu(linear_reference(x, weight1, bias1, norm)), weight2, bias2)
    return x + y if residual else y


def takes(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether these ops compute what bf16 autocast would: it is on, on a CPU with AMX, and parameters are float32."""
    return (
        _UNIT == "amx"
        and x.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and x.dtype in (torch.float32, torch.bfloat16)
        and all(p is None or (type(p) in _PLAIN and p.dtype == torch.float32) for p in parameters)
        and not torch.compiler.is_compiling()
    )


_PLAIN = (Tensor, torch.nn.Parameter)  # a sharded parameter is a subclass


# Packed weights.

Packed = tuple[Tensor, Tensor]
_scope = threading.local()


@contextmanager
def weights_stay() -> Iterator[None]:
    """Inside, no weight changes (an attack and the forward pass after it), so each is packed once. May be nested."""
    outer = getattr(_scope, "packed", None)
    if outer is None:
        _scope.packed = {}
    try:
        yield
    finally:
        _scope.packed = outer


def packed(weight: Tensor) -> Packed:
    """The weight (N, K) as operand of x Wᵀ and of g W."""
    known: dict[object, tuple[Tensor, Packed]] | None = getattr(_scope, "packed", None)
    if known is None:
        return _pack(weight)
    key = weight.data_ptr(), weight.shape, weight.stride()  # slices of one weight are other weights
    if key not in known:
        known[key] = weight, _pack(weight)  # the weight too, so that nothing else comes to lie there
    return known[key][1]


@torch.library.custom_op("mimir_fast::bf16_pack", mutates_args=())
def _pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Panels for x Wᵀ, and for g W: see csrc/bf16_product.h."""
    forward, backward = _pack_fake(weight)
    wide = weight.dtype == torch.float32
    _native.run("bf16_pack", weight.contiguous(), wide, *weight.shape, forward, backward)
    return forward, backward


@_pack.register_fake
def _pack_fake(weight: Tensor) -> tuple[Tensor, Tensor]:
    N, K = (-(-n // PANEL) * PANEL for n in weight.shape)
    return tuple(weight.new_empty((a // PANEL, b, PANEL), dtype=torch.bfloat16) for a, b in ((N, K), (K, N)))  # type: ignore[return-value]


# y = [r +] W·[LN](x) + b


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm | None = None, residual: Tensor | None = None
) -> Tensor:
    """(…, N) in bfloat16, or in the residual's dtype.

    Args:
        x: (…, K) float32 or bfloat16.
        weight, bias: (N, K), (N,) float32.
        residual: (…, N) float32 or bfloat16.
    """
    gamma, beta, eps = norm if norm is not None else (None, None, 0.0)
    return _linear(x, gamma, beta, eps, weight, bias, residual, *packed(weight.detach()))[0]


def _dims(x: Tensor, weight: Tensor) -> tuple[int, int, int]:
    N, K = weight.shape
    return x.numel() // K, K, N


def _wide(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dtype == torch.float32


@torch.library.custom_op("mimir_fast::bf16_linear", mutates_args=())
def _linear(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None,
    residual: Tensor | None, panels: Tensor, panels_back: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output, and mean and 1/deviation of each row, (M, 2)."""
    out, statistics = _linear_fake(x, gamma, beta, eps, weight, bias, residual, panels, panels_back)
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    _run("bf16_linear", x, _wide(x), gamma, beta, eps, panels, bias, residual, _wide(residual), out, _wide(out),
         statistics, *_dims(x, weight), _UNIT == "amx")  # fmt: skip
    return out, statistics


@_linear.register_fake
def _linear_fake(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, weight: Tensor, bias: Tensor | None,
    residual: Tensor | None, panels: Tensor, panels_back: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    M, _, N = _dims(x, weight)
    dtype = torch.bfloat16 if residual is None else residual.dtype
    return (
        x.new_empty((*x.shape[:-1], N), dtype=dtype),
        x.new_empty((0 if gamma is None else M, 2), dtype=torch.float32),
    )


@torch.library.custom_op("mimir_fast::bf16_linear_backward", mutates_args=())
def _linear_backward(
    grad: Tensor, x: Tensor, gamma: Tensor | None, beta: Tensor | None, weight: Tensor, statistics: Tensor,
    panels_back: Tensor, wants_x: bool, wants_norm: bool, wants_weight: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, gamma, beta, weight, bias; empty where not wanted."""
    grads = _linear_backward_fake(
        grad, x, gamma, beta, weight, statistics, panels_back, wants_x, wants_norm, wants_weight
    )
    grad, x = grad.contiguous(), x.contiguous()
    _run("bf16_linear_backward", grad, _wide(grad), x, _wide(x), gamma, beta, statistics, panels_back,
         *(g if g.numel() else None for g in grads), *_dims(x, weight), _UNIT == "amx")  # fmt: skip
    return grads


@_linear_backward.register_fake
def _linear_backward_fake(
    grad: Tensor, x: Tensor, gamma: Tensor | None, beta: Tensor | None, weight: Tensor, statistics: Tensor,
    panels_back: Tensor, wants_x: bool, wants_norm: bool, wants_weight: bool,
) -> list[Tensor]:  # fmt: skip
    N, K = weight.shape
    new = weight.new_empty
    norm = K if wants_norm else 0
    return [
        x.new_empty(x.shape if wants_x else 0), new(norm), new(norm),
        new((N, K) if wants_weight else 0), new(N if wants_weight else 0),
    ]  # fmt: skip


def _linear_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, gamma, beta, _, weight, *_, panels_back = inputs
    ctx.save_for_backward(x, gamma, beta, weight, output[1], panels_back)
    ctx.mark_non_differentiable(output[1])


def _linear_gradients(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, gamma, beta, weight, statistics, panels_back = ctx.saved_tensors
    needs_x, needs_gamma, needs_beta, _, needs_weight, needs_bias, needs_residual, *_ = ctx.needs_input_grad
    wants_norm = needs_gamma or needs_beta
    dx, dgamma, dbeta, dweight, dbias = _linear_backward(
        grad, x, gamma, beta, weight, statistics, panels_back, needs_x or wants_norm, wants_norm,
        needs_weight or needs_bias,
    )  # fmt: skip
    return (
        dx if needs_x else None, dgamma if needs_gamma else None, dbeta if needs_beta else None, None,
        dweight if needs_weight else None, dbias if needs_bias else None, grad if needs_residual else None, None, None,
    )  # fmt: skip


_linear.register_autograd(_linear_gradients, setup_context=_linear_context)


# y = [x +] W₂·gelu(W₁·LN(x) + b₁) + b₂


def mlp(
    x: Tensor, norm: Norm, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, *, residual: bool = True
) -> Tensor:
    """(…, K): in x's dtype with the residual, in bfloat16 without. Arguments as for `linear`."""
    parameters = (norm.weight, norm.bias, weight1, bias1, weight2, bias2)
    keep = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in parameters))
    packs = (*packed(weight1.detach()), *packed(weight2.detach()))
    return _mlp(x, list(parameters), list(packs), norm.eps, residual, keep)[0]


@torch.library.custom_op("mimir_fast::bf16_mlp", mutates_args=())
def _mlp(
    x: Tensor, parameters: list[Tensor], packs: list[Tensor], eps: float, residual: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the hidden numbers before the GELU (M, H) if they are to be kept, and the rows' statistics (M, 2)."""
    out, hidden, statistics = _mlp_fake(x, parameters, packs, eps, residual, keep)
    x = x.contiguous()
    gamma, beta, weight1, bias1, _, bias2 = parameters
    _run("bf16_mlp", x, _wide(x), gamma, beta, eps, packs[0], bias1, packs[2], bias2, residual, out,
         hidden if keep else None, statistics, *_dims(x, weight1), _UNIT == "amx")  # fmt: skip
    return out, hidden, statistics


@_mlp.register_fake
def _mlp_fake(
    x: Tensor, parameters: list[Tensor], packs: list[Tensor], eps: float, residual: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    M, _, H = _dims(x, parameters[2])
    return (
        x.new_empty(x.shape, dtype=x.dtype if residual else torch.bfloat16),
        x.new_empty((M if keep else 0, H), dtype=torch.bfloat16),
        x.new_empty((M, 2), dtype=torch.float32),
    )


@torch.library.custom_op("mimir_fast::bf16_mlp_backward", mutates_args=())
def _mlp_backward(
    grad: Tensor, x: Tensor, parameters: list[Tensor], packs_back: list[Tensor], hidden: Tensor, statistics: Tensor,
    residual: bool, wants_parameters: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of x and, where wanted, of the parameters."""
    grads = _mlp_backward_fake(grad, x, parameters, packs_back, hidden, statistics, residual, wants_parameters)
    grad, x = grad.contiguous(), x.contiguous()
    addresses = [g.data_ptr() for g in grads[1:]]
    _run("bf16_mlp_backward", grad, x, _wide(x), *parameters[:2], statistics, hidden, *packs_back, residual,
         grads[0], addresses, *_dims(x, parameters[2]), _UNIT == "amx")  # fmt: skip
    return grads


@_mlp_backward.register_fake
def _mlp_backward_fake(
    grad: Tensor, x: Tensor, parameters: list[Tensor], packs_back: list[Tensor], hidden: Tensor, statistics: Tensor,
    residual: bool, wants_parameters: bool,
) -> list[Tensor]:  # fmt: skip
    return [x.new_empty(x.shape), *(p.new_empty(p.shape) for p in parameters if wants_parameters)]


def _mlp_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, parameters, packs, _, ctx.residual, _ = inputs
    ctx.save_for_backward(x, *parameters, *packs[1::2], *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _mlp_gradients(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    x, *rest = ctx.saved_tensors
    parameters, packs_back, (hidden, statistics) = rest[:6], rest[6:8], rest[8:]
    wants = any(ctx.needs_input_grad[1])
    dx, *to_parameters = _mlp_backward(grad, x, parameters, packs_back, hidden, statistics, ctx.residual, wants)
    return dx, to_parameters if wants else [None] * 6, [None] * 4, None, None, None


_mlp.register_autograd(_mlp_gradients, setup_context=_mlp_context)


def _run(function: str, *arguments: Any) -> None:
    _native.run(function, *(0 if argument is None else argument for argument in arguments))
