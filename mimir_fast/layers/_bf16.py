"""Kernels of a transformer's linear layers in bfloat16 on the CPU, by AMX tiles or AVX-512's bf16 products.

They compute what bf16 autocast does: operands are rounded to bfloat16, sums are float32, as are normalisation, GELU and
residual sums (csrc/bf16_layers.cpp). Gradients of weights are not rounded to bfloat16 on their way. Weights are packed
first, for each direction when it comes, once for an attack and the training pass behind it together (`borrowing.py`).
The interface is `Kernels` of definitions.py. Shapes: x (…, K), M rows of it, outputs and residuals (…, N), weights
(N, K); of the mlp: W₁ (H, K), W₂ (K, H).
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from mimir_fast import _native
from mimir_fast.layers.definitions import Grads, Kept, MlpWeights, Norm, plain_float32

NAME = "bf16"
# Asked once; tests set it to `avx512` to run the other kernel.
UNIT = _native.run("bf16_unit") if _native.has("bf16_mlp") else ""
PANEL = 32
_NO_NORM = (None, None, 0.0)
_WIDE = (torch.float32, torch.bfloat16)


def takes(x: Tensor, residual: Tensor | None, *parameters: Tensor | None) -> bool:
    """See Kernels: bf16 autocast is on, on a CPU with bf16 products, and parameters are float32."""
    return (
        bool(UNIT)
        and x.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and x.dtype in _WIDE
        and (residual is None or residual.dtype in _WIDE)
        and x.numel() > 0
        and plain_float32(*parameters)
    )


def precision() -> AbstractContextManager[object]:
    """See Kernels: bf16 autocast."""
    return torch.autocast("cpu", torch.bfloat16)


# Packed weights.

_scope = threading.local()


@contextmanager
def weights_stay() -> Iterator[None]:
    """Inside, no weight changes, so each is packed once while it is frozen. May be nested."""
    outer = getattr(_scope, "packed", None)
    if outer is None:
        _scope.packed = {}
    try:
        yield
    finally:
        _scope.packed = outer


def packed(weight: Tensor, *, back: bool = False) -> Tensor:
    """The weight (N, K) as operand of x Wᵀ, or of g W (`back`): panels of 32 columns, see csrc/bf16_product.h.

    One that gets a gradient is met for the last time: its panels are not kept, and their memory is free for gradients.
    """
    known: dict[object, tuple[Tensor, Tensor]] | None = getattr(_scope, "packed", None)
    owner = weight if weight._base is None else weight._base
    if known is None or not isinstance(owner, nn.Parameter) or owner.is_inference():
        return pack(weight, back=back)  # what is no parameter, as in torch.func.functional_call, does not come again
    key = back, weight.data_ptr(), weight.shape, weight.stride(), owner._version  # slices of a weight are other weights
    if key not in known:
        known[key] = weight, pack(weight, back=back)  # the weight too, so that nothing else comes to lie there
    return (known.pop(key) if weight.requires_grad else known[key])[1]


def pack(weight: Tensor, *, back: bool) -> Tensor:
    """`packed`, afresh; weight float32 or bfloat16."""
    weight = weight.detach().contiguous()
    N, K = (-(-n // PANEL) * PANEL for n in weight.shape)
    across, along = (K, N) if back else (N, K)
    panels = torch.empty((across // PANEL, along, PANEL), dtype=torch.bfloat16)
    _native.run("bf16_pack", weight, _wide(weight), *weight.shape, *((None, panels) if back else (panels, None)))
    return panels


# y = [r +] W·[LN](x) + b


def linear_forward(
    x: Tensor, norm: Norm | None, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Kept]:
    """See Kernels: in the residual's dtype or bfloat16. Keeps mean and 1/deviation of each row."""
    M, K, N = _dims(x, weight)
    out = torch.empty((*x.shape[:-1], N), dtype=torch.bfloat16 if residual is None else residual.dtype)
    statistics = torch.empty((0 if norm is None else M, 2))
    residual = None if residual is None else residual.contiguous()
    _native.run("bf16_linear", x, _wide(x), *(norm or _NO_NORM), packed(weight), bias, residual, _wide(residual),
                out, _wide(out), statistics, M, K, N, UNIT == "amx")  # fmt: skip
    return out, (statistics,)


