"""The pre-norm transformer block of ViT, with timm's parameter names.

Shapes: B batch, N patches of P numbers, T tokens, Q queried tokens, S tokens that stay, D width, H heads.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimir_fast.models.attention import attention, self_attention, self_attention_kernel
from mimir_fast.models.branches import LayerBranches, shape_branch
from mimir_fast.models.freezable import Freezable
from mimir_fast.models.norms import CLEAN, LayerNorm
from mimir_fast.models.projections import Mlp as Mlp
from mimir_fast.models.projections import project, project_by
from mimir_fast.ops import bf16_layers
from mimir_fast.ops.layer_definitions import BlockWeights, keeps
from mimir_fast.ops.patches import gather_patches


def check_heads(dim: int, num_heads: int) -> None:
    """Raises ValueError when the heads do not divide the width."""
    if dim % num_heads:
        raise ValueError(f"width {dim} is not divisible by {num_heads} heads")


def project_queries(
    qkv: nn.Linear, queries_BQD: Tensor, x_BTD: Tensor, heads: tuple[int, int], norm: LayerNorm | None = None,
    domain: int = CLEAN,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q (B, Q, H, E) of the queries, k and v (B, T, H, E) of all tokens, from one fused projection.

    Args:
        norm: of both, where they come without.
    """
    D, bias = x_BTD.shape[2], qkv.bias
    q_bias, kv_bias = (None, None) if bias is None else (bias[:D], bias[D:])
    q = project_by(qkv.weight[:D], q_bias, queries_BQD, norm=norm, domain=domain).unflatten(-1, heads)
    kv = project_by(qkv.weight[D:], kv_bias, x_BTD, norm=norm, domain=domain)
    k, v = kv.unflatten(-1, (2, *heads)).unbind(2)
    return q, k, v


