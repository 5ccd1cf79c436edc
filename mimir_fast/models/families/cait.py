"""CaiT (arXiv 2103.17239): talking heads, scaled residual branches, and a cls token that joins in the last two layers.

The layers see patches only; then the cls token alone gathers from them (class attention). timm's parameter names.
Shapes: B images, N patches, K kept, T tokens, Q queried ones, D width, H heads, E = D/H.
"""

import torch
from torch import Tensor, nn

from mimir_fast.layers.inspection import is_plain
from mimir_fast.layers.linear import norm_mlp
from mimir_fast.layers.norms import CLEAN, LayerNorm, NoNorm, normalise
from mimir_fast.models.blocks import Mlp, PatchEmbed, check_heads, init_like_mae, project_queries
from mimir_fast.models.branches import Branches, LayerBranches, shape_branch
from mimir_fast.models.class_attention import ClassAttention
from mimir_fast.models.decoder import Decoder
from mimir_fast.models.encoder import Encoder, check_patch_size
from mimir_fast.models.families import (
    Architecture,
    Family,
    Tensors,
    TimmModel,
    encoder_tensors,
    head_arguments,
    register,
    settled,
)
from mimir_fast.models.positions import sincos_positions, with_positions
from mimir_fast.ops.patches import gather_patches
from mimir_fast.sizes import Size, size_of

# name: (width, depth, heads, initial scale of the branches). `nano` is ours: few layers need no small scale.
SIZES: dict[str, tuple[int, int, int, float]] = {
    "nano": (96, 4, 4, 0.1),
    "xxs24": (192, 24, 4, 1e-5),
    "xxs36": (192, 36, 4, 1e-5),
    "s24": (384, 24, 8, 1e-5),
    "s36": (384, 36, 8, 1e-6),
}


def mix_heads(scores_BHQT: Tensor, mixer: nn.Linear) -> Tensor:
    """(B, H, Q, T): each head a weighted sum of all heads."""
    if not is_plain(nn.Linear, mixer):
        return mixer(scores_BHQT.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    mixed = mixer.weight @ scores_BHQT.flatten(2)
    return (mixed if mixer.bias is None else mixed + mixer.bias.unsqueeze(-1)).view_as(scores_BHQT)


class TalkingHeads(nn.Module):
    """Attention whose heads are mixed before and after the softmax (arXiv 2003.02436)."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.heads = (num_heads, dim // num_heads)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_l = nn.Linear(num_heads, num_heads)
        self.proj_w = nn.Linear(num_heads, num_heads)

    def forward(self, x_BTD: Tensor, query_ids_BQ: Tensor | None = None) -> Tensor:
        """(B, T, D); or (B, Q, D) when only the tokens `query_ids_BQ` ask, while all T are attended to."""
        if query_ids_BQ is None:
            q, k, v = self.qkv(x_BTD).unflatten(-1, (3, *self.heads)).unbind(2)
        else:
            q, k, v = project_queries(self.qkv, x_BTD, query_ids_BQ, self.heads)
        return self.proj((self.mixed(q, k) @ v.transpose(1, 2)).transpose(1, 2).flatten(2))

    def mixed(self, q_BQHE: Tensor, k_BTHE: Tensor) -> Tensor:
        """(B, H, Q, T): softmax between both mixings; the outer one may make weights negative."""
        scores = (q_BQHE * self.heads[1] ** -0.5).transpose(1, 2) @ k_BTHE.permute(0, 2, 3, 1)
        return mix_heads(mix_heads(scores, self.proj_l).softmax(dim=-1).to(k_BTHE.dtype), self.proj_w)

    def attention_map(self, x_BTD: Tensor) -> Tensor:
        """(B, H, T, T): what each token takes from each, for pictures."""
        q, k, _ = self.qkv(x_BTD).unflatten(-1, (3, *self.heads)).unbind(2)
        return self.mixed(q, k)


class ScaledLayer(nn.Module):
    """What both of CaiT's layers are made of: two branches with a norm and a scale each."""

    attention: type[nn.Module]

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float = 4.0, qkv_bias: bool = True, init_values: float = 1e-5
    ) -> None:
        super().__init__()
        self.gamma_1 = nn.Parameter(init_values * torch.ones(dim))
        self.gamma_2 = nn.Parameter(init_values * torch.ones(dim))
        self.norm1 = LayerNorm(dim)
        self.attn = self.attention(dim, num_heads, qkv_bias)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))


class CaitBlock(ScaledLayer):
    """x + γ₁·TalkingHeads(LN(x)), then x + γ₂·MLP(LN(x))."""

    attention = TalkingHeads

    def forward(
        self, x_BTD: Tensor, *, query_ids_BQ: Tensor | None = None, domain: int = CLEAN,
        branches: LayerBranches | None = None,
    ) -> Tensor:  # fmt: skip
        """(B, T, D); (B, Q, D) with `query_ids_BQ`. Arguments as for layers.Block."""
        attended = self.attn(normalise(self.norm1, x_BTD, domain), query_ids_BQ)
        x = x_BTD if query_ids_BQ is None else gather_patches(x_BTD, query_ids_BQ)
        x = x + shape_branch(self.gamma_1 * attended, branches, 0)
        return x + shape_branch(self.gamma_2 * norm_mlp(self.norm2, self.mlp, x, domain, residual=False), branches, 1)


class ClassBlock(ScaledLayer):
    """The cls token gathers from the patches, which stay as they are."""

    attention = ClassAttention

    def forward(self, patches_BKD: Tensor, cls_B1D: Tensor, *, domain: int = CLEAN) -> Tensor:
        """(B, 1, D), the new cls token."""
        x = torch.cat([cls_B1D, patches_BKD], dim=1)
        cls = cls_B1D + self.gamma_1 * self.attn(normalise(self.norm1, x, domain))
        return cls + self.gamma_2 * norm_mlp(self.norm2, self.mlp, cls, domain, residual=False)


