"""Encoders in stages (Swin, ConvNeXt): from stage to stage four tokens become one of twice the width.

What a mask hides as a whole is a unit: the square of pixels that becomes one token of the last stage. In stage s a unit
holds u × u tokens, u = 2^(stages − 1 − s), so merging four tokens never crosses its border. Norms, linear layers and
the merging work on the visible units alone. What looks across units lays them out in the whole grid, zero where masked,
and picks the visible ones up again; the masked places are zero for every layer, as with SparK's masking of a dense
network after each convolution (arXiv 2301.03580), at the cost of the visible part but for that one operation.

Shapes: B images, N units in a grid, K visible ones, u tokens a side of a unit, S = grid·u tokens a side of the image
(rows and columns where that is no square), D width. Tokens of visible units are (B, K, u, u, D), those of a whole image
(B, S, S, D), as in timm: both end in (rows, columns, D).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mimir_fast.layers.norms import CLEAN, normalise
from mimir_fast.models.branches import Branches
from mimir_fast.models.encoder import Encoder
from mimir_fast.ops._precision import no_autocast
from mimir_fast.ops.patches import gather_patches, place_patches
from mimir_fast.sizes import Size, as_size, divides, height_width, typed


class StageBlock(nn.Module):
    """Base of the blocks: `forward(x, layout, *, domain, branches)`, with what its stage's `layouts` gave."""


class Stage(nn.Module):
    """Merging (but in the first stage), then the blocks.

    Args:
        grid: units a side of the image, or rows and columns of them.
        side: tokens a side of a unit, u.
    """

    def __init__(self, grid: Size, side: int, downsample: nn.Module | None, blocks: Sequence[StageBlock]) -> None:
        super().__init__()
        self.grid, self.side = grid, side
        self.downsample = downsample
        self.blocks = nn.ModuleList(blocks)

    def layouts(self, places_BK: Tensor | None, batch: int) -> tuple[Any, ...]:
        """Where this stage's tokens lie, for its blocks in turn: computed once, not in each of them."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, places_BK: Tensor | None, *, domain: int, branches: Branches | None, first_layer: int
    ) -> Tensor:
        """The tokens after this stage; `first_layer` is the number of its first block in the encoder."""
        if self.downsample is not None:
            x = self.downsample(x, domain)
        layouts = self.layouts(places_BK, x.shape[0])
        for index, block in enumerate(self.blocks):
            of_layer = None if branches is None else branches.of_layer(first_layer + index)
            x = block(x, layouts[index % len(layouts)], domain=domain, branches=of_layer)
        return x


class StagedEncoder(Encoder):
    """Stem, stages, norm. A family sets `stages` and `norm` and says what its `stem_of` is.

    Args:
        widths: D of each stage.
        depths: blocks of each stage.
        patch_size: side in pixels of a token of the first stage.
    """

    num_prefix = 0
    stages: nn.ModuleList
    norm: nn.Module

    def __init__(
        self, widths: Sequence[int], depths: Sequence[int], *, image_size: Size, patch_size: int, channels: int
    ) -> None:
        super().__init__()
        self.image_size, self.stem_patch, self.channels = image_size, patch_size, channels
        self.mask_unit = unit_of(image_size, patch_size, len(depths))
        self.width, self.token_width = widths[-1], widths[0]
        self.depths = tuple(depths)
        self.num_layers = sum(depths)

    def sides(self) -> list[int]:
        """u of each stage."""
        return [2 ** (len(self.depths) - 1 - stage) for stage in range(len(self.depths))]

    def stem_of(self, pixels: Tensor, domain: int) -> Tensor:
        """(…, D) tokens of the squares (…, patch²·C) in (row, column, channel) order."""
        raise NotImplementedError

    def embed(self, patches_BKP: Tensor, places_BK: Tensor | None, domain: int = CLEAN) -> Tensor:
        """(B, K, u², D); see Encoder."""
        unit, patch = self.mask_unit, self.stem_patch
        with no_autocast(patches_BKP.device):
            pixels = patches_BKP.to(next(self.parameters()).dtype).unflatten(-1, (unit, unit, self.channels))
            return self.stem_of(cut(pixels, patch).flatten(-3), domain).flatten(2, 3)

    def encode(
        self, tokens: Tensor, places_BK: Tensor | None, *, domain: int = CLEAN, branches: Branches | None = None
    ) -> Tensor:
        """(B, K, D): the last stage has one token a unit. See Encoder."""
        side = self.sides()[0]
        x = tokens.unflatten(2, (side, side))
        if places_BK is None:
            x = join(x, self.grid)
        first_layer = 0
        for stage in self.stages:
            x = stage(x, places_BK, domain=domain, branches=branches, first_layer=first_layer)
            first_layer += len(stage.blocks)  # type: ignore[arg-type]
        x = x.flatten(1, -2)
        return normalise(self.norm, x, domain)

    def layers(self) -> list[nn.Module]:
        """All blocks in their order."""
        return [block for stage in self.stages for block in stage.blocks]  # type: ignore[union-attr]

    def layer_of(self, name: str) -> int:
        """See Encoder. A merging belongs to the block before it, as in SimMIM's Swin."""
        if name.startswith(("stem.", "patch_embed.")):
            return 0
        if not name.startswith("stages."):
            return self.num_layers + 1
        _, stage, part, index, *_ = name.split(".")
        before = sum(self.depths[: int(stage)])
        return before + int(index) + 1 if part == "blocks" else before


