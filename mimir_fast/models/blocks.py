"""The pre-norm transformer block of ViT, and what its relatives share with it, with timm's parameter names.

Shapes: B batch, N patches of P numbers, T tokens, Q queried tokens, S tokens that stay, D width, H heads.
"""

from typing import cast

import torch
from torch import Tensor, nn

from mimir_fast.layers.attention import attention, self_attention
from mimir_fast.layers.block import fused_block
from mimir_fast.layers.convolution import conv_of_squares
from mimir_fast.layers.inspection import fusible, is_plain
from mimir_fast.layers.linear import Mlp as Mlp
from mimir_fast.layers.linear import linear, linear_by, norm_mlp
from mimir_fast.layers.norms import CLEAN, LayerNorm, normalise
from mimir_fast.models.branches import LayerBranches, shape_branch
from mimir_fast.ops.patches import gather_patches
from mimir_fast.ops.positions import behind_prefix


def check_heads(dim: int, num_heads: int) -> None:
    """Raises ValueError when the heads do not divide the width."""
    if dim % num_heads:
        fits = sorted((n for n in range(1, dim + 1) if dim % n == 0), key=lambda n: abs(n - num_heads))[:4]
        raise ValueError(
            f"width {dim} is not divisible by {num_heads} heads; heads that fit: {', '.join(map(str, sorted(fits)))}"
        )


