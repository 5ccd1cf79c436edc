"""The pre-norm transformer block of ViT, with timm's parameter names.

Shapes: B batch, T tokens, Q queried tokens, D width, H heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimir_fast.models.attention import attention
from mimir_fast.ops.patches import gather_patches


class Attention(nn.Module):
    """Multi-head self-attention with one fused qkv projection."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not divisible by {num_heads} heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BTD: Tensor, queries_BQD: Tensor | None = None) -> Tensor:
        """(B, T, D); or (B, Q, D) when only the tokens `queries_BQD` ask, while all T are attended to."""
        B, T, D = x_BTD.shape
        heads = (self.num_heads, D // self.num_heads)
        if queries_BQD is None:
            q, k, v = self.qkv(x_BTD).view(B, T, 3, *heads).unbind(2)
        else:
            weight, bias = self.qkv.weight, self.qkv.bias
            q = F.linear(queries_BQD, weight[:D], bias[:D]).view(B, -1, *heads)
            k, v = F.linear(x_BTD, weight[D:], bias[D:]).view(B, T, 2, *heads).unbind(2)
        return self.proj(attention(q, k, v).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with GELU between."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class DropPath(nn.Module):
    """Stochastic depth: the whole branch of a sample is dropped with probability `rate` (arXiv 1603.09382)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        shape = (len(x),) + (1,) * (x.ndim - 1)
        return x * torch.empty(shape, dtype=x.dtype, device=x.device).bernoulli_(keep).div_(keep)


class Block(nn.Module):
    """x + Attention(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x_BTD: Tensor, query_ids_BQ: Tensor | None = None) -> Tensor:
        """(B, T, D); with `query_ids_BQ` only those tokens are computed: (B, Q, D), equal to gathering afterwards.

        The last block of a decoder needs its output at the masked tokens only, so q, proj and the MLP run on those.
        """
        normed = self.norm1(x_BTD)
        if query_ids_BQ is None:
            x = x_BTD + self.drop_path(self.attn(normed))
        else:
            queries = gather_patches(normed, query_ids_BQ)
            x = gather_patches(x_BTD, query_ids_BQ) + self.drop_path(self.attn(normed, queries))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def init_like_mae(module: nn.Module) -> None:
    """Xavier-uniform linear layers, zero biases, unit norms (MAE's initialisation); to be used with `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
