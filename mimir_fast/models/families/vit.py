"""ViT and DeiT (arXiv 2010.11929, 2012.12877): the encoder of MAE and of the MIMIR authors, under timm's names.

Fixed sine-cosine positions, a cls token, pre-norm blocks. Visible patches only: masked ones are never embedded.
Shapes: B images, N patches, K visible, P numbers a patch, T = 1 + K tokens, D width.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from mimir_fast.layers.norms import CLEAN, LayerNorm, NoNorm, normalise
from mimir_fast.models.blocks import Block, PatchEmbed, init_like_mae
from mimir_fast.models.branches import Branches
from mimir_fast.models.decoder import Decoder
from mimir_fast.models.encoder import Encoder, check_patch_size
from mimir_fast.models.families import Architecture, Family, Tensors, TimmModel, register
from mimir_fast.models.positions import sincos_positions, with_positions

# name: (width, depth, heads). `nano` is ours, for experiments on a CPU; the others are the papers'.
SIZES: dict[str, tuple[int, int, int]] = {
    "nano": (96, 4, 3),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}


class VitEncoder(Encoder):
    """Pre-norm transformer over the visible patches."""

    def __init__(
        self, width: int, depth: int, num_heads: int, *, image_size: int, patch_size: int, channels: int = 3,
        mlp_ratio: float = 4.0, final_norm: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        check_patch_size(image_size, patch_size)
        self.image_size, self.mask_unit, self.channels = image_size, patch_size, channels
        self.width = self.token_width = width
        self.num_layers, self.num_heads = depth, num_heads
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(sincos_positions(width, self.grid), requires_grad=False)
        self.patch_embed = PatchEmbed(channels, width, patch_size)
        self.blocks = nn.ModuleList(Block(width, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = LayerNorm(width) if final_norm else NoNorm()
        self.apply(init_like_mae)
        nn.init.normal_(self.cls_token, std=0.02)

    def encode(
        self, tokens: Tensor, places_BK: Tensor | None, *, domain: int = CLEAN, branches: Branches | None = None
    ) -> Tensor:
        """(B, 1 + K, D); with a keep rate below 1 fewer tokens come out than went in (AGAT). See Encoder."""
        x = with_positions(tokens, places_BK, self.pos_embed[0], self.cls_of(domain)[0])
        for index, block in enumerate(self.blocks):
            if branches is None:
                x = block(x, domain=domain)
                continue
            keep = 1 + max(1, round((x.shape[1] - 1) * branches.keep_rate)) if branches.keep_rate < 1 else None
            x = block(x, num_keep=keep, domain=domain, branches=branches.of_layer(index))
        return normalise(self.norm, x, domain)


def build(architecture: Architecture, final_norm: bool) -> VitEncoder:
    """The encoder of an architecture."""
    return VitEncoder(
        *SIZES[architecture.size], image_size=architecture.image_size, patch_size=architecture.patch_size,
        channels=architecture.channels, final_norm=final_norm,
    )  # fmt: skip


def recognise(tensors: Tensors) -> Architecture | None:
    """From the shapes of a plain vision transformer's tensors; heads go by width, as everywhere in the field."""
    if "pos_embed" not in tensors or "blocks.0.attn.qkv.weight" not in tensors or "blocks.0.gamma_1" in tensors:
        return None
    if tensors["patch_embed.proj.weight"].ndim != 4:
        return None
    width, channels, patch_size, _ = tensors["patch_embed.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    grid = math.isqrt(tensors["pos_embed"].shape[1] - 1)
    size = next((name for name, (w, d, _) in SIZES.items() if (w, d) == (width, depth)), None)
    if size is None or grid**2 != tensors["pos_embed"].shape[1] - 1:
        return None
    return Architecture("vit", size, grid * patch_size, patch_size, channels)


def timm_arguments(tensors: Tensors, architecture: Architecture) -> dict[str, Any]:
    """Arguments of the constructor of timm's `VisionTransformer`."""
    width, depth, num_heads = SIZES[architecture.size]
    return {
        "img_size": architecture.image_size,
        "patch_size": architecture.patch_size,
        "in_chans": architecture.channels,
        "embed_dim": width,
        "depth": depth,
        "num_heads": num_heads,
        "num_classes": len(tensors["head.weight"]) if "head.weight" in tensors else 0,
        "global_pool": "avg" if "fc_norm.weight" in tensors else "token",
    }


def to_timm(tensors: Tensors, architecture: Architecture) -> TimmModel:
    """The same model as timm's `VisionTransformer`, with its tensors."""
    arguments = timm_arguments(tensors, architecture)
    return TimmModel("timm.models.vision_transformer.VisionTransformer", arguments, dict(tensors))


register(
    Family(
        name="vit",
        title="ViT",
        sizes={name: f"{w} wide, {d} deep, {h} heads" for name, (w, d, h) in SIZES.items()},
        anchor="patch_embed.proj.weight",
        mask_unit=lambda a: check_patch_size(a.image_size, a.patch_size),
        build=build,
        build_decoder=Decoder,
        recognise=recognise,
        to_timm=to_timm,
    )
)