def project_queries(
    qkv: nn.Module, x_BTD: Tensor, query_ids_BQ: Tensor, heads: tuple[int, int], norm: nn.Module | None = None,
    domain: int = CLEAN,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q (B, Q, H, E) of the queried tokens, k and v (B, T, H, E) of all, from one fused projection.

    Args:
        norm: in front, where the tokens come without.
    """
    D = x_BTD.shape[2]
    if not is_plain(nn.Linear, qkv):  # nothing is known of it but that it gives q, k and v
        q, k, v = linear(qkv, x_BTD, norm=norm, domain=domain).unflatten(-1, (3, D)).unbind(2)
        q = gather_patches(q, query_ids_BQ)
        return q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads)
    weight, bias = cast(nn.Linear, qkv).weight, cast(nn.Linear, qkv).bias
    q_bias, kv_bias = (None, None) if bias is None else (bias[:D], bias[D:])
    q = linear_by(weight[:D], q_bias, gather_patches(x_BTD, query_ids_BQ), norm=norm, domain=domain)
    kv = linear_by(weight[D:], kv_bias, x_BTD, norm=norm, domain=domain)
    k, v = kv.unflatten(-1, (2, *heads)).unbind(2)
    return q.unflatten(-1, heads), k, v


@fusible
class Attention(nn.Module):
    """Multi-head self-attention with one fused qkv projection.

    Args:
        qk_norm: with a norm of each head's queries and keys (ViT-22B, arXiv 2302.05442).
        eps: of these norms.
    """

    def __init__(
        self, dim: int, num_heads: int, qkv_bias: bool = True, *, qk_norm: bool = False, eps: float = 1e-6
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = LayerNorm(dim // num_heads, eps) if qk_norm else None
        self.k_norm = LayerNorm(dim // num_heads, eps) if qk_norm else None
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x_BTD: Tensor, query_ids_BQ: Tensor | None = None, *, norm: nn.Module | None = None, domain: int = CLEAN,
        residual: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """(B, T, D); or (B, Q, D) when only the tokens `query_ids_BQ` ask, while all T are attended to.

        Args:
            norm: in front, where the tokens come without.
            residual: added to the output, of its shape.
        """
        B, T, D = x_BTD.shape
        heads = (self.num_heads, D // self.num_heads)
        if query_ids_BQ is not None:
            q, k, v = project_queries(self.qkv, x_BTD, query_ids_BQ, heads, norm, domain)
            attended = attention(*self.normed(q, k, domain), v)
        else:
            qkv = linear(self.qkv, x_BTD, norm=norm, domain=domain).view(B, T, 3, *heads)
            if self.q_norm is None:
                attended = self_attention(qkv)
            else:
                q, k, v = qkv.unbind(2)
                attended = attention(*self.normed(q, k, domain), v)
        return linear(self.proj, attended.flatten(2), residual=residual)

    def normed(self, q: Tensor, k: Tensor, domain: int = CLEAN) -> tuple[Tensor, Tensor]:
        """Queries and keys (…, E) as they are compared, in their dtype."""
        if self.q_norm is None or self.k_norm is None:
            return q, k
        return normalise(self.q_norm, q, domain).to(q.dtype), normalise(self.k_norm, k, domain).to(k.dtype)

    def looks(self, x_BTD: Tensor, domain: int = CLEAN) -> tuple[Tensor, Tensor]:
        """Probabilities (B, H, T, T) fp32 and values (B, H, T, E), computed in the open."""
        B, T, D = x_BTD.shape
        q, k, v = self.qkv(x_BTD).view(B, T, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = self.normed(q, k, domain)
        return (q @ k.transpose(-2, -1) * (D // self.num_heads) ** -0.5).float().softmax(dim=-1), v

    def attention_map(self, x_BTD: Tensor) -> Tensor:
        """(B, H, T, T): what each token takes from each, for pictures."""
        return self.looks(x_BTD)[0]


def norm_attention(
    norm: nn.Module, attn: nn.Module, x_BTD: Tensor, query_ids_BQ: Tensor | None, domain: int, *, residual: bool
) -> Tensor:
    """[x +] attn(norm(x)), (B, T, D); (B, Q, D), of the queried tokens only, with `query_ids_BQ`."""
    rows = x_BTD if query_ids_BQ is None or not residual else gather_patches(x_BTD, query_ids_BQ)
    if is_plain(Attention, attn):
        return cast(Attention, attn).forward(
            x_BTD, query_ids_BQ, norm=norm, domain=domain, residual=rows if residual else None
        )
    normed = normalise(norm, x_BTD, domain)
    whose = {} if domain == CLEAN or not isinstance(attn, Attention) else {"domain": domain}
    if query_ids_BQ is None:
        y = attn(normed, **whose)
    elif isinstance(attn, Attention):
        y = attn(normed, query_ids_BQ, **whose)
    else:
        y = gather_patches(attn(normed), query_ids_BQ)
    return rows + y if residual else y


class PatchEmbed(nn.Module):
    """The patch projection: a convolution by name and shape (timm's), a matrix product by work.

    On CUDA it stays a convolution, which cuDNN computes in TF32 unless torch.backends.cudnn.allow_tf32 is off, as it
    is in evaluations; the authors' code does the same. A pixel x is rounded by 2⁻¹¹·x at most, a 64th of ε = 8/255
    (bf16: an 8th); with the weights' rounding a token is off by 2⁻¹⁰·Σ|w| at most, where ε can move it by ε·Σ|w|.
    """

    def __init__(self, channels: int, dim: int, patch_size: int, bias: bool = True) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(channels, dim, patch_size, patch_size, bias=bias)
        nn.init.xavier_uniform_(self.proj.weight.data.flatten(1))
        if self.proj.bias is not None:
            nn.init.zeros_(self.proj.bias)

    def forward(self, patches_BNP: Tensor) -> Tensor:
        """(B, N, D) tokens of patches in (row, column, channel) order."""
        return conv_of_squares(self.proj, patches_BNP, self.patch_size, tf32=True)


class LayerScale(nn.Module):
    """A factor for each channel of a residual branch (CaiT, arXiv 2103.17239, § 2); DINOv2's initial value."""

    def __init__(self, dim: int, init_value: float = 1e-5) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_value))

    def forward(self, x: Tensor) -> Tensor:
        """γ·x, same shape as x (…, D)."""
        return x * self.gamma