class Attention(nn.Module):
    """Multi-head self-attention with one fused qkv projection."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x_BTD: Tensor, queries_BQD: Tensor | None = None, *, norm: LayerNorm | None = None, domain: int = CLEAN,
        residual: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """(B, T, D); or (B, Q, D) when only the tokens `queries_BQD` ask, while all T are attended to.

        Args:
            norm: in front, of tokens and queries.
            residual: added to the output, of its shape.
        """
        B, T, D = x_BTD.shape
        heads = (self.num_heads, D // self.num_heads)
        if queries_BQD is None:
            qkv = project(self.qkv, x_BTD, norm=norm, domain=domain).view(B, T, 3, *heads)
            attended = self_attention(qkv)
        else:
            attended = attention(*project_queries(self.qkv, queries_BQD, x_BTD, heads, norm, domain))
        return project(self.proj, attended.flatten(2), residual=residual)


class PatchEmbed(nn.Module):
    """The patch projection: a convolution by name and shape (timm's), a matrix product by work.

    On CUDA it stays a convolution, which cuDNN computes in TF32 unless torch.backends.cudnn.allow_tf32 is off, as it
    is in evaluations; the authors' code does the same. A pixel x is rounded by 2⁻¹¹·x at most, a 64th of ε = 8/255
    (bf16: an 8th); with the weights' rounding a token is off by 2⁻¹⁰·Σ|w| at most, where ε can move it by ε·Σ|w|.
    """

    def __init__(self, channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch_size, patch_size)
        nn.init.xavier_uniform_(self.proj.weight.data.flatten(1))
        nn.init.zeros_(cast(Tensor, self.proj.bias))

    def forward(self, patches_BNP: Tensor) -> Tensor:
        """(B, N, D) tokens of patches in (row, column, channel) order."""
        weight_DP = self.proj.weight.permute(0, 2, 3, 1).flatten(1)
        product = convolve if patches_BNP.device.type == "cuda" else F.linear
        return product(patches_BNP.to(weight_DP.dtype), weight_DP, self.proj.bias)


def convolve(x_BNP: Tensor, weight_DP: Tensor, bias_D: Tensor | None) -> Tensor:
    """`F.linear` as a 1 × 1 convolution, (B, N, D). Both are in channels-last order: nothing is copied."""
    y_BD1N = F.conv2d(x_BNP.transpose(1, 2).unsqueeze(2), weight_DP[..., None, None], bias_D)
    return y_BD1N.squeeze(2).transpose(1, 2)


class Layer(Freezable, nn.Module):
    """Base of what is compiled and sharded one by one."""


class Block(Layer):
    """x + Attention(LN(x)), then x + MLP(LN(x))."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, qkv_bias: bool = True) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self, x_BTD: Tensor, *, query_ids_BQ: Tensor | None = None, num_keep: int | None = None, domain: int = CLEAN,
        branches: LayerBranches | None = None,
    ) -> Tensor:  # fmt: skip
        """(B, T, D); (B, Q, D) with `query_ids_BQ`; (B, S, D) with S = `num_keep` below T.

        Args:
            query_ids_BQ: only these tokens are computed, equal to gathering afterwards. The last block of a decoder
                needs its output at the masked tokens only, so q, proj and the MLP run on those.
            num_keep: tokens that stay after the attention, cls among them: those with the most attention on them.
            domain: whose norms, see norms.py.
            branches: what happens to the attention and the MLP branch, see branches.py.
        """
        self.branch_on_frozen()
        plain = branches is None and query_ids_BQ is None and num_keep is None
        if plain and (weights := self._as_one_op(x_BTD, domain)) is not None:
            return bf16_layers.block(x_BTD, weights, self.attn.num_heads, self.norm1.eps)
        if num_keep is not None and num_keep < x_BTD.shape[1]:
            attended, received_BT = attend_and_rank(self.attn, self.norm1(x_BTD, domain))
            x = gather_patches(x_BTD + shape_branch(attended, branches, 0), most_attended(received_BT, num_keep))
        else:
            # Only what is asked for goes through q, proj and the MLP; norms are per token, so they may come after.
            queries = None if query_ids_BQ is None else gather_patches(x_BTD, query_ids_BQ)
            x = x_BTD if queries is None else queries
            if branches is None:
                x = self.attn(x_BTD, queries, norm=self.norm1, domain=domain, residual=x)
            else:
                attended = self.attn(x_BTD, queries, norm=self.norm1, domain=domain)
                x = x + shape_branch(attended, branches, 0)
        if branches is None:
            return self.mlp.after(self.norm2, x, domain, residual=True)
        return x + shape_branch(self.mlp.after(self.norm2, x, domain), branches, 1)

    def _as_one_op(self, x_BTD: Tensor, domain: int) -> BlockWeights | None:
        """The weights, where ops/bf16_layers.py computes the whole block with the attention kernel that is fastest."""
        if not bf16_layers.takes(x_BTD):
            return None
        attn, mlp = self.attn, self.mlp
        weights = BlockWeights(
            *self.norm1.of(domain)[:2], attn.qkv.weight, attn.qkv.bias, attn.proj.weight, attn.proj.bias,
            *self.norm2.of(domain)[:2], mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias,
        )  # fmt: skip
        if not bf16_layers.takes(x_BTD, *weights):
            return None
        (_, T, D), H = x_BTD.shape, attn.num_heads
        kernel = self_attention_kernel(x_BTD.device, torch.bfloat16, T, H, D // H, keeps(x_BTD, *weights))
        return weights if kernel == "native" else None


def attend_and_rank(attn: Attention, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """The attention's output (B, T, D), and (B, T) fp32: what each token received, summed over heads and queries.

    The fused kernels do not give out the probabilities, so they are computed in the open.
    """
    B, T, D = x_BTD.shape
    q, k, v = attn.qkv(x_BTD).view(B, T, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    probs_BHTT = (q @ k.transpose(-2, -1) * (D // attn.num_heads) ** -0.5).float().softmax(dim=-1)
    out = (probs_BHTT.to(v.dtype) @ v).transpose(1, 2).flatten(2)
    return attn.proj(out), probs_BHTT.sum(dim=(1, 2))


def most_attended(received_BT: Tensor, num_keep: int) -> Tensor:
    """(B, num_keep) int64 ascending: cls (token 0) and the patch tokens with the most attention; ties to the first."""
    order = received_BT[:, 1:].detach().argsort(dim=1, descending=True, stable=True)
    kept = order[:, : num_keep - 1].sort(dim=1).values + 1
    return F.pad(kept, (1, 0), value=0)


def init_like_mae(module: nn.Module) -> None:
    """Xavier-uniform linear layers, zero biases, unit norms (MAE's initialisation); to be used with `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
