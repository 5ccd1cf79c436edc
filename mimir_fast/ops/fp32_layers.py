"""Linear layers of a transformer in float32 on the CPU, with what stands around them, as one op each.

    linear:  y = [r +] W·[LN](x) + b
    mlp:     y = [x +] W₂·gelu(W₁·LN(x) + b₁) + b₂

The products are the BLAS's. What stands around them (csrc/fp32_layers.cpp) takes one pass over memory each: biases and
residuals lie in the result before the product is added to it, and the hidden layer, four times as wide as all else,
goes through GELU in pieces that stay in the cache. For the backward pass x, the rows' statistics and the hidden
layer before its GELU are kept; the rest is computed again. Gradients that nobody wants are not computed.
Differentiable any number of times: beyond the first through the definition.
Shapes: x (…, K), r and y (…, N), W (N, K); of the mlp: W₁ (H, K), W₂ (K, H). M rows in all.
"""

from typing import Any

import torch
from torch import Tensor

from mimir_fast import _native
from mimir_fast.ops.bf16_kernels import Norm
from mimir_fast.ops.bf16_layers import linear_reference, mlp_reference

_HAS = _native.has("fp32_gelu")
_PLAIN = (Tensor, torch.nn.Parameter)  # a sharded parameter is a subclass
_BLOCK = 32  # rows whose sums are taken first, see csrc/fp32_layers.cpp
_PIECE = 1 << 22


def takes(x: Tensor, *tensors: Tensor | None) -> bool:
    """Whether these ops compute it: plain float32 tensors on the CPU, outside of autocast and torch.compile."""
    return (
        _HAS
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and all(t is None or (type(t) in _PLAIN and t.dtype == torch.float32 and t.is_cpu) for t in (x, *tensors))
        and x.numel() > 0
    )


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm | None = None, residual: Tensor | None = None
) -> Tensor:
    """(…, N) float32, where all arguments are float32 as well."""
    gamma, beta, eps = norm if norm is not None else (None, None, 0.0)
    return _Linear.apply(x, gamma, beta, eps, weight, bias, residual)


def mlp(
    x: Tensor, norm: Norm, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, *, residual: bool = True
) -> Tensor:
    """(…, K) float32. Arguments as for `linear`."""
    inputs = (x, norm.weight, norm.bias, norm.eps, weight1, bias1, weight2, bias2, residual)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in inputs if isinstance(t, Tensor))
    return _Mlp.apply(*inputs, keep)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, eps: float, weight1: Tensor, bias1: Tensor, weight2: Tensor,
        bias2: Tensor, residual: bool, keep: bool,
    ) -> Tensor:  # fmt: skip
        ctx.eps, ctx.residual = eps, residual
        x = x.contiguous()
        rows, (H, K) = x.view(-1, x.shape[-1]), weight1.shape
        normed, statistics = _normalise(rows, gamma, beta, eps)
        hidden = rows.new_empty((len(rows) if keep else 0, H))
        out = rows + bias2 if residual else bias2.expand(len(rows), K).clone()
        step = _rows_at_a_time(H)
        activated = rows.new_empty((min(step, len(rows)), H))
        for start in range(0, len(rows), step):
            piece = slice(start, start + step)
            a = activated[: len(normed[piece])]
            h = torch.mm(normed[piece], weight1.t(), out=hidden[piece] if keep else a)
            _native.run("fp32_gelu", h, bias1, a, *h.shape)
            torch.addmm(out[piece], a, weight2.t(), out=out[piece])
        ctx.save_for_backward(x, gamma, beta, weight1, bias1, weight2, bias2, hidden, statistics)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        *inputs, hidden, statistics = ctx.saved_tensors
        needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4, 5, 6, 7)]
        if torch.is_grad_enabled():

            def definition(x: Tensor, gamma: Tensor, beta: Tensor, *rest: Tensor) -> Tensor:
                return mlp_reference(x, Norm(gamma, beta, ctx.eps), *rest, residual=ctx.residual)

            grads = _differentiably(definition, inputs, needs, grad)
        else:
            grads = _mlp_gradients(grad, inputs, hidden, statistics, ctx.residual, needs)
        return (*grads[:3], None, *grads[3:], None, None)