def linear_backward(
    grad: Tensor, x: Tensor, norm: Norm | None, weight: Tensor, kept: Kept, needs: Sequence[bool],
    along: Tensor | None = None,
) -> Grads:  # fmt: skip
    """See Kernels; `along` is dense and of x's dtype."""
    (statistics,) = kept
    K, N = weight.shape[1], weight.shape[0]
    wants_norm, wants_weight = any(needs[1:3]), any(needs[3:])
    dx, panels = (torch.empty_like(x), packed(weight, back=True)) if needs[0] or wants_norm else (None, None)
    dgamma, dbeta = (torch.empty(K), torch.empty(K)) if wants_norm else (None, None)
    dweight, dbias = (torch.empty((N, K)), torch.empty(N)) if wants_weight else (None, None)
    _native.run("bf16_linear_backward", grad, _wide(grad), x, _wide(x), *(norm or _NO_NORM)[:2], statistics,
                panels, along, dx, dgamma, dbeta, dweight, dbias, *_dims(x, weight), UNIT == "amx")  # fmt: skip
    return _needed([dx, dgamma, dbeta, dweight, dbias], needs)


# y = [x +] W₂·gelu(W₁·LN(x) + b₁) + b₂


def mlp_forward(x: Tensor, norm: Norm, weights: MlpWeights, *, residual: bool, keep: bool) -> tuple[Tensor, Kept]:
    """See Kernels: in x's dtype with the residual, in bfloat16 without.

    Keeps the hidden numbers before GELU (M, H) and the rows' statistics (M, 2).
    """
    panels1, panels2 = packed(weights.weight1), packed(weights.weight2)
    M, K, H = _dims(x, weights.weight1)
    out = torch.empty(x.shape, dtype=x.dtype if residual else torch.bfloat16)
    hidden = torch.empty((M, H), dtype=torch.bfloat16) if keep else None
    statistics = torch.empty((M, 2))
    _native.run("bf16_mlp", x, _wide(x), *norm, panels1, weights.bias1, panels2, weights.bias2, residual, out, hidden,
                statistics, M, K, H, UNIT == "amx")  # fmt: skip
    return out, (hidden, statistics)


def mlp_backward(
    grad: Tensor, x: Tensor, norm: Norm, weights: MlpWeights, kept: Kept, *, residual: bool, needs: Sequence[bool]
) -> Grads:
    """See Kernels: in one pass over the rows, from the hidden numbers before GELU."""
    hidden, statistics = kept
    panels1, panels2 = packed(weights.weight1, back=True), packed(weights.weight2, back=True)
    dx = torch.empty_like(x)
    grads = [torch.empty_like(p) for p in (norm.weight, norm.bias, *weights)] if any(needs[1:]) else []
    _native.run("bf16_mlp_backward", grad, x, _wide(x), norm.weight, norm.bias, statistics, hidden, panels1, panels2,
                residual, dx, [g.data_ptr() for g in grads], *_dims(x, weights.weight1), UNIT == "amx")  # fmt: skip
    found: list[Tensor | None] = [dx, *grads] if grads else [dx, *[None] * 6]
    return _needed(found, needs)


def _needed(grads: Sequence[Tensor | None], needs: Sequence[bool]) -> Grads:
    return [g if needed else None for g, needed in zip(grads, needs, strict=True)]


def _dims(x: Tensor, weight: Tensor) -> tuple[int, int, int]:
    N, K = weight.shape
    return x.numel() // K, K, N


def _wide(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dtype == torch.float32
