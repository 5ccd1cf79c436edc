"""The pre-norm block of a ViT as one op, where everything in it is plain and the fastest attention is our own.

Shapes: B batch, T tokens, D width, H heads.
"""

from typing import cast

import torch
from torch import Tensor, nn

from mimir_fast.layers import fused
from mimir_fast.layers.attention import self_attention_kernel
from mimir_fast.layers.definitions import BlockWeights, keeps
from mimir_fast.layers.inspection import is_plain
from mimir_fast.layers.linear import kernels_for, mlp_weights
from mimir_fast.layers.norms import LayerNorm


def fused_block(
    norm1: nn.Module, qkv: nn.Module, proj: nn.Module, norm2: nn.Module, mlp: nn.Module, x_BTD: Tensor, num_heads: int,
    domain: int,
) -> Tensor | None:  # fmt: skip
    """x + proj(attention(qkv(norm1(x)))), then + mlp(norm2(…)), (B, T, D); None where the modules have to be called.

    Args:
        domain: whose norms, see norms.py.
    """
    if kernels_for(x_BTD, None) is None or (of_mlp := mlp_weights(mlp)) is None:
        return None
    if not is_plain(LayerNorm, norm1, norm2) or not is_plain(nn.Linear, qkv, proj):
        return None
    first, second = (cast(LayerNorm, norm).of(domain) for norm in (norm1, norm2))
    q, p = cast(nn.Linear, qkv), cast(nn.Linear, proj)
    weights = BlockWeights(*first[:2], q.weight, q.bias, p.weight, p.bias, *second[:2], *of_mlp)
    kernels = kernels_for(x_BTD, None, *weights)
    if kernels is None or first[2] != second[2]:
        return None
    (_, T, D), H = x_BTD.shape, num_heads
    dtype = torch.bfloat16 if kernels.NAME == "bf16" else torch.float32
    if self_attention_kernel(x_BTD.device, dtype, T, H, D // H, keeps(x_BTD, *weights)) != "native":
        return None
    return fused.block(kernels, x_BTD, weights, num_heads, first[2])