def _mlp_gradients(
    grad: Tensor, inputs: list[Tensor], hidden: Tensor, statistics: Tensor, residual: bool, needs: list[bool]
) -> list[Tensor | None]:
    """Of x, gamma, beta, W₁, b₁, W₂, b₂: where needed."""
    x, gamma, beta, weight1, bias1, weight2, _ = inputs
    wants = any(needs[3:6])
    x_MK, grad_MK = x.view(-1, x.shape[-1]), grad.reshape(-1, x.shape[-1]).contiguous()
    (M, H), K = hidden.shape, x.shape[-1]
    step = M if wants else _rows_at_a_time(H)
    to_hidden = hidden.new_empty((min(step, M), H))
    activated, sums = (hidden.new_empty((M, H)), hidden.new_empty((-(-M // _BLOCK), H))) if wants else (None, None)
    to_normed = torch.empty_like(x_MK)
    for start in range(0, M, step):
        piece = slice(start, start + step)
        d = to_hidden[: len(hidden[piece])]
        torch.mm(grad_MK[piece], weight2, out=d)
        _native.run("fp32_gelu_backward", hidden[piece], bias1, d, activated if wants else 0, sums if wants else 0, *d.shape)
        torch.mm(d, weight1, out=to_normed[piece])
    grads: list[Tensor | None] = [None] * 7
    if wants:
        normed, _ = _normalise(x_MK, gamma, beta, 0.0, statistics)
        grads[3:6] = torch.mm(to_hidden.t(), normed), sums.sum(0), torch.mm(grad_MK.t(), activated)
    if needs[6]:
        grads[6] = grad_MK.sum(0)
    if any(needs[:3]):
        grads[:3] = _norm_gradients(to_normed, x_MK, gamma, statistics, grad_MK if residual else None, any(needs[1:3]))
        grads[0] = grads[0].view_as(x)
    return grads


def _rows_at_a_time(H: int) -> int:
    return max(_PIECE // H // _BLOCK, 1) * _BLOCK


def _normalise(
    x_MK: Tensor, gamma: Tensor, beta: Tensor, eps: float, statistics_M2: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(M, K) normalised rows, and mean and 1/deviation of each, (M, 2), which may be known."""
    out = torch.empty_like(x_MK)
    statistics = x_MK.new_empty((len(x_MK), 2)) if statistics_M2 is None else statistics_M2
    _native.run("fp32_norm", x_MK, gamma, beta, eps, statistics_M2 is not None, statistics, out, *x_MK.shape)
    return out, statistics


def _norm_gradients(
    grad_MK: Tensor, x_MK: Tensor, gamma: Tensor, statistics_M2: Tensor, along_MK: Tensor | None, wants: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of x, in the memory of `grad`, plus `along`; where wanted of gamma and beta."""
    M, K = x_MK.shape
    sums = x_MK.new_empty((-(-M // _BLOCK), 2, K)) if wants else None
    along = 0 if along_MK is None else along_MK
    _native.run("fp32_norm_backward", x_MK, gamma, statistics_M2, along, grad_MK, sums if wants else 0, M, K)
    return (grad_MK, *sums.sum(0)) if sums is not None else (grad_MK, None, None)


def _differentiably(definition: Any, inputs: list[Tensor], needs: list[bool], grad: Tensor) -> list[Tensor | None]:
    """The gradients as a graph of their own (create_graph), which the definition gives."""
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    found = iter(torch.autograd.grad(definition(*inputs), wanted, grad, create_graph=True))
    return [next(found) if need else None for need in needs]
