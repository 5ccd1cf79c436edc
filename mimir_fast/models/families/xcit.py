"""XCiT (arXiv 2106.09681): attention between channels, so its cost is linear in the tokens; patches meet their
neighbours in a small convolution (local patch interaction). timm's parameter names.

The convolutions, of the stem and of the layers, see the true grid with zeros where patches are masked, and their batch
norms the visible patches only: nothing leaks, and with nothing masked this is the plain XCiT. With
`positions="official"` the layers' convolutions take the kept patches for a √K × √K grid, as the MIMIR authors' code
does (its stem sees the whole image).
Shapes: B images, N patches, K kept, T tokens, M wanted ones, P numbers a patch, D width, H heads, E = D/H.
"""

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimir_fast.layers.convolution import conv_of_squares
from mimir_fast.layers.linear import norm_mlp
from mimir_fast.layers.norms import CLEAN, BatchNorm, LayerNorm, NoNorm, normalise
from mimir_fast.models.blocks import Mlp, check_heads
from mimir_fast.models.branches import Branches, LayerBranches, shape_branch
from mimir_fast.models.class_attention import ClassAttention
from mimir_fast.models.decoder import Decoder
from mimir_fast.models.encoder import Encoder, check_patch_size, conv_over_grid
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
from mimir_fast.models.positions import pseudo_grid, with_positions
from mimir_fast.ops._precision import no_autocast
from mimir_fast.ops.patches import gather_patches
from mimir_fast.sizes import Size, divides, height_width, typed

# name: (width, depth, heads, initial scale of the branches). `nano` is ours, `small` timm's xcit_small_12 and the MIMIR
# authors', `medium` timm's xcit_medium_24, `medium12` the MIMIR authors' medium, half as deep.
SIZES: dict[str, tuple[int, int, int, float]] = {
    "nano": (96, 4, 4, 1.0),
    "small": (384, 12, 8, 1.0),
    "medium": (512, 24, 8, 1e-5),
    "medium12": (512, 12, 8, 1.0),
}
# Each convolution of the stem halves the image. The paper's have 3 and 4; 1 and 2, for small images, are ours.
STEM_CONVS = {2: 1, 4: 2, 8: 3, 16: 4}


class ChannelAttention(nn.Module):
    """Cross-covariance attention: softmax over channels of normalised queries and keys."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.heads = (num_heads, dim // num_heads)
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) attended between channels, from tokens of the same shape."""
        q, k, v = self.qkv(x_BTD).unflatten(-1, (3, *self.heads)).permute(2, 0, 3, 4, 1)  # each (B, H, E, T)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        probs_BHEE = ((q @ k.transpose(-2, -1)) * self.temperature).softmax(dim=-1)
        return self.proj((probs_BHEE.to(v.dtype) @ v).permute(0, 3, 1, 2).flatten(2))


class LocalInteraction(nn.Module):
    """Two depthwise 3 × 3 convolutions over the grid."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.bn = BatchNorm(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x_BKD: Tensor, places_BK: Tensor | None, grid: Size, domain: int = CLEAN) -> Tensor:
        """(B, K, D) of the visible patches, each with what its visible neighbours give it."""
        x = F.gelu(conv_over_grid(self.conv1, x_BKD, 1, places_BK, grid))
        return conv_over_grid(self.conv2, normalise(self.bn, x, domain), 1, places_BK, grid)


class XcitBlock(nn.Module):
    """Three residual branches: attention between channels, neighbours, MLP."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float = 4.0, qkv_bias: bool = True, eta: float = 1.0
    ) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = ChannelAttention(dim, num_heads, qkv_bias)
        self.norm3 = LayerNorm(dim)
        self.local_mp = LocalInteraction(dim)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.gamma1 = nn.Parameter(eta * torch.ones(dim))
        self.gamma3 = nn.Parameter(eta * torch.ones(dim))
        self.gamma2 = nn.Parameter(eta * torch.ones(dim))

    def forward(
        self, x_BKD: Tensor, places_BK: Tensor | None, grid: Size, *, query_ids_BQ: Tensor | None = None,
        domain: int = CLEAN, branches: LayerBranches | None = None,
    ) -> Tensor:  # fmt: skip
        """(B, K, D); (B, Q, D) with `query_ids_BQ`: those tokens only, the MLP runs on no others."""
        x = x_BKD + shape_branch(self.gamma1 * self.attn(normalise(self.norm1, x_BKD, domain)), branches, 0)
        local = self.local_mp(normalise(self.norm3, x, domain), places_BK, grid, domain)
        x = x + shape_branch(self.gamma3 * local, branches, 1)
        if query_ids_BQ is not None:
            x = gather_patches(x, query_ids_BQ)
        return x + shape_branch(self.gamma2 * norm_mlp(self.norm2, self.mlp, x, domain, residual=False), branches, 2)


