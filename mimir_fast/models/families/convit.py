"""ConViT (arXiv 2103.10697): in the first layers each head mixes attention by content with attention by position.

Gated positional self-attention, with timm's parameter names; the cls token joins after those layers:

    A = (1 − σ(g))·softmax(q kᵀ/√E) + σ(g)·softmax(w·(Δx, Δy, Δx² + Δy²))

The offsets Δ between kept patches are the true ones, or, with `positions="official"`, those of a √K × √K grid on which
the MIMIR authors' code believes them to lie. They are computed once a forward pass for all layers. Where they are the
same for all images (whole images, the decoder, the official grid), so is the second softmax: it is computed once, not
for each image. Each of the two has rows that sum to one, so the sum is not normalised again, and the first half can be
any fused attention.
Shapes: B images, N patches, K kept, T tokens, Q queried ones, D width, H heads, E = D/H; G = B, or 1 where shared.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from mimir_fast.layers.attention import attention
from mimir_fast.layers.inspection import is_plain
from mimir_fast.layers.linear import norm_mlp
from mimir_fast.layers.norms import CLEAN, LayerNorm, NoNorm, normalise
from mimir_fast.models.blocks import Block, Mlp, PatchEmbed, check_heads, init_like_mae
from mimir_fast.models.branches import Branches, LayerBranches, shape_branch
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
from mimir_fast.models.positions import pseudo_grid, sincos_positions, with_positions
from mimir_fast.ops._precision import no_autocast
from mimir_fast.ops.patches import gather_patches
from mimir_fast.sizes import Size, area, height_width, size_of

# name: (width, depth, heads, layers with positions). `nano` is ours, the others are timm's and the MIMIR authors'.
SIZES: dict[str, tuple[int, int, int, int]] = {
    "nano": (96, 4, 4, 3),
    "tiny": (192, 12, 4, 10),
    "small": (432, 12, 9, 10),
    "base": (768, 12, 16, 10),
}


def check_local(local_up_to_layer: int, depth: int) -> None:
    """Raises ValueError when no layer is left in which the cls token can join."""
    if not 0 <= local_up_to_layer < depth:
        raise ValueError(
            f"local_up_to_layer={local_up_to_layer} of {depth} layers: the cls token joins after those layers, so "
            f"choose 0 to {depth - 1}"
        )


def relative_offsets(places_BK: Tensor, grid: Size) -> Tensor:
    """(B, 3, K, K) float32: column and row of the key minus those of the query, and the squared distance."""
    _, across = height_width(grid)
    columns_rows = torch.stack([places_BK % across, places_BK // across], dim=1).float()
    offsets = columns_rows.unsqueeze(2) - columns_rows.unsqueeze(3)
    return torch.cat([offsets, offsets.square().sum(dim=1, keepdim=True)], dim=1)


def grid_offsets(grid: Size, device: torch.device | None = None) -> Tensor:
    """(1, 3, N, N) float32: those of a whole grid in raster order."""
    return relative_offsets(torch.arange(area(grid), device=device).unsqueeze(0), grid)


class PositionalAttention(nn.Module):
    """Gated positional self-attention: each head mixes attention by content with attention by position."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True, locality_strength: float = 1.0) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads, self.locality_strength = num_heads, locality_strength
        self.qk = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.pos_proj = nn.Linear(3, num_heads)
        self.gating_param = nn.Parameter(torch.ones(num_heads))

    @torch.no_grad()
    def start_like_a_convolution(self) -> None:
        """Each head looks at one neighbour: the heads form a square around the query (the paper's initialisation)."""
        nn.init.eye_(self.v.weight)
        side = math.isqrt(self.num_heads)
        for column in range(side):
            for row in range(side):
                centre = (side - 1) / 2
                weight = torch.tensor([2 * (column - centre), 2 * (row - centre), -1.0])
                self.pos_proj.weight[row + side * column] = weight
        self.pos_proj.weight *= self.locality_strength

    def look_by_position(self, offsets_G3TT: Tensor, dtype: torch.dtype) -> Tensor:
        """(G, H, T, T) probabilities of where the keys are."""
        exact = torch.promote_types(dtype, torch.float32)  # squared distances are too large for bf16
        (G, _, T, _), H = offsets_G3TT.shape, self.num_heads
        with no_autocast(offsets_G3TT.device):
            offsets = offsets_G3TT.to(exact)
            if is_plain(nn.Linear, self.pos_proj):
                weight, bias = self.pos_proj.weight.to(exact), self.pos_proj.bias
                scores = weight @ offsets.flatten(2)
                scores = scores if bias is None else scores + bias.to(exact).unsqueeze(-1)
            else:
                scores = self.pos_proj(offsets.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return scores.reshape(G, H, T, T).softmax(dim=-1).to(dtype)

    def attend_by_position(self, v_BTHE: Tensor, offsets_G3TT: Tensor) -> Tensor:
        """(B, T, H, E): values weighted by where they are."""
        (B, T, H, E), G = v_BTHE.shape, len(offsets_G3TT)
        probs_GHTT = self.look_by_position(offsets_G3TT, v_BTHE.dtype)
        if G == B:
            return (probs_GHTT @ v_BTHE.transpose(1, 2)).transpose(1, 2)
        mixed = probs_GHTT[0] @ v_BTHE.permute(2, 1, 0, 3).reshape(H, T, B * E)  # one product for all images
        return mixed.view(H, T, B, E).permute(2, 1, 0, 3)

    def forward(self, x_BTD: Tensor, offsets_G3TT: Tensor, query_ids_BQ: Tensor | None = None) -> Tensor:
        """(B, T, D); or (B, Q, D), of the queried tokens only."""
        B, T, D = x_BTD.shape
        heads = (self.num_heads, D // self.num_heads)
        q, k = self.qk(x_BTD).view(B, T, 2, *heads).unbind(2)
        v = self.v(x_BTD).view(B, T, *heads)
        by_position = self.attend_by_position(v, offsets_G3TT)
        if query_ids_BQ is not None:
            q = gather_patches(q.flatten(2), query_ids_BQ).unflatten(-1, heads)
            by_position = gather_patches(by_position.flatten(2), query_ids_BQ).unflatten(-1, heads)
        by_content = attention(q, k, v)
        gate_H1 = torch.sigmoid(self.gating_param).unsqueeze(-1).to(v.dtype)
        return self.proj(torch.lerp(by_content, by_position.to(by_content.dtype), gate_H1).flatten(2))

    def attention_map(self, x_BTD: Tensor, offsets_G3TT: Tensor) -> Tensor:
        """(B, H, T, T): what each token takes from each, for pictures."""
        B, T, _ = x_BTD.shape
        q, k = self.qk(x_BTD).view(B, T, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        by_content = (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1)
        gate_H11 = torch.sigmoid(self.gating_param).view(-1, 1, 1)
        return torch.lerp(by_content, self.look_by_position(offsets_G3TT, q.dtype).expand_as(by_content), gate_H11)


class PositionalBlock(nn.Module):
    """x + PositionalAttention(LN(x)), then x + MLP(LN(x))."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float = 4.0, qkv_bias: bool = True, locality_strength: float = 1.0
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = PositionalAttention(dim, num_heads, qkv_bias, locality_strength)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self, x_BTD: Tensor, offsets_G3TT: Tensor, *, query_ids_BQ: Tensor | None = None, domain: int = CLEAN,
        branches: LayerBranches | None = None,
    ) -> Tensor:  # fmt: skip
        """(B, T, D); (B, Q, D) with `query_ids_BQ`. Arguments as for layers.Block, and the offsets between tokens."""
        attended = self.attn(normalise(self.norm1, x_BTD, domain), offsets_G3TT, query_ids_BQ)
        x = x_BTD if query_ids_BQ is None else gather_patches(x_BTD, query_ids_BQ)
        x = x + shape_branch(attended, branches, 0)
        return x + shape_branch(norm_mlp(self.norm2, self.mlp, x, domain, residual=False), branches, 1)


def make_blocks(
    width: int, depth: int, num_heads: int, mlp_ratio: float, qkv_bias: bool, num_positional: int, strength: float
) -> nn.ModuleList:
    """The first `num_positional` blocks with positions, the others plain."""
    return nn.ModuleList(
        PositionalBlock(width, num_heads, mlp_ratio, qkv_bias, strength)
        if index < num_positional
        else Block(width, num_heads, mlp_ratio, qkv_bias)
        for index in range(depth)
    )


def initialise(module: nn.Module) -> None:
    """MAE's initialisation, then the convolution-like start of the positional layers."""
    module.apply(init_like_mae)
    for layer in module.modules():
        if isinstance(layer, PositionalAttention):
            layer.start_like_a_convolution()


class ConvitEncoder(Encoder):
    """Positional layers over the visible patches, then plain ones over these and the cls token."""

    def __init__(
        self, width: int, depth: int, num_heads: int, local_up_to_layer: int = 10, *, image_size: Size, patch_size: int,
        channels: int = 3, mlp_ratio: float = 4.0, qkv_bias: bool = True, locality_strength: float = 1.0,
        positions: str = "true", final_norm: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        check_patch_size(image_size, patch_size)
        check_local(local_up_to_layer, depth)
        self.image_size, self.mask_unit, self.channels = image_size, patch_size, channels
        self.width = self.token_width = width
        self.num_layers, self.num_heads, self.local_up_to_layer = depth, num_heads, local_up_to_layer
        self.locality_strength, self.official = locality_strength, positions == "official"
        # A buffer: a traced graph would compute it on the trace's device. Integers keep their type in a bf16 model.
        self.register_buffer("offsets_13NN", grid_offsets(self.grid).int(), persistent=False)
        self.offsets_13NN: Tensor
        self.cls_joins = local_up_to_layer
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(sincos_positions(width, self.grid, num_prefix=0))
        self.patch_embed = PatchEmbed(channels, width, patch_size)
        self.blocks = make_blocks(width, depth, num_heads, mlp_ratio, qkv_bias, local_up_to_layer, locality_strength)
        self.norm = LayerNorm(width) if final_norm else NoNorm()
        initialise(self)
        nn.init.normal_(self.cls_token, std=0.02)

    def offsets(self, tokens_BKD: Tensor, places_BK: Tensor | None) -> Tensor:
        """(G, 3, K, K): how the tokens lie to one another."""
        if places_BK is None:
            return self.offsets_13NN
        if self.official:
            return grid_offsets(pseudo_grid(tokens_BKD.shape[1], self.grid), tokens_BKD.device)
        return relative_offsets(places_BK, self.grid)

    def encode(
        self, tokens: Tensor, places_BK: Tensor | None, *, domain: int = CLEAN, branches: Branches | None = None
    ) -> Tensor:
        """(B, 1 + K, D); see Encoder."""
        x = with_positions(tokens, places_BK, self.pos_embed[0])
        offsets = self.offsets(x, places_BK)
        for index, block in enumerate(self.blocks):
            of_layer = None if branches is None else branches.of_layer(index)
            if index == self.local_up_to_layer:
                x = torch.cat([self.cls_of(domain).to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
            inputs = (x, offsets) if index < self.local_up_to_layer else (x,)
            x = block(*inputs, domain=domain, branches=of_layer)
        return normalise(self.norm, x, domain)


class ConvitDecoder(Decoder):
    """The same two kinds of blocks over the whole grid; cls joins after the positional ones, if any others follow."""

    def __init__(self, encoder: ConvitEncoder, width: int, depth: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__(encoder, width, 0, num_heads, mlp_ratio)
        num_positional, strength = encoder.local_up_to_layer, encoder.locality_strength
        self.local_up_to_layer = num_positional
        self.decoder_pos_embed = nn.Parameter(sincos_positions(width, self.grid, num_prefix=0), requires_grad=False)
        self.decoder_blocks = make_blocks(width, depth, num_heads, mlp_ratio, True, num_positional, strength)
        initialise(self)

    def run(self, x: Tensor, ids_BM: Tensor | None) -> Tensor:
        """(B, M or N, E); see Decoder."""
        prefix, x, offsets = x[:, : self.num_prefix], x[:, self.num_prefix :], grid_offsets(self.grid, x.device)
        joined = 0
        for index, block in enumerate(self.decoder_blocks):
            if index == self.local_up_to_layer:
                x, joined = torch.cat([prefix, x], dim=1), self.num_prefix
            is_last = index == len(self.decoder_blocks) - 1
            queries = ids_BM + joined if ids_BM is not None and is_last else None
            inputs = (x, offsets) if index < self.local_up_to_layer else (x,)
            x = block(*inputs, query_ids_BQ=queries)
        return x[:, joined:] if ids_BM is None else x


def build(architecture: Architecture, final_norm: bool) -> ConvitEncoder:
    """The encoder of an architecture; its options: positions, qkv_bias, local_up_to_layer."""
    width, depth, num_heads, num_positional = SIZES[architecture.size]
    options = architecture.options
    return ConvitEncoder(
        width, depth, num_heads, options.get("local_up_to_layer", num_positional),
        image_size=architecture.image_size, patch_size=architecture.patch_size, channels=architecture.channels,
        final_norm=final_norm,
        qkv_bias=options.get("qkv_bias", True), positions=options.get("positions", "true"),
    )  # fmt: skip


def recognise(tensors: Tensors, image_size: Size | None = None) -> Architecture | None:
    """From the shapes; the gates say how many heads and positional layers there are."""
    if "blocks.0.attn.gating_param" not in tensors:
        return None
    width, channels, patch_size, _ = tensors["patch_embed.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    num_heads = len(tensors["blocks.0.attn.gating_param"])
    found = size_of(tensors["pos_embed"].shape[1], patch_size, image_size)
    shape = (width, depth, num_heads)
    size = next((name for name, (*known, _) in SIZES.items() if tuple(known) == shape), None)
    if size is None or found is None:
        return None
    options = {
        "qkv_bias": "blocks.0.attn.v.bias" in tensors,
        "local_up_to_layer": sum(f"blocks.{index}.attn.gating_param" in tensors for index in range(depth)),
    }
    return settled(Architecture("convit", size, found, patch_size, channels, options))


def settle(architecture: Architecture) -> Architecture:
    """Without the number of layers that the size has anyway; see Family."""
    options, (_, depth, _, usual) = dict(architecture.options), SIZES[architecture.size]
    check_local(options.get("local_up_to_layer", usual), depth)
    if options.get("local_up_to_layer") == usual:
        del options["local_up_to_layer"]
    return replace(architecture, options=options)


def to_timm(tensors: Tensors, architecture: Architecture) -> TimmModel:
    """timm's ConVit, equal on whole images."""
    if not isinstance(architecture.image_size, int):
        raise ValueError("timm's ConViT takes square images only: export with --format safetensors")
    width, depth, num_heads, num_positional = SIZES[architecture.size]
    arguments = {
        "img_size": architecture.image_size,
        "patch_size": architecture.patch_size,
        "in_chans": architecture.channels,
        "embed_dim": width // num_heads,  # timm multiplies by the heads
        "depth": depth,
        "num_heads": num_heads,
        "qkv_bias": "blocks.0.attn.v.bias" in tensors,
        "local_up_to_layer": architecture.options.get("local_up_to_layer", num_positional),
        **head_arguments(tensors, "ConVit", architecture.options),
    }
    own = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.", "head.")
    return TimmModel("timm.models.convit.ConVit", arguments, encoder_tensors(tensors, own))


register(
    Family(
        name="convit",
        title="ConViT",
        sizes={
            name: f"{w} wide, {d} deep, {h} heads, positions in {local}" for name, (w, d, h, local) in SIZES.items()
        },
        anchor="patch_embed.proj.weight",
        mask_unit=lambda a: check_patch_size(a.image_size, a.patch_size),
        build=build,
        build_decoder=ConvitDecoder,  # type: ignore[arg-type]
        recognise=recognise,
        sized=recognise,
        to_timm=to_timm,
        options={"qkv_bias": True, "norm_before_pool": False, "local_up_to_layer": -1},
        settle=settle,
        kept_on_a_grid=True,
        pool="cls",
    )
)
