"""Calls of csrc/bf16_layers.cpp: linear layers and MLPs forwards and backwards, without autograd.

`bf16_layers.py` makes differentiable functions of them. Weights are packed for the matrix units first; inside
`weights_stay()` once for all calls.
Shapes: x (…, K), M rows of it, outputs and residuals (…, N), weights (N, K); of the mlp: W₁ (H, K), W₂ (K, H).
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mimir_fast import _native
from mimir_fast.ops.layer_definitions import NO_NORM, MlpWeights, Norm

# Asked once. Without AMX a library's products are as good; tests set it to `avx512` to run the other kernel.
UNIT = _native.run("bf16_unit") if _native.has("bf16_mlp") else ""
PANEL = 32


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
    """The weight (N, K) as operand of x Wᵀ and of g W: panels of 32 columns, see csrc/bf16_product.h."""
    known: dict[object, tuple[Tensor, Packed]] | None = getattr(_scope, "packed", None)
    if known is None:
        return pack(weight)
    key = weight.data_ptr(), weight.shape, weight.stride()  # slices of one weight are other weights
    if key not in known:
        known[key] = weight, pack(weight)  # the weight too, so that nothing else comes to lie there
    return known[key][1]


def pack(weight: Tensor) -> Packed:
    """`packed`, afresh; weight float32 or bfloat16."""
    weight = weight.detach().contiguous()
    N, K = (-(-n // PANEL) * PANEL for n in weight.shape)
    forward, backward = (torch.empty((a // PANEL, b, PANEL), dtype=torch.bfloat16) for a, b in ((N, K), (K, N)))
    _native.run("bf16_pack", weight, _wide(weight), *weight.shape, forward, backward)
    return forward, backward


# y = [r +] W·[LN](x) + b


def linear_forward(
    x: Tensor, norm: Norm | None, weight: Tensor, bias: Tensor | None, residual: Tensor | None, panels: Tensor
) -> tuple[Tensor, Tensor]:
    """(…, N) in the residual's dtype or bfloat16, and mean and 1/deviation of each row (M, 2) if there is a norm.

    Args:
        panels: of the weight, for x Wᵀ.
    """
    M, K, N = _dims(x, weight)
    out = torch.empty((*x.shape[:-1], N), dtype=torch.bfloat16 if residual is None else residual.dtype)
    statistics = torch.empty((0 if norm is None else M, 2))
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    _native.run("bf16_linear", x, _wide(x), *(norm or NO_NORM), panels, bias, residual, _wide(residual), out,
                _wide(out), statistics, M, K, N, UNIT == "amx")  # fmt: skip
    return out, statistics


def linear_backward(
    grad: Tensor, x: Tensor, norm: Norm | None, weight: Tensor, statistics: Tensor, panels_back: Tensor, *,
    wants_x: bool, wants_norm: bool, wants_weight: bool, along: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of x, gamma, beta, weight and bias; None where not wanted.

    Args:
        panels_back: of the weight, for g W.
        wants_norm: only together with `wants_x`.
        along: added to x's gradient, dense and of x's dtype; only behind a norm.
    """
    grad, x = grad.contiguous(), x.contiguous()
    K, N = weight.shape[1], weight.shape[0]
    dx = torch.empty_like(x) if wants_x else None
    dgamma, dbeta = (torch.empty(K), torch.empty(K)) if wants_norm else (None, None)
    dweight, dbias = (torch.empty((N, K)), torch.empty(N)) if wants_weight else (None, None)
    _native.run("bf16_linear_backward", grad, _wide(grad), x, _wide(x), *(norm or NO_NORM)[:2], statistics, panels_back,
                along, dx, dgamma, dbeta, dweight, dbias, *_dims(x, weight), UNIT == "amx")  # fmt: skip
    return dx, dgamma, dbeta, dweight, dbias


# y = [x +] W₂·gelu(W₁·LN(x) + b₁) + b₂


def mlp_forward(
    x: Tensor, norm: Norm, weights: MlpWeights, packs: tuple[Packed, Packed], *, residual: bool, keep: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The output, the hidden numbers before the GELU (M, H) if they are to be kept, and the rows' statistics (M, 2)."""
    M, K, H = _dims(x, weights.weight1)
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype if residual else torch.bfloat16)
    hidden = torch.empty((M, H), dtype=torch.bfloat16) if keep else None
    statistics = torch.empty((M, 2))
    _native.run("bf16_mlp", x, _wide(x), *norm, packs[0][0], weights.bias1, packs[1][0], weights.bias2, residual, out,
                hidden, statistics, M, K, H, UNIT == "amx")  # fmt: skip
    return out, hidden, statistics


def mlp_backward(
    grad: Tensor, x: Tensor, norm: Norm, weights: MlpWeights, packs_back: tuple[Tensor, Tensor], hidden: Tensor,
    statistics: Tensor, *, residual: bool, wants_parameters: bool,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """The gradient of x, and where wanted those of gamma, beta, W₁, b₁, W₂, b₂, else an empty list."""
    grad, x = grad.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    grads = [torch.empty_like(p) for p in (norm.weight, norm.bias, *weights)] if wants_parameters else []
    _native.run("bf16_mlp_backward", grad, x, _wide(x), norm.weight, norm.bias, statistics, hidden, *packs_back,
                residual, dx, [g.data_ptr() for g in grads], *_dims(x, weights.weight1), UNIT == "amx")  # fmt: skip
    return dx, grads


def _dims(x: Tensor, weight: Tensor) -> tuple[int, int, int]:
    N, K = weight.shape
    return x.numel() // K, K, N


def _wide(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dtype == torch.float32