class ClassBlock(nn.Module):
    """The cls token gathers from the patches; these pass through the norms only (timm's `tokens_norm`)."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float = 4.0, qkv_bias: bool = True, eta: float = 1.0,
        tokens_norm: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tokens_norm = tokens_norm
        self.norm1 = LayerNorm(dim)
        self.attn = ClassAttention(dim, num_heads, qkv_bias)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.gamma1 = nn.Parameter(eta * torch.ones(dim))
        self.gamma2 = nn.Parameter(eta * torch.ones(dim))

    def forward(self, x_BTD: Tensor, *, domain: int = CLEAN) -> Tensor:
        """(B, T, D), cls first."""
        normed = normalise(self.norm1, x_BTD, domain)
        attended = torch.cat([self.attn(normed), normed[:, 1:]], dim=1)
        x = x_BTD + self.gamma1 * attended
        if self.tokens_norm:
            x = normalise(self.norm2, x, domain)
            cls, patches = x[:, :1], x[:, 1:]
        else:
            cls, patches = normalise(self.norm2, x[:, :1], domain), x[:, 1:]
        cls = cls + self.gamma2 * self.mlp(cls)
        return torch.cat([cls, patches + patches], dim=1)  # the published models were trained with this doubling


class FourierPositions(nn.Module):
    """A learned projection of sines and cosines of row and column, whatever the grid."""

    hidden_dim, temperature, eps = 32, 10000.0, 1e-6

    def __init__(self, dim: int, grid: Size) -> None:
        super().__init__()
        self.token_projection = nn.Conv2d(2 * self.hidden_dim, dim, 1)
        # A buffer: a traced graph would compute it on the device of the trace.
        self.register_buffer("features_NF", self.features(grid), persistent=False)
        self.features_NF: Tensor

    def features(self, grid: Size) -> Tensor:
        """(N, 2·hidden_dim) in raster order."""
        down, across = height_width(grid)
        rows = self.along(down)[:, None].expand(-1, across, -1)
        columns = self.along(across)[None].expand(down, -1, -1)
        return torch.cat([rows, columns], dim=-1).flatten(0, 1)

    def forward(self) -> Tensor:
        """(N, D) in raster order."""
        return conv_of_squares(self.token_projection, self.features_NF.to(next(self.parameters()).dtype), 1)

    def along(self, length: int) -> Tensor:
        """(length, hidden_dim) of one axis, sine and cosine by turns."""
        angles = torch.arange(1, length + 1, dtype=torch.float32) / (length + self.eps) * 2 * math.pi
        exponents = torch.arange(0, self.hidden_dim, 2, dtype=torch.float32) / self.hidden_dim
        angles = angles[:, None] / self.temperature**exponents
        return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


class ConvStem(nn.Module):
    """3 × 3 convolutions of stride 2 with batch norms, over visible patches."""

    def __init__(self, channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size, depth = patch_size, STEM_CONVS[patch_size]
        widths = [channels, *(dim // 2**halving for halving in reversed(range(depth)))]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            conv = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            layers += [nn.Sequential(conv, BatchNorm(after)), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, patches_BKP: Tensor, places_BK: Tensor | None, grid: Size, domain: int = CLEAN) -> Tensor:
        """(B, K, D) tokens of the visible patches (B, K, P)."""
        layers: Any = self.proj
        side, x = self.patch_size, patches_BKP.to(next(self.parameters()).dtype)
        for index in range(0, len(layers), 2):
            conv, norm = layers[index]
            x = conv_over_grid(conv, layers[index - 1](x) if index else x, side, places_BK, grid)
            side //= 2
            x = normalise(norm, x.unflatten(-1, (side**2, -1)), domain).flatten(2)
        return x


def check_stem(image_size: Size, patch_size: int) -> int:
    """The patch size; raises ValueError for patches that do not tile the image or that no stem makes."""
    check_patch_size(image_size, patch_size)
    if patch_size not in STEM_CONVS:
        fits = [str(p) for p in STEM_CONVS if divides(p, image_size)]
        raise ValueError(
            f"XCiT's stem halves the image 1 to 4 times and cannot make patches of {patch_size} pixels; for images "
            f"of {typed(image_size)} choose {' or '.join(fits) or 'a size that is a multiple of 8'} (the paper's are 8 "
            "and 16)"
        )
    return patch_size


def init_like_xcit(module: nn.Module) -> None:
    """Truncated normal linear layers with zero biases (the paper's); convolutions and norms as torch makes them."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class XcitEncoder(Encoder):
    """Layers over the visible patches, then class attention."""

    num_branches = 3

    def __init__(
        self, width: int, depth: int, num_heads: int, eta: float = 1.0, *, image_size: Size, patch_size: int,
        channels: int = 3, mlp_ratio: float = 4.0, qkv_bias: bool = True, tokens_norm: bool = True,
        cls_attn_layers: int = 2, use_pos_embed: bool = True, positions: str = "true", final_norm: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        check_stem(image_size, patch_size)
        self.image_size, self.mask_unit, self.channels = image_size, patch_size, channels
        self.width = self.token_width = width
        self.num_layers, self.num_heads, self.official = depth, num_heads, positions == "official"
        self.qkv_bias, self.eta, self.tokens_norm, self.cls_joins = qkv_bias, eta, tokens_norm, depth
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embed = ConvStem(channels, width, patch_size)
        self.pos_embed = FourierPositions(width, self.grid) if use_pos_embed else None
        self.blocks = nn.ModuleList(XcitBlock(width, num_heads, mlp_ratio, qkv_bias, eta) for _ in range(depth))
        self.cls_attn_blocks = nn.ModuleList(
            ClassBlock(width, num_heads, mlp_ratio, qkv_bias, eta, tokens_norm) for _ in range(cls_attn_layers)
        )
        self.norm = LayerNorm(width) if final_norm else NoNorm()
        self.apply(init_like_xcit)
        nn.init.normal_(self.cls_token, std=0.02)

    def embed(self, patches_BKP: Tensor, places_BK: Tensor | None, domain: int = CLEAN) -> Tensor:
        """(B, K, D); see Encoder."""
        with no_autocast(patches_BKP.device):
            return self.patch_embed(patches_BKP, places_BK, self.grid, domain)

    def encode(
        self, tokens: Tensor, places_BK: Tensor | None, *, domain: int = CLEAN, branches: Branches | None = None
    ) -> Tensor:
        """(B, 1 + K, D); the class attention has no stochastic depth, as in timm. See Encoder."""
        x, grid = tokens, self.grid
        if self.pos_embed is not None:
            x = with_positions(x, places_BK, self.pos_embed())
        if self.official and places_BK is not None:
            places_BK, grid = None, pseudo_grid(x.shape[1], grid)
        for index, block in enumerate(self.blocks):
            x = block(
                x, places_BK, grid, domain=domain, branches=None if branches is None else branches.of_layer(index)
            )
        x = torch.cat([self.cls_of(domain).to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
        for block in self.cls_attn_blocks:
            x = block(x, domain=domain)
        return normalise(self.norm, x, domain)

    def layers(self) -> list[nn.Module]:
        """Those over patches and those of the cls token."""
        return [*self.blocks, *self.cls_attn_blocks]

    def layer_of(self, name: str) -> int:
        """The class attention has the learning rates of the last layers."""
        if name.startswith("cls_attn_blocks."):
            return self.num_layers - len(self.cls_attn_blocks) + int(name.split(".")[1]) + 1
        return super().layer_of(name)


class XcitDecoder(Decoder):
    """XCiT's layers over the whole grid, and its class attention.

    Of the class attention only the norms and scales touch the patches; its attention and MLP serve the cls token, which
    is not predicted: they are the authors' and get gradients of zero.
    """

    def __init__(self, encoder: XcitEncoder, width: int, depth: int, num_heads: int, mlp_ratio: float = 4.0) -> None:
        super().__init__(encoder, width, 0, num_heads, mlp_ratio)
        del self.decoder_pos_embed
        self.decoder_pos_embed = FourierPositions(width, self.grid)  # type: ignore[assignment]
        self.decoder_blocks = nn.ModuleList(XcitBlock(width, num_heads, mlp_ratio) for _ in range(depth))
        self.decoder_cls_attn_blocks = nn.ModuleList(
            ClassBlock(width, num_heads, mlp_ratio, encoder.qkv_bias, encoder.eta, encoder.tokens_norm)
            for _ in encoder.cls_attn_blocks
        )
        self.apply(init_like_xcit)

    def layers(self) -> list[nn.Module]:
        """The blocks over patches, then those of the cls token."""
        return [*self.decoder_blocks, *self.decoder_cls_attn_blocks]

    def positions(self) -> Tensor:
        """(N, E) Fourier features of all patches, projected."""
        fourier: Any = self.decoder_pos_embed
        return fourier()

    def run(self, x: Tensor, ids_BM: Tensor | None) -> Tensor:
        """(B, M or N, E); see Decoder."""
        prefix, x = x[:, : self.num_prefix], x[:, self.num_prefix :]
        for index, block in enumerate(self.decoder_blocks):
            is_last = index == len(self.decoder_blocks) - 1
            x = block(x, None, self.grid, query_ids_BQ=ids_BM if is_last else None)
        # What the cls token gathers does not show in the prediction, so it may gather from the wanted patches only.
        x = torch.cat([prefix, x], dim=1)
        for block in self.decoder_cls_attn_blocks:
            x = block(x)
        return x[:, self.num_prefix :]


def build(architecture: Architecture, final_norm: bool) -> XcitEncoder:
    """The encoder of an architecture; its options: positions, qkv_bias, tokens_norm."""
    options = architecture.options
    return XcitEncoder(
        *SIZES[architecture.size], image_size=architecture.image_size, patch_size=architecture.patch_size,
        channels=architecture.channels, positions=options.get("positions", "true"),
        qkv_bias=options.get("qkv_bias", True), tokens_norm=options.get("tokens_norm", True), final_norm=final_norm,
    )  # fmt: skip


def recognise(tensors: Tensors) -> Architecture | None:
    """From the shapes. No tensor tells the image size: it is taken for 224, or for 32 with patches below 8."""
    if "blocks.0.attn.temperature" not in tensors:
        return None
    convs = [name for name in tensors if name.startswith("patch_embed.proj.") and name.endswith(".0.weight")]
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    shape = (tensors["cls_token"].shape[-1], depth, len(tensors["blocks.0.attn.temperature"]))
    size = next((name for name, (*known, _) in SIZES.items() if tuple(known) == shape), None)
    patch_size = next((p for p, count in STEM_CONVS.items() if count == len(convs)), None)
    if size is None or patch_size is None:
        return None
    channels = tensors["patch_embed.proj.0.0.weight"].shape[1]
    options = {"qkv_bias": "blocks.0.attn.qkv.bias" in tensors}
    return settled(Architecture("xcit", size, 224 if patch_size >= 8 else 32, patch_size, channels, options))


def to_timm(tensors: Tensors, architecture: Architecture) -> TimmModel:
    """timm's Xcit, equal on whole images.

    Raises:
        ValueError: a patch size that timm's stem has not.
    """
    if architecture.patch_size not in (8, 16):
        raise ValueError(
            f"timm's Xcit has stems for patches of 8 and 16 pixels, this encoder's are {architecture.patch_size}: "
            "pre-train with --model.patch_size 8 to export it to timm, or export with --format safetensors"
        )
    width, depth, num_heads, _ = SIZES[architecture.size]
    arguments = {
        "img_size": architecture.image_size,
        "patch_size": architecture.patch_size,
        "in_chans": architecture.channels,
        "embed_dim": width,
        "depth": depth,
        "num_heads": num_heads,
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "tokens_norm": architecture.options.get("tokens_norm", True),
        **head_arguments(tensors, "Xcit", architecture.options),
    }
    own = ("cls_token", "pos_embed.", "patch_embed.", "blocks.", "cls_attn_blocks.", "norm.", "head.")
    return TimmModel("timm.models.xcit.Xcit", arguments, encoder_tensors(tensors, own))


register(
    Family(
        name="xcit",
        title="XCiT",
        sizes={name: f"{w} wide, {d} deep, {h} heads" for name, (w, d, h, _) in SIZES.items()},
        anchor="patch_embed.proj.0.0.weight",
        mask_unit=lambda a: check_stem(a.image_size, a.patch_size),
        build=build,
        build_decoder=XcitDecoder,  # type: ignore[arg-type]
        recognise=recognise,
        to_timm=to_timm,
        options={"qkv_bias": True, "norm_before_pool": False, "tokens_norm": True},
        unseen=("tokens_norm",),
        image_size_in_tensors=False,
        kept_on_a_grid=True,
        position_table=False,
        pool="cls",
    )
)
