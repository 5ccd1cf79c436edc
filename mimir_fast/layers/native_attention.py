"""Softmax attention on the CPU where general kernels are slow: short sequences, small heads.

    o = softmax(q kᵀ/√E) v

C++ only, two kernels: bfloat16 by matrix units (csrc/bf16_attention.cpp: AMX, or AVX-512's bf16 products), and float32
(csrc/fp32_attention.cpp: the widest vectors there are). Both keep the log-sum-exp of each query's scores, so that the
backward pass needs no T×S matrix either. `choice.py` finds out where they are the fastest.
Shapes: B images, T queries, S keys, H heads, E numbers a head.
"""

from typing import Any

import torch
from torch import Tensor

from mimir_fast import _native
from mimir_fast.ops._autograd import differentiate_twice

# Asked once: torch.compile cannot trace the questions. What computes: a matrix unit, vectors of so many numbers.
_BF16_UNIT = _native.run("bf16_unit") if _native.has("bf16_attention") else ""
_FP32_LANES = _native.run("fp32_lanes") if _native.has("fp32_attention") else 0
LARGEST_HEAD = 128


def native_attention_reference(q_BTHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor) -> Tensor:
    """The definition; the kernels are tested against it."""
    scores = torch.einsum("bthe,bshe->bhts", q_BTHE, k_BSHE) / q_BTHE.shape[-1] ** 0.5
    return torch.einsum("bhts,bshe->bthe", scores.softmax(dim=-1), v_BSHE)


def takes(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether a kernel computes these: on the CPU, float32 or bfloat16 with E = 8, 16, … 128."""
    there = {torch.float32: bool(_FP32_LANES), torch.bfloat16: bool(_BF16_UNIT)}.get(dtype, False)
    return there and device.type == "cpu" and head_dim % 8 == 0 and 0 < head_dim <= LARGEST_HEAD


def native_attention(q_BTHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor) -> Tensor:
    """(B, T, H, E) of one dtype that `takes`; differentiable twice."""
    return _attention(q_BTHE, k_BSHE, v_BSHE)[0]


def native_self_attention(qkv_BT3HE: Tensor) -> Tensor:
    """(B, T, H, E) of q, k and v in one tensor, as a fused projection gives them: so does the gradient come back."""
    return _self_attention(qkv_BT3HE)[0]


def _dense_heads(tokens: Tensor) -> Tensor:
    """The tensor itself if the heads of a token lie in one piece, as in a slice of a fused projection; else a copy."""
    return tokens if tokens.stride()[2:] == (tokens.shape[3], 1) else tokens.contiguous()


def _run(
    suffix: str, q: Tensor, k: Tensor, v: Tensor, before: tuple[Tensor, ...], after: tuple[Tensor, ...],
    grads: tuple[Tensor, ...] = (),
) -> None:  # fmt: skip
    (B, T, H, E), S = q.shape, k.shape[1]
    strides = [stride for tensor in (q, k, v, *grads) for stride in tensor.stride()[:2]]
    kernel, unit = ("bf16", _BF16_UNIT == "amx") if q.dtype == torch.bfloat16 else ("fp32", _FP32_LANES)
    _native.run(f"{kernel}_attention{suffix}", *before, q, k, v, *after, *grads, B, T, S, H, E, strides, unit)


@torch.library.custom_op("mimir_fast::native_attention", mutates_args=())
def _attention(q_BTHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the log-sum-exp of the scores (B, H, T) in float32."""
    q, k, v = (_dense_heads(t) for t in (q_BTHE, k_BSHE, v_BSHE))
    B, T, H, _ = q.shape
    out, lse = q.new_empty(q.shape), q.new_empty((B, H, T), dtype=torch.float32)
    _run("", q, k, v, (), (out, lse))
    return out, lse


@_attention.register_fake
def _(q_BTHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q_BTHE.shape
    return q_BTHE.new_empty(q_BTHE.shape), q_BTHE.new_empty((B, H, T), dtype=torch.float32)


@torch.library.custom_op("mimir_fast::native_attention_backward", mutates_args=())
def _attention_backward(
    grad_BTHE: Tensor, q_BTHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor, out_BTHE: Tensor, lse_BHT: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (_dense_heads(t) for t in (q_BTHE, k_BSHE, v_BSHE))
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    _run("_backward", q, k, v, (grad_BTHE.contiguous(),), (out_BTHE, lse_BHT), (dq, dk, dv))
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
    to_inputs, (to_grad,) = differentiate_twice(native_attention_reference, inputs, (grad,), cotangents)
    return (to_grad, *to_inputs, None, None)


_attention_backward.register_autograd(_second_backward, setup_context=_save_for_second)


# The same on q, k and v in one tensor: their gradients are written side by side, where three would be copied together.


def self_attention_forward(qkv_BT3HE: Tensor) -> tuple[Tensor, Tensor]:
    """As `_attention`: (B, T, H, E) and the log-sum-exp (B, H, T)."""
    qkv = qkv_BT3HE.contiguous()
    out, lse = _self_attention_fake(qkv)
    q, k, v = qkv.unbind(2)
    _run("", q, k, v, (), (out, lse))
    return out, lse


def _self_attention_fake(qkv_BT3HE: Tensor) -> tuple[Tensor, Tensor]:
    B, T, _, H, E = qkv_BT3HE.shape
    return qkv_BT3HE.new_empty((B, T, H, E)), qkv_BT3HE.new_empty((B, H, T), dtype=torch.float32)


def self_attention_backward(grad_BTHE: Tensor, qkv_BT3HE: Tensor, out_BTHE: Tensor, lse_BHT: Tensor) -> Tensor:
    """(B, T, 3, H, E)."""
    qkv = qkv_BT3HE.contiguous()
    grads = torch.empty_like(qkv)
    q, k, v = qkv.unbind(2)
    _run("_backward", q, k, v, (grad_BTHE.contiguous(),), (out_BTHE, lse_BHT), grads.unbind(2))
    return grads


_self_attention = torch.library.custom_op("mimir_fast::native_self_attention", self_attention_forward, mutates_args=())
_self_attention.register_fake(_self_attention_fake)
_self_attention_backward = torch.library.custom_op(
    "mimir_fast::native_self_attention_backward", self_attention_backward, mutates_args=()
)


@_self_attention_backward.register_fake
def _(grad_BTHE: Tensor, qkv_BT3HE: Tensor, out_BTHE: Tensor, lse_BHT: Tensor) -> Tensor:
    return qkv_BT3HE.new_empty(qkv_BT3HE.shape)


_self_attention.register_autograd(
    lambda ctx, grad, _: _self_attention_backward(grad, *ctx.saved_tensors), setup_context=_save_for_backward
)


def _self_save_for_second(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _self_second_backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
    grad, qkv = ctx.saved_tensors

    def definition(qkv: Tensor) -> Tensor:
        return native_attention_reference(*qkv.unbind(2))

    (to_qkv,), (to_grad,) = differentiate_twice(definition, (qkv,), (grad,), (cotangent,))
    return to_grad, to_qkv, None, None


_self_attention_backward.register_autograd(_self_second_backward, setup_context=_self_save_for_second)
