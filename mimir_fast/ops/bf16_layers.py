"""Layers of a transformer in bfloat16 on the CPU, with what stands around them, as one op each.

    linear:  y = [r +] W·[LN](x) + b
    mlp:     y = [x +] W₂·gelu(W₁·LN(x) + b₁) + b₂
    block:   y = x + W·attention(LN(x)) + b, then the mlp

What bf16 autocast computes, by AMX tiles (csrc/bf16_layers.cpp): operands are rounded to bfloat16, sums are float32,
as are normalisation, GELU and residual sums. Gradients of weights are not rounded to bfloat16 on their way.
Differentiable once, not twice: for second derivatives leave autocast.

A block is one node of the graph: at these sizes the host's work between products is a good part of a step.
`torch.autograd.Function` and not `torch.library`: its calls are cheaper, and torch.compile fuses layers by itself, so
these are not taken while it traces.
Shapes: x (…, K), r and y (…, N), W (N, K); of the mlp: W₁ (H, K), W₂ (K, H); of the block: (B, T, D), H heads of E.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mimir_fast import _native
from mimir_fast.ops import bf16_kernels
from mimir_fast.ops.bf16_kernels import packed
from mimir_fast.ops.layer_definitions import NO_NORM, BlockWeights, MlpWeights, Norm, keeps, plain_float32
from mimir_fast.ops.native_attention import self_attention_backward, self_attention_forward

Grads = tuple[Tensor | None, ...]


def takes(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether these ops compute what bf16 autocast would: it is on, on a CPU with AMX, and parameters are float32."""
    return (
        bf16_kernels.UNIT == "amx"
        and x.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and x.dtype in (torch.float32, torch.bfloat16)
        and plain_float32(*parameters)
        and not torch.compiler.is_compiling()
        and not _native.transformed()
    )


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
    out: Tensor = _Linear.apply(x, *(norm or NO_NORM), weight, bias, residual)
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, weight: Tensor,
        bias: Tensor | None, residual: Tensor | None,
    ) -> Tensor:  # fmt: skip
        norm = None if gamma is None or beta is None else Norm(gamma, beta, eps)
        panels, panels_back = packed(weight)
        out, statistics = bf16_kernels.linear_forward(x, norm, weight, bias, residual, panels)
        ctx.save_for_backward(x, gamma, beta, weight, statistics, panels_back)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Grads:
        x, gamma, beta, weight, statistics, panels_back = ctx.saved_tensors
        needs_x, needs_gamma, needs_beta, _, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad
        wants_norm = needs_gamma or needs_beta
        norm = None if gamma is None else Norm(gamma, beta, 0.0)  # eps is in the statistics
        dx, dgamma, dbeta, dweight, dbias = bf16_kernels.linear_backward(
            grad, x, norm, weight, statistics, panels_back,
            wants_x=needs_x or wants_norm, wants_norm=wants_norm, wants_weight=needs_weight or needs_bias,
        )  # fmt: skip
        return dx, dgamma, dbeta, None, dweight, dbias if needs_bias else None, grad if needs_residual else None


# y = [x +] W₂·gelu(W₁·LN(x) + b₁) + b₂


def mlp(
    x: Tensor, norm: Norm, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, *, residual: bool = True
) -> Tensor:
    """(…, K): in x's dtype with the residual, in bfloat16 without. Arguments as for `linear`."""
    parameters = (norm.weight, norm.bias, weight1, bias1, weight2, bias2)
    out: Tensor = _Mlp.apply(x, norm.eps, residual, keeps(x, *parameters), *parameters)
    return out


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, residual: bool, keep: bool, *parameters: Tensor) -> Tensor:
        norm, weights = Norm(parameters[0], parameters[1], eps), MlpWeights(*parameters[2:])
        packs = packed(weights.weight1), packed(weights.weight2)
        out, hidden, statistics = bf16_kernels.mlp_forward(x, norm, weights, packs, residual=residual, keep=keep)
        ctx.residual = residual
        ctx.save_for_backward(x, hidden, statistics, packs[0][1], packs[1][1], *parameters)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Grads:
        x, hidden, statistics, back1, back2, *parameters = ctx.saved_tensors
        wants = any(ctx.needs_input_grad[4:])
        dx, grads = bf16_kernels.mlp_backward(
            grad, x, Norm(parameters[0], parameters[1], 0.0), MlpWeights(*parameters[2:]), (back1, back2), hidden,
            statistics, residual=ctx.residual, wants_parameters=wants,
        )  # fmt: skip
        return dx, None, None, None, *(grads or (None,) * 6)


# y = x + W·attention(LN(x)) + b, then the mlp


def block(x_BTD: Tensor, weights: BlockWeights, num_heads: int, eps: float = 1e-6) -> Tensor:
    """(B, T, D) in x's dtype, where `native_attention` takes the heads."""
    out: Tensor = _Block.apply(x_BTD, num_heads, eps, keeps(x_BTD, *weights), *weights)
    return out


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, num_heads: int, eps: float, keep: bool, *weights: Tensor) -> Tensor:
        w = BlockWeights(*weights)
        packs = [packed(weight) for weight in (w.qkv, w.proj, w.weight1, w.weight2)]
        (norm1, norm2), mlp_weights = _norms(w, eps), MlpWeights(*w[8:])
        qkv, statistics1 = bf16_kernels.linear_forward(x, norm1, w.qkv, w.qkv_bias, None, packs[0][0])
        qkv = qkv.view(*x.shape[:2], 3, num_heads, -1)
        attended, lse = self_attention_forward(qkv)
        y, _ = bf16_kernels.linear_forward(attended.view(x.shape), None, w.proj, w.proj_bias, x, packs[1][0])
        out, hidden, statistics2 = bf16_kernels.mlp_forward(
            y, norm2, mlp_weights, (packs[2], packs[3]), residual=True, keep=keep
        )
        if keep:
            between = x, statistics1, qkv, attended, lse, y, statistics2, hidden
            ctx.save_for_backward(*between, *(back for _, back in packs), *weights)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Grads:
        x, statistics1, qkv, attended, lse, y, statistics2, hidden, *rest = ctx.saved_tensors
        backs, w = rest[:4], BlockWeights(*rest[4:])
        wants = any(ctx.needs_input_grad[4:])
        norm1, norm2 = _norms(w, 0.0)  # eps is in the statistics
        dy, mlp_grads = bf16_kernels.mlp_backward(
            grad, y, norm2, MlpWeights(*w[8:]), (backs[2], backs[3]), hidden, statistics2,
            residual=True, wants_parameters=wants,
        )  # fmt: skip
        rows = attended.view(x.shape)
        dattended, _, _, dproj, dproj_bias = bf16_kernels.linear_backward(
            dy, rows, None, w.proj, statistics1, backs[1], wants_x=True, wants_norm=False, wants_weight=wants
        )
        assert dattended is not None
        dqkv = self_attention_backward(dattended.view(attended.shape), qkv, attended, lse)
        dx, *first = bf16_kernels.linear_backward(
            dqkv.view(*x.shape[:2], -1), x, norm1, w.qkv, statistics1, backs[0],
            wants_x=True, wants_norm=wants, wants_weight=wants, along=dy,
        )  # fmt: skip
        grads = (*first, dproj, dproj_bias, *(mlp_grads or (None,) * 6))
        return (
            dx,
            None,
            None,
            None,
            *(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad[4:], strict=True)),
        )


def _norms(w: BlockWeights, eps: float) -> tuple[Norm, Norm]:
    return Norm(w.norm1, w.norm1_bias, eps), Norm(w.norm2, w.norm2_bias, eps)
