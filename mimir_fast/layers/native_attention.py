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
from mimir_fast.ops._op import differentiated_again, gradients_of, register_op

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
    """(B, T, H, E) of one dtype that `takes`; differentiable any number of times."""
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


def _definition(q_BTHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor) -> tuple[Tensor, Tensor]:
    return native_attention_reference(q_BTHE, k_BSHE, v_BSHE), q_BTHE.new_empty(0)


@register_op("native_attention", _definition)
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


def _backward(ctx: Any, grad_BTHE: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse = ctx.saved_tensors
    if differentiated_again(grad_BTHE):
        return tuple(gradients_of(native_attention_reference, (q, k, v), ctx.needs_input_grad, (grad_BTHE,)))
    return _attention_backward(grad_BTHE, q, k, v, out, lse)


_attention.register_autograd(_backward, setup_context=_save_for_backward)


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


def _self_definition(qkv_BT3HE: Tensor) -> tuple[Tensor, Tensor]:
    return _definition(*qkv_BT3HE.unbind(2))


_self_attention = register_op("native_self_attention", _self_definition)(self_attention_forward)
_self_attention.register_fake(_self_attention_fake)
_self_attention_backward = torch.library.custom_op(
    "mimir_fast::native_self_attention_backward", self_attention_backward, mutates_args=()
)


@_self_attention_backward.register_fake
def _(grad_BTHE: Tensor, qkv_BT3HE: Tensor, out_BTHE: Tensor, lse_BHT: Tensor) -> Tensor:
    return qkv_BT3HE.new_empty(qkv_BT3HE.shape)


def _self_backward(ctx: Any, grad_BTHE: Tensor, _: Tensor | None) -> Tensor | None:
    qkv, out, lse = ctx.saved_tensors
    if differentiated_again(grad_BTHE):
        return gradients_of(lambda qkv: _self_definition(qkv)[0], (qkv,), (True,), (grad_BTHE,))[0]
    return _self_attention_backward(grad_BTHE, qkv, out, lse)


_self_attention.register_autograd(_self_backward, setup_context=_save_for_backward)