class CaitEncoder(Encoder):
    """Layers over the visible patches, then class attention."""

    def __init__(
        self, width: int, depth: int, num_heads: int, init_values: float = 1e-5, *, image_size: Size, patch_size: int,
        channels: int = 3, mlp_ratio: float = 4.0, qkv_bias: bool = True, depth_token_only: int = 2,
        mlp_ratio_token_only: float = 4.0, final_norm: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        check_patch_size(image_size, patch_size)
        self.image_size, self.mask_unit, self.channels = image_size, patch_size, channels
        self.width = self.token_width = width
        self.num_layers, self.num_heads, self.cls_joins = depth, num_heads, depth
        self.qkv_bias, self.init_values = qkv_bias, init_values
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(sincos_positions(width, self.grid, num_prefix=0))
        self.patch_embed = PatchEmbed(channels, width, patch_size)
        self.blocks = nn.ModuleList(CaitBlock(width, num_heads, mlp_ratio, qkv_bias, init_values) for _ in range(depth))
        self.blocks_token_only = nn.ModuleList(
            ClassBlock(width, num_heads, mlp_ratio_token_only, qkv_bias, init_values) for _ in range(depth_token_only)
        )
        self.norm = LayerNorm(width) if final_norm else NoNorm()
        self.apply(init_like_mae)
        nn.init.normal_(self.cls_token, std=0.02)

    def encode(
        self, tokens: Tensor, places_BK: Tensor | None, *, domain: int = CLEAN, branches: Branches | None = None
    ) -> Tensor:
        """(B, 1 + K, D); the class attention has no stochastic depth, as in timm. See Encoder."""
        x = with_positions(tokens, places_BK, self.pos_embed[0])
        for index, block in enumerate(self.blocks):
            x = block(x, domain=domain, branches=None if branches is None else branches.of_layer(index))
        cls = self.cls_of(domain).to(x.dtype).expand(x.shape[0], -1, -1)
        for block in self.blocks_token_only:
            cls = block(x, cls, domain=domain)
        x = torch.cat([cls, x], dim=1)
        return normalise(self.norm, x, domain)

    def layers(self) -> list[nn.Module]:
        """Those over patches and those of the cls token."""
        return [*self.blocks, *self.blocks_token_only]

    def layer_of(self, name: str) -> int:
        """The class attention has the learning rates of the last layers (timm's rule)."""
        if name.startswith("blocks_token_only."):
            return self.num_layers - len(self.blocks_token_only) + int(name.split(".")[1]) + 1
        return super().layer_of(name)


class CaitDecoder(Decoder):
    """CaiT's layers over cls and the whole grid."""

    def __init__(self, encoder: CaitEncoder, width: int, depth: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__(encoder, width, 0, num_heads, mlp_ratio)
        self.decoder_pos_embed = nn.Parameter(sincos_positions(width, self.grid, num_prefix=0), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            CaitBlock(width, num_heads, mlp_ratio, encoder.qkv_bias, encoder.init_values) for _ in range(depth)
        )
        self.decoder_blocks.apply(init_like_mae)


def build(architecture: Architecture, final_norm: bool) -> CaitEncoder:
    """The encoder of an architecture; its option: qkv_bias."""
    return CaitEncoder(
        *SIZES[architecture.size], image_size=architecture.image_size, patch_size=architecture.patch_size,
        channels=architecture.channels, qkv_bias=architecture.options.get("qkv_bias", True), final_norm=final_norm,
    )  # fmt: skip


def recognise(tensors: Tensors, image_size: Size | None = None) -> Architecture | None:
    """From the shapes; the mixing of the heads says how many there are."""
    if "blocks.0.attn.proj_l.weight" not in tensors:
        return None
    width, channels, patch_size, _ = tensors["patch_embed.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    num_heads = len(tensors["blocks.0.attn.proj_l.weight"])
    found = size_of(tensors["pos_embed"].shape[1], patch_size, image_size)
    shape = (width, depth, num_heads)
    size = next((name for name, (*known, _) in SIZES.items() if tuple(known) == shape), None)
    if size is None or found is None:
        return None
    options = {"qkv_bias": "blocks.0.attn.qkv.bias" in tensors}
    return settled(Architecture("cait", size, found, patch_size, channels, options))


def to_timm(tensors: Tensors, architecture: Architecture) -> TimmModel:
    """The same model as timm's `Cait`, with its tensors."""
    width, depth, num_heads, _ = SIZES[architecture.size]
    arguments = {
        "img_size": architecture.image_size,
        "patch_size": architecture.patch_size,
        "in_chans": architecture.channels,
        "embed_dim": width,
        "depth": depth,
        "num_heads": num_heads,
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        **head_arguments(tensors, "Cait", architecture.options),
    }
    own = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "blocks_token_only.", "norm.", "head.")
    return TimmModel("timm.models.cait.Cait", arguments, encoder_tensors(tensors, own))


register(
    Family(
        name="cait",
        title="CaiT",
        sizes={name: f"{w} wide, {d} deep, {h} heads" for name, (w, d, h, _) in SIZES.items()},
        anchor="patch_embed.proj.weight",
        mask_unit=lambda a: check_patch_size(a.image_size, a.patch_size),
        build=build,
        build_decoder=CaitDecoder,  # type: ignore[arg-type]
        recognise=recognise,
        sized=recognise,
        to_timm=to_timm,
        options={"qkv_bias": True, "norm_before_pool": False},
        pool="cls",
    )
)