def unit_of(image_size: Size, patch_size: int, num_stages: int) -> int:
    """Side in pixels of a unit: patch_size·2^(stages − 1), 32 for a stem of 4 and four stages.

    Raises:
        ValueError: units do not tile the image; the message names sizes that fit.
    """
    unit = patch_size * 2 ** (num_stages - 1)
    if patch_size < 1:
        raise ValueError(f"patch_size={patch_size}: wanted the side of a stem patch in pixels, such as 4")
    if not divides(unit, image_size):
        fits = [p for p in (1, 2, 4, 8) if divides(p * 2 ** (num_stages - 1), image_size)]
        sides = height_width(image_size)
        below, above = [side // unit * unit for side in sides], [-(-side // unit) * unit for side in sides]
        patches = f"a stem patch of {' or '.join(map(str, fits))}, or " if fits else ""
        sizes = " or ".join(typed(as_size(size)) for size in (below, above) if min(size))
        raise ValueError(
            f"image size {typed(image_size)} is not divisible by {unit} pixels, the unit of {num_stages} stages over a "
            f"stem patch of {patch_size} (patch · 2^{num_stages - 1}): use {patches}images of {sizes} pixels"
        )
    return unit


def cut(x: Tensor, size: int, across: int | None = None) -> Tensor:
    """(…, h, w, D) → (…, h/size, w/across, size, across, D): squares (or not), inside them (row, column)."""
    *outer, h, w, D = x.shape
    across = across or size
    x = x.reshape(*outer, h // size, size, w // across, across, D)
    return x.transpose(-4, -3)


def join(units_BNuuD: Tensor, grid: Size) -> Tensor:
    """(B, S, S, D): all units of an image, in raster order, side by side."""
    B, _, u, _, D = units_BNuuD.shape
    down, across = height_width(grid)
    x = units_BNuuD.reshape(B, down, across, u, u, D).transpose(2, 3)
    return x.reshape(B, down * u, across * u, D)


def unit_rows(places_BK: Tensor, grid: Size, side: int) -> Tensor:
    """(B, K·u) int64: where the rows of u tokens of each unit lie among the N·u such rows of the image."""
    _, across = height_width(grid)
    down, right = places_BK // across, places_BK % across
    inside = torch.arange(side, device=places_BK.device)
    return ((down.unsqueeze(-1) * side + inside) * across + right.unsqueeze(-1)).flatten(1)


def lay_out(x_BKuuD: Tensor, rows_BR: Tensor, grid: Size) -> Tensor:
    """(B, S, S, D): the visible units in their places, zero elsewhere."""
    B, K, u, _, D = x_BKuuD.shape
    down, across = height_width(grid)
    return place_patches(x_BKuuD.reshape(B, K * u, u * D), rows_BR, down * across * u).view(B, down * u, across * u, D)


def pick_up(x_BSSD: Tensor, rows_BR: Tensor, side: int) -> Tensor:
    """(B, K, u, u, D): the units whose rows these are."""
    B, D = x_BSSD.shape[0], x_BSSD.shape[-1]
    rows = gather_patches(x_BSSD.reshape(B, -1, side * D), rows_BR)
    return rows.view(B, -1, side, side, D)


def init_like_timm(module: nn.Module) -> None:
    """Normal weights of std 0.02, truncated, and zero biases, as timm's; to be used with `Module.apply`."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def rename(tensors: Mapping[str, Tensor], prefixes: Mapping[str, str], *, rest: bool) -> dict[str, Tensor]:
    """The tensors with the first prefix that fits replaced; those that none fits are kept as they are, or left out."""
    renamed = {}
    for name, tensor in tensors.items():
        old = next((old for old in prefixes if name.startswith(old)), None)
        if old is not None or rest:
            renamed[name if old is None else prefixes[old] + name.removeprefix(old)] = tensor
    return renamed


def numbered(names: Iterable[str], pattern: str) -> int:
    """How many of `pattern.format(0)`, `pattern.format(1)`, … there are before the first that is missing."""
    known, count = set(names), 0
    while pattern.format(count) in known:
        count += 1
    return count
