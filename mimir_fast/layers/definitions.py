"""What the linear layers of a transformer compute together with what stands around them.

    linear:  y = [r +] W·[LN](x) + b
    mlp:     y = [x +] W₂·gelu(W₁·LN(x) + b₁) + b₂
    block:   y = x + W·attention(LN(x)) + b, then the mlp

The definitions of the fused ops (`fused.py`), and the interface of the kernels behind them (`_fp32.py`, `_bf16.py`).
Shapes: x (…, K), r and y (…, N), W (N, K); of the mlp: W₁ (H, K), W₂ (K, H); of the block: (B, T, D).
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mimir_fast.layers.native_attention import native_attention_reference


class Norm(NamedTuple):
    """A layer normalisation in front: weight (K,), bias (K,), float32."""

    weight: Tensor
    bias: Tensor
    eps: float


class MlpWeights(NamedTuple):
    """W₁ (H, K), b₁ (H,), W₂ (K, H), b₂ (K,), float32."""

    weight1: Tensor
    bias1: Tensor
    weight2: Tensor
    bias2: Tensor


class BlockWeights(NamedTuple):
    """All parameters of a block, float32: norms (D,), qkv (3D, D), proj (D, D), the MLP's (H, D) and (D, H)."""

    norm1: Tensor
    norm1_bias: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    proj: Tensor
    proj_bias: Tensor | None
    norm2: Tensor
    norm2_bias: Tensor
    weight1: Tensor
    bias1: Tensor
    weight2: Tensor
    bias2: Tensor


_PLAIN = (Tensor, torch.nn.Parameter)
Kept = tuple[Tensor | None, ...]
"""What a forward pass keeps for the backward pass, beside its inputs."""
Grads = list[Tensor | None]


class Kernels(Protocol):
    """Forward and backward passes in one precision, without autograd. Inputs are dense."""

    NAME: str

    def takes(self, x: Tensor, residual: Tensor | None, *parameters: Tensor | None) -> bool:
        """Whether the passes compute with these, in the present autocast state."""

    def precision(self) -> AbstractContextManager[object]:
        """Around a definition, so that it computes in this precision."""

    def linear_forward(
        self, x: Tensor, norm: Norm | None, weight: Tensor, bias: Tensor | None, residual: Tensor | None
    ) -> tuple[Tensor, Kept]:
        """y (…, N), in the residual's dtype if there is one."""

    def linear_backward(
        self, grad: Tensor, x: Tensor, norm: Norm | None, weight: Tensor, kept: Kept, needs: Sequence[bool],
        along: Tensor | None = None,
    ) -> Grads:  # fmt: skip
        """Of x, the norm's weight and bias, weight, bias, where needed; `along` is added to x's, behind a norm only."""

    def mlp_forward(
        self, x: Tensor, norm: Norm, weights: MlpWeights, *, residual: bool, keep: bool
    ) -> tuple[Tensor, Kept]:
        """y (…, K); nothing is kept without `keep`."""

    def mlp_backward(
        self, grad: Tensor, x: Tensor, norm: Norm, weights: MlpWeights, kept: Kept, *, residual: bool,
        needs: Sequence[bool],
    ) -> Grads:  # fmt: skip
        """Of x, the norm's weight and bias, W₁, b₁, W₂, b₂, where needed."""


def linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm | None = None, residual: Tensor | None = None
) -> Tensor:
    """The definition of `linear`."""
    if norm is not None:
        x = F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    y = F.linear(x, weight, bias)
    return y if residual is None else residual + y


def mlp_reference(
    x: Tensor, norm: Norm, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, residual: bool = True
) -> Tensor:
    """The definition of `mlp`."""
    y = F.linear(F.gelu(linear_reference(x, weight1, bias1, norm)), weight2, bias2)
    return x + y if residual else y


def block_reference(x_BTD: Tensor, weights: BlockWeights, num_heads: int, eps: float = 1e-6) -> Tensor:
    """The definition of `block`."""
    B, T, D = x_BTD.shape
    w = weights
    qkv = linear_reference(x_BTD, w.qkv, w.qkv_bias, Norm(w.norm1, w.norm1_bias, eps))
    attended = native_attention_reference(*qkv.view(B, T, 3, num_heads, -1).unbind(2)).reshape(B, T, D)
    x = linear_reference(attended, w.proj, w.proj_bias, residual=x_BTD)
    return mlp_reference(x, Norm(w.norm2, w.norm2_bias, eps), *w[8:])


def plain_float32(*tensors: Tensor | None) -> bool:
    """Whether kernels may read these where they lie: float32, vectors dense, and no subclass, as sharded parameters."""
    return all(
        t is None or (type(t) in _PLAIN and t.dtype == torch.float32 and (t.dim() != 1 or t.is_contiguous()))
        for t in tensors
    )


def keeps(*tensors: Tensor | None) -> bool:
    """Whether there will be a backward pass, and something to keep for it."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
