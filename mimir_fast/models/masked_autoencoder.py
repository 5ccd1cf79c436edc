"""Masked autoencoder ViT, working in patch space: it is given visible patches, not images.

Nothing walks back to pixels between attack, encoder and loss, and masked patches are never embedded. Parameter names
and shapes are those of MAE and of the MIMIR authors, so their checkpoints load strictly.
Shapes: B batch, N patches, K kept, M masked, P = p·p·C numbers a patch, D encoder width, E decoder width.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mimir_fast.models.positions import sincos_positions
from mimir_fast.models.vit import Block, PatchEmbed, init_like_mae
from mimir_fast.ops.patches import gather_patches, scatter_patches

EncoderName = Literal["nano", "tiny", "small", "base", "large"]
DecoderName = Literal["light", "mae"]

# name: (width, depth, heads). `nano` is ours, for experiments on a CPU; the others are the papers'.
ENCODERS: dict[EncoderName, tuple[int, int, int]] = {
    "nano": (96, 4, 3),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}
# `light` is the MIMIR authors' decoder, `mae` the one of He et al.
DECODERS: dict[DecoderName, tuple[int, int, int]] = {"light": (128, 2, 16), "mae": (512, 8, 16)}


@dataclass
class ModelConfig:
    """Which masked autoencoder."""

    encoder: EncoderName = "base"
    """Width, depth and heads: nano 96/4/3 (ours), tiny 192/12/3, small 384/12/6, base 768/12/12, large 1024/24/16."""
    patch_size: int = 16
    """Side of a patch in pixels: 2 for 32² images, 4 for 64², 16 for 224²."""
    decoder: DecoderName = "light"
    """`light` 128 wide, 2 deep, 16 heads (the authors'); `mae` 512 wide, 8 deep, 16 heads."""


def check_patch_size(image_size: int, patch_size: int) -> None:
    """Raises ValueError, naming patch sizes that would do, when the patches do not tile the image."""
    if patch_size < 1 or image_size % patch_size:
        fits = [p for p in (2, 4, 7, 8, 14, 16, 28, 32) if image_size % p == 0]
        raise ValueError(
            f"image size {image_size} is not divisible by patch size {patch_size}; "
            f"patch sizes that fit: {', '.join(map(str, fits)) or 'none of the usual ones, resize the images'}"
        )


class MaskedAutoencoder(nn.Module):
    """A ViT encoder over visible patches and a light ViT decoder over all of them."""

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_embed_dim: int = 128,
        decoder_depth: int = 2,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        check_patch_size(img_size, patch_size)
        self.img_size, self.patch_size, self.in_chans = img_size, patch_size, in_chans
        self.num_heads = num_heads
        grid = img_size // patch_size
        self.num_patches = grid**2

        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_positions(embed_dim, grid), requires_grad=False)
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_positions(decoder_embed_dim, grid), requires_grad=False)
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_embed_dim, decoder_num_heads, mlp_ratio) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size**2 * in_chans)

        self.apply(init_like_mae)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def embed(self, patches_BKP: Tensor, ids_keep_BK: Tensor) -> Tensor:
        """(B, K, D) tokens with positions.

        In fp32 whatever autocast says: bf16 has a spacing of 1/256 at the top of [0, 1], and ε is 8 of those.
        """
        with torch.autocast(patches_BKP.device.type, enabled=False):
            return self.patch_embed(patches_BKP) + self.pos_embed[0, 1:][ids_keep_BK]

    def encode(self, patches_BKP: Tensor, ids_keep_BK: Tensor) -> Tensor:
        """Latent (B, 1 + K, D): cls and visible tokens after the final norm, in the order of `ids_keep_BK`."""
        x = self.embed(patches_BKP, ids_keep_BK)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls, x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def decode(self, latent_BTD: Tensor, ids_keep_BK: Tensor, ids_BM: Tensor | None = None) -> Tensor:
        """Predicted patches (B, M, P) at the places `ids_BM`, or (B, N, P) everywhere when it is None."""
        x = self.decoder_embed(latent_BTD)
        positions = self.decoder_pos_embed[0]
        cls = x[:, :1] + positions[:1].to(x.dtype)
        full = scatter_patches(x[:, 1:], ids_keep_BK, self.mask_token[0, 0], positions[1:])
        x = torch.cat([cls, full], dim=1)
        queries = None if ids_BM is None else ids_BM + 1  # the cls token stands in front
        *first, last = self.decoder_blocks
        for block in first:
            x = block(x)
        x = last(x, queries)
        if queries is None:
            x = x[:, 1:]
        return self.decoder_pred(self.decoder_norm(x))

    def forward(self, patches_BKP: Tensor, ids_keep_BK: Tensor, ids_BM: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(latent (B, 1 + K, D), predicted patches): `encode`, then `decode`.

        Args:
            patches_BKP: visible patches in [0, 1], (row, column, channel) order inside a patch.
            ids_keep_BK: (B, K) int64, where they belong.
            ids_BM: (B, M) int64, where predictions are wanted; None for everywhere.
        """
        latent = self.encode(patches_BKP, ids_keep_BK)
        return latent, self.decode(latent, ids_keep_BK, ids_BM)

    def reconstruct(self, patches_BNP: Tensor, ids_keep_BK: Tensor) -> Tensor:
        """(B, N, P) predictions everywhere from all patches, of which only the kept ones are looked at."""
        return self(gather_patches(patches_BNP, ids_keep_BK), ids_keep_BK)[1]


def build_masked_autoencoder(config: ModelConfig, image_size: int, channels: int = 3) -> MaskedAutoencoder:
    """The model a config names, freshly initialised from torch's global generator."""
    width, depth, heads = ENCODERS[config.encoder]
    decoder_width, decoder_depth, decoder_heads = DECODERS[config.decoder]
    return MaskedAutoencoder(
        img_size=image_size,
        patch_size=config.patch_size,
        in_chans=channels,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        decoder_embed_dim=decoder_width,
        decoder_depth=decoder_depth,
        decoder_num_heads=decoder_heads,
    )