class Block(nn.Module):
    """x + [γ₁·]Attention(LN(x)), then x + [γ₂·]MLP(LN(x)).

    Args:
        eps: of the norms.
        gelu: see Mlp.
        layer_scale: with the factors γ.
        qk_norm: see Attention.
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float = 4.0, qkv_bias: bool = True, *, eps: float = 1e-6,
        gelu: str = "erf", layer_scale: bool = False, qk_norm: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm1 = LayerNorm(dim, eps)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_norm=qk_norm, eps=eps)
        self.ls1 = LayerScale(dim) if layer_scale else None
        self.norm2 = LayerNorm(dim, eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), gelu)
        self.ls2 = LayerScale(dim) if layer_scale else None

    def forward(
        self, x_BTD: Tensor, *, query_ids_BQ: Tensor | None = None, num_keep: int | None = None, num_prefix: int = 1,
        domain: int = CLEAN, branches: LayerBranches | None = None,
    ) -> Tensor:  # fmt: skip
        """(B, T, D); (B, Q, D) with `query_ids_BQ`; (B, S, D) with S = `num_keep` below T.

        Args:
            query_ids_BQ: only these tokens are computed, equal to gathering afterwards. The last block of a decoder
                needs its output at the masked tokens only, so q, proj and the MLP run on those.
            num_keep: tokens that stay after the attention: the first `num_prefix` (cls, registers) and those with the
                most attention on them.
            domain: whose norms, see norms.py.
            branches: what happens to the attention and the MLP branch, see branches.py.
        """
        attn, scaled = self.attn, self.ls1 is not None
        is_usual = is_plain(Attention, attn) and attn.q_norm is None and not scaled
        if branches is None and query_ids_BQ is None and num_keep is None and is_usual:
            y = fused_block(self.norm1, attn.qkv, attn.proj, self.norm2, self.mlp, x_BTD, attn.num_heads, domain)
            if y is not None:
                return y
        if num_keep is not None and num_keep < x_BTD.shape[1]:
            attended, received_BT = attend_and_rank(attn, normalise(self.norm1, x_BTD, domain), domain)
            kept = most_attended(received_BT, num_keep, num_prefix)
            x = gather_patches(x_BTD + shape_branch(_scaled(self.ls1, attended), branches, 0), kept)
        elif branches is None and not scaled:
            # Only what is asked for goes through q, proj and the MLP; norms are per token, so they may come after.
            x = norm_attention(self.norm1, attn, x_BTD, query_ids_BQ, domain, residual=True)
        else:
            x = x_BTD if query_ids_BQ is None else gather_patches(x_BTD, query_ids_BQ)
            attended = norm_attention(self.norm1, attn, x_BTD, query_ids_BQ, domain, residual=False)
            x = x + shape_branch(_scaled(self.ls1, attended), branches, 0)
        if branches is None and not scaled:
            return norm_mlp(self.norm2, self.mlp, x, domain, residual=True)
        branch = norm_mlp(self.norm2, self.mlp, x, domain, residual=False)
        return x + shape_branch(_scaled(self.ls2, branch), branches, 1)


def _scaled(scale: nn.Module | None, branch: Tensor) -> Tensor:
    return branch if scale is None else scale(branch)


def attend_and_rank(attn: nn.Module, x_BTD: Tensor, domain: int = CLEAN) -> tuple[Tensor, Tensor]:
    """The attention's output (B, T, D), and (B, T) fp32: what each token received, summed over heads and queries.

    The fused kernels do not give out the probabilities, so they are computed in the open.

    Raises:
        TypeError: an attention of another kind, which shows no probabilities.
    """
    if not isinstance(attn, Attention):
        raise TypeError(
            f"token_keep_rate below 1 ranks tokens by their attention, which {type(attn).__name__} does not show: "
            "leave it at 1, or keep the block's own attention"
        )
    probs_BHTT, v = attn.looks(x_BTD, domain)
    received_BT = probs_BHTT.sum(dim=(1, 2))
    if not is_plain(Attention, attn):
        return attn(x_BTD), received_BT
    out = (probs_BHTT.to(v.dtype) @ v).transpose(1, 2).flatten(2)
    return attn.proj(out), received_BT


def most_attended(received_BT: Tensor, num_keep: int, num_prefix: int = 1) -> Tensor:
    """(B, num_keep) int64 ascending: the prefix and the patch tokens with the most attention; ties to the first."""
    order = received_BT[:, num_prefix:].detach().argsort(dim=1, descending=True, stable=True)
    return behind_prefix(order[:, : num_keep - num_prefix].sort(dim=1).values, num_prefix)


def init_like_mae(module: nn.Module) -> None:
    """Xavier-uniform linear layers, zero biases, unit norms (MAE's initialisation); to be used with `Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
