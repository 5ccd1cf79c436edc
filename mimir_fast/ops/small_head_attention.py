"""Softmax attention for heads of 8 numbers on the CPU, where general kernels are slow: the light decoder has 16 such.

    o = softmax(q kᵀ/√E) v

C++ only (csrc/small_head_attention.cpp); `models/attention.py` decides who computes what. The forward pass keeps the
log-sum-exp of each query's scores, so that the backward pass needs no T×S matrix either.
Shapes: B images, T queries, S keys, H heads, E = 8 numbers a head.
"""

from typing import Any

import torch
from torch import Tensor

from mimir_fast import _native
from mimir_fast.ops.rbf import differentiate_twice

HEAD_DIM = 8
_BUILT = _native.has("small_head_attention")  # asked once: torch.compile cannot trace the question


def small_head_attention_reference(q_BTHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor) -> Tensor:
    """The definition; the kernel is tested against it."""
    scores = torch.einsum("bthe,bshe->bhts", q_BTHE, k_BSHE) / q_BTHE.shape[-1] ** 0.5
    return torch.einsum("bhts,bshe->bthe", scores.softmax(dim=-1), v_BSHE)


def takes(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernel computes these: on the CPU, float32, E = 8, and the extension was built."""
    return device.type == "cpu" and dtype == torch.float32 and head_dim == HEAD_DIM and _BUILT


def small_head_attention(q_BTHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor) -> Tensor:
    """(B, T, H, E) for what `takes`; differentiable twice."""
    return _attention(q_BTHE, k_BSHE, v_BSHE)[0]


def _dense_heads(tokens: Tensor) -> Tensor:
    """The tensor itself if the heads of a token lie in one piece, as in a slice of a fused projection; else a copy."""
    return tokens if tokens.stride()[2:] == (HEAD_DIM, 1) else tokens.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


@torch.library.custom_op("mimir_fast::small_head_attention", mutates_args=())
def _attention(q_BTHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp of the scores (B, H, T)."""
    q, k, v = (_dense_heads(t) for t in (q_BTHE, k_BSHE, v_BSHE))
    (B, T, H, _), S = q.shape, k.shape[1]
    out, lse = q.new_empty(q.shape), q.new_empty((B, H, T))
    _native.run("small_head_attention", q, k, v, out, lse, B, T, S, H, _strides(q, k, v))
    return out, lse


@_attention.register_fake
def _(q_BTHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q_BTHE.shape
    return q_BTHE.new_empty(q_BTHE.shape), q_BTHE.new_empty((B, H, T))


@torch.library.custom_op("mimir_fast::small_head_attention_backward", mutates_args=())
def _attention_backward(
    grad_BTHE: Tensor, q_BTHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor, out_BTHE: Tensor, lse_BHT: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad = grad_BTHE.contiguous()
    q, k, v = (_dense_heads(t) for t in (q_BTHE, k_BSHE, v_BSHE))
    (B, T, H, _), S = q.shape, k.shape[1]
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    tensors = (grad, q, k, v, out_BTHE, lse_BHT, dq, dk, dv)
    _native.run("small_head_attention_backward", *tensors, B, T, S, H, _strides(q, k, v))
    return dq, dk, dv


@_attention_backward.register_fake
def _(
    grad_BTHE: Tensor, q_BTHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor, out_BTHE: Tensor, lse_BHT: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (t.new_empty(t.shape) for t in (q_BTHE, k_BSHE, v_BSHE))
    return dq, dk, dv


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_BTHE: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return _attention_backward(grad_BTHE, *ctx.saved_tensors)


_attention.register_autograd(_backward, setup_context=_save_for_backward)


def _save_for_second(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:4])


def _second_backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    grad, *inputs = ctx.saved_tensors
    to_inputs, (to_grad,) = differentiate_twice(small_head_attention_reference, inputs, (grad,), cotangents)
    return (to_grad, *to_inputs, None, None)


_attention_backward.register_autograd(_second_backward, setup_context=_save_for_second)
