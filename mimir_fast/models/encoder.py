"""What an encoder family offers: one encoder for masked pre-training and for the classifier.

Images come in as patches: squares of `mask_unit` pixels, the smallest thing a mask can hide. Only the visible ones are
given, with their places. So nothing masked can reach the latent, by construction.
Shapes: B images, N patches of the grid, K visible ones, P = unit²·C numbers a patch, D width, T tokens inside a patch.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from mimir_fast.layers.norms import CLEAN, SUFFIX, add_adapters
from mimir_fast.models.branches import Branches
from mimir_fast.ops._precision import no_autocast
from mimir_fast.ops.patches import gather_patches
from mimir_fast.sizes import Size, area, divided, divides, height_width, typed

# Parameters (1, rows, D) in front of the patches, in this order: a cls token, DeiT's distillation token, registers.
PREFIX_TOKENS = ("cls_token", "dist_token", "reg_token")
# A matrix (offsets, heads) that is added to attention, and not multiplied with anything.
POSITION_BIAS = "relative_position_bias_table"


class Encoder(nn.Module):
    """Base of the families.

    Attributes:
        image_size, channels: of the images.
        mask_unit: side in pixels of a patch that is masked as a whole.
        width: D of the latent.
        token_width: D of the tokens that `embed` gives.
        num_prefix: rows of the latent in front of the patches': a cls token first, then registers and the like.
        num_layers: layers for stochastic depth and layer-wise learning rates.
        num_branches: residual branches of a layer.
        has_adapters: norms and prefix exist twice, for clean and for adversarial data.
        options: what it can do beside the family's plain form, see Architecture; `build_encoder` notes it.
        cls_joins: layers in front of which the cls token joins the patches; of interest to who freezes some.
    """

    image_size: Size
    channels: int
    mask_unit: int
    width: int
    token_width: int
    num_prefix: int = 1
    num_layers: int
    num_branches: int = 2
    has_adapters: bool = False
    options: Mapping[str, Any] = MappingProxyType({})
    cls_joins: int = 0

    @property
    def has_cls_token(self) -> bool:
        """Whether the first row of the latent is a cls token's."""
        return isinstance(getattr(self, "cls_token", None), nn.Parameter)

    @property
    def grid(self) -> Size:
        """Patches along a side of the image: one number for a square, else rows and columns."""
        return divided(self.image_size, self.mask_unit)

    @property
    def num_patches(self) -> int:
        """N, patches of an image."""
        return area(self.grid)

    @property
    def patch_dim(self) -> int:
        """P, numbers in a patch: mask_unit²·channels."""
        return self.mask_unit**2 * self.channels

    def embed(self, patches_BKP: Tensor, places_BK: Tensor | None, domain: int = CLEAN) -> Tensor:
        """(B, K, D) tokens, (B, K, T, D) where a patch holds several, without anything learned about positions.

        In fp32 whatever autocast says: bf16 has a spacing of 1/256 at the top of [0, 1], and ε is 8 of those.

        Args:
            patches_BKP: float in [0, 1], (row, column, channel) order inside a patch.
            places_BK: (B, K) int64, where they belong; None when all N are there in raster order.
            domain: whose norms, for stems that have some; see `encode`.

        Here: `patch_embed` of each patch alone. Stems that look beyond a patch override it.
        """
        with no_autocast(patches_BKP.device):
            return self.patch_embed(patches_BKP)  # type: ignore[operator]

    def encode(
        self, tokens: Tensor, places_BK: Tensor | None, *, domain: int = CLEAN, branches: Branches | None = None
    ) -> Tensor:
        """Latent (B, prefix + K, D) after the final norm, patches in the order of `places_BK`.

        Args:
            tokens: what `embed` gave; with mask tokens among them for a full-length encoder.
            domain: 0 clean or 1 adversarial data; 1 needs `add_adapters`.
            branches: what happens to the residual branches; None leaves them alone.
        """
        raise NotImplementedError

    def forward(
        self, patches_BKP: Tensor, places_BK: Tensor | None, *, domain: int = CLEAN, branches: Branches | None = None,
        mask_token_D: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Latent (B, prefix + K, D): `encode` of what `embed` gives.

        Args:
            mask_token_D: stands in all other places (a full-length encoder): the latent has all N patches then.
        """
        tokens = self.embed(patches_BKP, places_BK, domain)
        if mask_token_D is not None and places_BK is not None:
            tokens, places_BK = fill_in(tokens, places_BK, mask_token_D, self.num_patches), None
        return self.encode(tokens, places_BK, domain=domain, branches=branches)

    def add_adapters(self) -> None:
        """Norm layers and the prefix (cls token, registers) get a second copy for adversarial data (AEMIM)."""
        add_adapters(self)
        self.has_adapters = True
        for name in PREFIX_TOKENS:
            token = getattr(self, name, None)
            if isinstance(token, nn.Parameter):
                self.register_parameter(name + SUFFIX, nn.Parameter(token.detach().clone()))

    def cls_of(self, domain: int) -> Tensor:
        """The cls token (1, 1, D) of a domain."""
        return self.token_of("cls_token", domain)

    def token_of(self, name: str, domain: int) -> Tensor:
        """One of PREFIX_TOKENS, (1, rows, D), of a domain."""
        token: Any = getattr(self, name if domain == CLEAN else name + SUFFIX)
        return token

    def layers(self) -> list[nn.Module]:
        """The layers in their order: what is compiled, sharded and counted one by one."""
        return list(self.blocks)  # type: ignore[arg-type]

    def layer_of(self, name: str) -> int:
        """0 for a parameter of the embedding, 1 … num_layers for the layers, num_layers + 1 for what comes after."""
        if name.startswith((*PREFIX_TOKENS, "pos_embed", "patch_embed", "norm_pre")):
            return 0
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        return self.num_layers + 1


def fill_in(tokens: Tensor, places_BK: Tensor, mask_token_D: Tensor, num_patches: int) -> Tensor:
    """(B, N, …, D): the visible tokens in their places, the mask token everywhere else (a full-length encoder)."""
    B, K = places_BK.shape
    full = mask_token_D.to(tokens.dtype).expand(B, num_patches, *tokens.shape[2:])
    index = places_BK.view(B, K, *[1] * (tokens.ndim - 2)).expand_as(tokens)
    return torch.scatter(full, 1, index, tokens)


def conv_over_grid(conv: nn.Module, x_BKP: Tensor, side: int, places_BK: Tensor | None, grid: Size) -> Tensor:
    """A convolution over visible patches on their grid, zeros in the holes: (B, K, s'·s'·C'), s' = s / stride.

    So nothing of a masked patch reaches a visible one, and what follows (norms with their statistics, activations) sees
    visible patches only; with nothing masked it is the plain convolution. Masked dense convolution is SparK's idea
    (arXiv 2301.03580).

    Args:
        x_BKP: (B, K, s·s·C), as the result in (row, column, channel) order.
        side: s, pixels a side of a patch at the present resolution.
        places_BK: where they belong; None when all N are there in raster order.
    """
    B, P = x_BKP.shape[0], x_BKP.shape[-1]
    s, C, (down, across) = side, P // side**2, height_width(grid)
    full = x_BKP if places_BK is None else fill_in(x_BKP, places_BK, x_BKP.new_zeros(P), down * across)
    image_BHWC = full.reshape(B, down, across, s, s, C).transpose(2, 3).reshape(B, down * s, across * s, C)
    out_BHWC = conv(image_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # channels last in memory, all the way
    t = out_BHWC.shape[1] // down
    rows = out_BHWC.reshape(B, down, t, across, t, -1).transpose(2, 3).reshape(B, down * across, -1)
    return rows if places_BK is None else gather_patches(rows, places_BK)


def check_patch_size(image_size: Size, patch_size: int) -> int:
    """The patch size; raises ValueError, naming those that would do, when the patches do not tile the image."""
    if not divides(patch_size, image_size):
        fits = [p for p in (2, 4, 7, 8, 14, 16, 28, 32) if divides(p, image_size)]
        raise ValueError(
            f"image size {typed(image_size)} is not divisible by patch size {patch_size}; "
            f"patch sizes that fit: {', '.join(map(str, fits)) or 'none of the usual ones, resize the images'}"
        )
    return patch_size
