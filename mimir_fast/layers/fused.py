"""Layers of a transformer with what stands around them, as one differentiable op each, in the precision of `kernels`.

A block is one node of the graph: at these sizes the host's work between products is a good part of a step.
Differentiable any number of times: beyond the first through the definition. `torch.autograd.Function` and not
`torch.library`: its calls are cheaper, and torch.compile, which fuses layers by itself, never meets these.
Shapes as in `definitions.py`; of the block: (B, T, D), H heads of E.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mimir_fast.layers.definitions import (
    BlockWeights,
    Grads,
    Kernels,
    MlpWeights,
    Norm,
    block_reference,
    keeps,
    linear_reference,
    mlp_reference,
)
from mimir_fast.layers.inspection import calls
from mimir_fast.layers.native_attention import self_attention_backward, self_attention_forward
from mimir_fast.ops._op import differentiated_again


def linear(
    kernels: Kernels, x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm | None = None,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """[residual +] W·[LN](x) + b, (…, N), of what the kernels take."""
    calls[f"{kernels.NAME} linear"] += 1
    out: Tensor = _Linear.apply(kernels, x.contiguous(), *(norm or (None, None, 0.0)), weight, bias, residual)
    return out


def mlp(kernels: Kernels, x: Tensor, norm: Norm, weights: MlpWeights, *, residual: bool = True) -> Tensor:
    """[x +] W₂·gelu(W₁·LN(x) + b₁) + b₂, (…, K), of what the kernels take."""
    calls[f"{kernels.NAME} mlp"] += 1
    parameters = (norm.weight, norm.bias, *weights)
    out: Tensor = _Mlp.apply(kernels, x.contiguous(), norm.eps, residual, keeps(x, *parameters), *parameters)
    return out


def block(kernels: Kernels, x_BTD: Tensor, weights: BlockWeights, num_heads: int, eps: float = 1e-6) -> Tensor:
    """(B, T, D) in x's dtype, of what the kernels take, where `native_attention` takes the heads."""
    calls[f"{kernels.NAME} block"] += 1
    out: Tensor = _Block.apply(kernels, x_BTD.contiguous(), num_heads, eps, keeps(x_BTD, *weights), *weights)
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels, x: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, weight: Tensor,
        bias: Tensor | None, residual: Tensor | None,
    ) -> Tensor:  # fmt: skip
        out, kept = kernels.linear_forward(x, _norm(gamma, beta, eps), weight, bias, residual)
        ctx.kernels, ctx.eps = kernels, eps
        ctx.save_for_backward(x, gamma, beta, weight, bias, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, weight, bias, *kept = ctx.saved_tensors
        _, *needs_norm_and_x, _, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad
        needs = (*needs_norm_and_x, needs_weight, needs_bias)
        if differentiated_again(grad):

            def definition(x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
                return linear_reference(x, weight, bias, _norm(gamma, beta, ctx.eps))

            grads = _differentiable(ctx.kernels, definition, (x, gamma, beta, weight, bias), needs, grad)
        else:
            norm = _norm(gamma, beta, ctx.eps)
            grads = ctx.kernels.linear_backward(grad.contiguous(), x, norm, weight, tuple(kept), needs)
        return (None, *grads[:3], None, *grads[3:], grad if needs_residual else None)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels, x: Tensor, eps: float, residual: bool, keep: bool, *parameters: Tensor
    ) -> Tensor:
        norm, weights = Norm(parameters[0], parameters[1], eps), MlpWeights(*parameters[2:])
        out, kept = kernels.mlp_forward(x, norm, weights, residual=residual, keep=keep)
        ctx.kernels, ctx.eps, ctx.residual = kernels, eps, residual
        ctx.save_for_backward(x, *parameters, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, *rest = ctx.saved_tensors
        weights, kept, norm = MlpWeights(*rest[:4]), tuple(rest[4:]), Norm(gamma, beta, ctx.eps)
        needs = (ctx.needs_input_grad[1], *ctx.needs_input_grad[5:])
        if differentiated_again(grad):

            def definition(x: Tensor, gamma: Tensor, beta: Tensor, *weights: Tensor) -> Tensor:
                weight1, bias1, weight2, bias2 = weights
                return mlp_reference(x, Norm(gamma, beta, ctx.eps), weight1, bias1, weight2, bias2, ctx.residual)

            grads = _differentiable(ctx.kernels, definition, (x, gamma, beta, *weights), needs, grad)
        else:
            grads = ctx.kernels.mlp_backward(
                grad.contiguous(), x, norm, weights, kept, residual=ctx.residual, needs=needs
            )
        return (None, grads[0], None, None, None, *grads[1:])


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels, x: Tensor, num_heads: int, eps: float, keep: bool, *weights: Tensor
    ) -> Tensor:
        w = BlockWeights(*weights)
        qkv, kept1 = kernels.linear_forward(x, Norm(w.norm1, w.norm1_bias, eps), w.qkv, w.qkv_bias, None)
        qkv = qkv.view(*x.shape[:2], 3, num_heads, -1)
        attended, lse = self_attention_forward(qkv)
        y, kept2 = kernels.linear_forward(attended.view(x.shape), None, w.proj, w.proj_bias, x)
        norm2 = Norm(w.norm2, w.norm2_bias, eps)
        out, kept3 = kernels.mlp_forward(y, norm2, MlpWeights(*w[8:]), residual=True, keep=keep)
        ctx.kernels, ctx.eps, ctx.num_heads = kernels, eps, num_heads
        ctx.ends = len(kept1), len(kept1) + len(kept2)
        if keep:
            ctx.save_for_backward(*weights, x, qkv, attended, lse, y, *kept1, *kept2, *kept3)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        weights, (x, qkv, attended, lse, y, *kept) = saved[:12], saved[12:]
        needs = (ctx.needs_input_grad[1], *ctx.needs_input_grad[5:])
        if differentiated_again(grad):

            def definition(x: Tensor, *weights: Tensor) -> Tensor:
                return block_reference(x, BlockWeights(*weights), ctx.num_heads, ctx.eps)

            grads = _differentiable(ctx.kernels, definition, (x, *weights), needs, grad)
            return (None, grads[0], None, None, None, *grads[1:])
        kernels, w, (end1, end2) = ctx.kernels, BlockWeights(*weights), ctx.ends
        norm1, norm2 = Norm(w.norm1, w.norm1_bias, ctx.eps), Norm(w.norm2, w.norm2_bias, ctx.eps)
        dy, *of_mlp = kernels.mlp_backward(
            grad.contiguous(), y, norm2, MlpWeights(*w[8:]), tuple(kept[end2:]), residual=True, needs=(True, *needs[7:])
        )
        rows = attended.view(x.shape)
        dattended, _, _, *of_proj = kernels.linear_backward(
            dy, rows, None, w.proj, tuple(kept[end1:end2]), (True, False, False, *needs[5:7])
        )
        dqkv = self_attention_backward(dattended.view(attended.shape), qkv, attended, lse)
        dx, *of_qkv = kernels.linear_backward(
            dqkv.view(*x.shape[:2], -1), x, norm1, w.qkv, tuple(kept[:end1]), (True, *needs[1:5]), along=dy
        )
        return (None, dx, None, None, None, *of_qkv, *of_proj, *of_mlp)


def _norm(gamma: Tensor | None, beta: Tensor | None, eps: float) -> Norm | None:
    return None if gamma is None or beta is None else Norm(gamma, beta, eps)


def _differentiable(
    kernels: Kernels, definition: Callable[..., Tensor], inputs: Sequence[Tensor | None], needs: Sequence[bool],
    grad: Tensor,
) -> Grads:  # fmt: skip
    """The gradients as a graph of their own (create_graph), which the definition gives."""
    with torch.enable_grad(), kernels.precision():
        # A view of each, because one tensor may be given twice (tied weights) and each place has its own gradient.
        inputs = [t.view_as(t) if needed and t is not None else t for t, needed in zip(inputs, needs, strict=True)]
        wanted = [t for t, needed in zip(inputs, needs, strict=True) if needed and t is not None]
        out = definition(*inputs)
    found = iter(
        torch.autograd.grad(out, wanted, grad.to(out.dtype), create_graph=torch.is_grad_enabled()) if wanted else ()
    )
    return [next(found) if needed else None for needed in needs]
