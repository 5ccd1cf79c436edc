"""ConvNeXt (Liu et al., arXiv 2201.03545), masked as SparK masks a convolutional network (arXiv 2301.03580).

Only the depthwise 7 × 7 convolution looks across units: it runs over the whole grid, in which masked places are zero;
all other work, nine tenths of it, is done for visible units only. Values, and names but for the head's, are timm's.
The decoder is ConvNeXt V2's (arXiv 2301.00808): blocks of the family over the grid with mask tokens. It gets no
position embedding, the zeros around the image tell a convolution where it is.

Shapes: B images, N units in a grid, K visible, M wanted ones, u tokens a side of a unit, S = grid·u, D width, E the
decoder's width.
"""

import re
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from mimir_fast.layers.convolution import conv_of_squares
from mimir_fast.layers.linear import norm_mlp
from mimir_fast.layers.norms import CLEAN, LayerNorm, NoNorm, is_adapter, normalise
from mimir_fast.models.blocks import Mlp
from mimir_fast.models.branches import LayerBranches, shape_branch
from mimir_fast.models.decoder import Decoder
from mimir_fast.models.families import Architecture, Family, Tensors, TimmModel, register
from mimir_fast.models.staged import (
    Stage,
    StageBlock,
    StagedEncoder,
    cut,
    init_like_timm,
    lay_out,
    numbered,
    pick_up,
    rename,
    unit_of,
    unit_rows,
)
from mimir_fast.ops.patches import gather_patches
from mimir_fast.sizes import Size, height_width
from mimir_fast.validation import check_number

# name: (width of the first stage, blocks of each stage). `nano` is ours, for experiments on a CPU.
SIZES: dict[str, tuple[int, tuple[int, ...]]] = {
    "nano": (32, (2, 2, 2)),
    "tiny": (96, (3, 3, 9, 3)),
    "small": (96, (3, 3, 27, 3)),
    "base": (128, (3, 3, 27, 3)),
}
LAYER_SCALE = 1e-6
EPS = 1e-6  # of all norms but the last, for which an option may say another, as transformers does


class ConvNextBlock(StageBlock):
    """x + γ·MLP(LN(depthwise 7 × 7 convolution of x)).

    Args:
        grid, side: units a side of the image, tokens a side of a unit.
        layer_scale: of the branch at the start; None for none.
    """

    def __init__(self, dim: int, grid: Size, side: int, layer_scale: float | None = LAYER_SCALE) -> None:
        super().__init__()
        self.grid, self.side = grid, side
        self.conv_dw = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.gamma = None if layer_scale is None else nn.Parameter(torch.full((dim,), layer_scale))

    def forward(
        self, x: Tensor, rows_BR: Tensor | None, *, domain: int = CLEAN, branches: LayerBranches | None = None
    ) -> Tensor:
        """Same shape as x: (B, K, u, u, D) with the `rows_BR` of its units, (B, S, S, D) with None."""
        if rows_BR is None:
            branch = self.convolve(x)
        else:
            branch = pick_up(self.convolve(lay_out(x, rows_BR, self.grid)), rows_BR, self.side)
        branch = norm_mlp(self.norm, self.mlp, branch, domain, residual=False)
        if self.gamma is not None:
            branch = branch * self.gamma
        return x + shape_branch(branch, branches, 0)

    def convolve(self, x_BSSD: Tensor) -> Tensor:
        """(B, S, S, D): the convolution in the order in which tokens lie in memory."""
        return self.conv_dw(x_BSSD.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Stem(nn.Sequential):
    """A linear layer of the pixels of a token, and a norm."""

    def __init__(self, channels: int, dim: int, patch_size: int) -> None:
        super().__init__(nn.Conv2d(channels, dim, patch_size, patch_size), LayerNorm(dim))
        self.patch_size = patch_size

    def forward(self, pixels: Tensor, domain: int = CLEAN) -> Tensor:
        """(…, D) from (…, patch²·C)."""
        conv, norm = self
        return normalise(norm, conv_of_squares(conv, pixels, self.patch_size), domain)


class Downsample(nn.Sequential):
    """A norm, and four tokens to one."""

    def forward(self, x: Tensor, domain: int = CLEAN) -> Tensor:
        """(…, h/2, w/2, 2D) from (…, h, w, D)."""
        norm, conv = self
        return conv_of_squares(conv, cut(normalise(norm, x, domain), 2).flatten(-3), 2)


class ConvNextStage(Stage):
    """A stage whose blocks ask for the rows of the visible units."""

    def layouts(self, places_BK: Tensor | None, batch: int) -> tuple[Tensor | None]:
        """The rows of the visible units."""
        return (None if places_BK is None else unit_rows(places_BK, self.grid, self.side),)


class ConvNextEncoder(StagedEncoder):
    """Over the visible units."""

    num_branches = 1

    def __init__(
        self, width: int, depths: Sequence[int], *, image_size: Size, patch_size: int, channels: int = 3,
        final_norm: bool = True, eps: float = EPS,
    ) -> None:  # fmt: skip
        widths = [width * 2**stage for stage in range(len(depths))]
        super().__init__(widths, depths, image_size=image_size, patch_size=patch_size, channels=channels)
        self.stem = Stem(channels, width, patch_size)
        self.stages = nn.ModuleList()
        for index, (dim, depth, side) in enumerate(zip(widths, depths, self.sides(), strict=True)):
            merge = Downsample(LayerNorm(dim // 2), nn.Conv2d(dim // 2, dim, 2, 2)) if index else None
            blocks = [ConvNextBlock(dim, self.grid, side) for _ in range(depth)]
            self.stages.append(ConvNextStage(self.grid, side, merge, blocks))
        self.norm = LayerNorm(self.width, eps) if final_norm else NoNorm()
        self.apply(init_like_timm)

    def stem_of(self, pixels: Tensor, domain: int) -> Tensor:
        """(…, D) tokens from the pixels (…, patch²·C) of each, see StagedEncoder."""
        return self.stem(pixels, domain)


class ConvNextDecoder(Decoder):
    """Mask tokens in the empty places of the grid, blocks without layer scale, a linear head on the wanted ones."""

    decoder_pos_embed: None  # type: ignore[assignment]

    def __init__(self, encoder: ConvNextEncoder, width: int, depth: int, num_heads: int) -> None:
        super().__init__(encoder, width, depth, num_heads)
        self.decoder_pos_embed = None
        for block in self.decoder_blocks:
            init_like_timm(cast(ConvNextBlock, block).conv_dw)

    def build_block(self, width: int, num_heads: int) -> nn.Module:
        """There are no heads in a convolution."""
        return ConvNextBlock(width, self.grid, 1, layer_scale=None)

    def positions(self) -> Tensor:
        """(N, E) zeros: a convolution needs no position embedding."""
        return self.mask_token.new_zeros(self.num_patches, self.mask_token.shape[-1])

    def run(self, x: Tensor, ids_BM: Tensor | None) -> Tensor:
        """(B, M or N, E)."""
        x = x.unflatten(1, height_width(self.grid))
        for block in self.decoder_blocks:
            x = block(x, None)
        x = x.flatten(1, 2)
        return x if ids_BM is None else gather_patches(x, ids_BM)


def build(architecture: Architecture, final_norm: bool) -> ConvNextEncoder:
    """The encoder of an architecture."""
    return ConvNextEncoder(
        *SIZES[architecture.size], image_size=architecture.image_size, patch_size=architecture.patch_size,
        channels=architecture.channels, final_norm=final_norm,
        eps=architecture.options.get("eps", EPS),
    )  # fmt: skip


def settle(architecture: Architecture) -> Architecture:
    """Refuses an `eps` that is none; see Family."""
    check_number("eps", architecture.options.get("eps", EPS), above=0)
    return architecture


def from_timm(tensors: Tensors) -> dict[str, Tensor]:
    """timm's head holds the norm behind the pooling, or the norm in front of it has a name of its own."""
    # Its MLP may be of 1 × 1 convolutions, which is the same.
    tensors = {n: t.flatten(1) if ".mlp.fc" in n and t.shape[2:] == (1, 1) else t for n, t in tensors.items()}
    return rename(tensors, {"head.norm.": "fc_norm.", "head.fc.": "head.", "norm_pre.": "norm."}, rest=True)


def recognise(tensors: Tensors) -> Architecture | None:
    """From the shapes. They do not tell the image size: 224 pixels is taken for units of 32, four units for others."""
    stem = tensors.get("stem.0.weight")
    if stem is None or stem.ndim != 4:
        return None
    width, channels, patch_size, _ = stem.shape
    num_stages = numbered(tensors, "stages.{}.blocks.0.conv_dw.weight")
    depths = tuple(numbered(tensors, f"stages.{s}.blocks.{{}}.conv_dw.weight") for s in range(num_stages))
    size = next((name for name, shape in SIZES.items() if shape == (width, depths)), None)
    if size is None or why_not(tensors):
        return None
    unit = patch_size * 2 ** (num_stages - 1)
    return Architecture("convnext", size, 224 if unit == 32 else 4 * unit, patch_size, channels)


_LAST = r"\.(weight|bias)"
_KNOWN = re.compile(
    rf"stem\.[01]{_LAST}|stages\.[1-9]\d*\.downsample\.[01]{_LAST}|stages\.\d+\.blocks\.\d+\.((conv_dw|norm|mlp\.fc[12]){_LAST}"
    r"|gamma)|(norm|fc_norm|head|decoder|mask_token).*"
)


def why_not(tensors: Tensors) -> str:
    """By which tensor a relative, such as ConvNeXt v2 or one with another stem, is no ConvNeXt; "" for one that is."""
    foreign = next((n for n in from_timm(tensors) if not _KNOWN.fullmatch(n) and not is_adapter(n)), "")
    if foreign:
        return f"{foreign}, which ConvNeXt has not"
    if "stages.0.blocks.0.gamma" not in tensors:
        return "stages.0.blocks.0.gamma, which is missing"
    norm, conv = tensors["stem.1.weight"], tensors["stages.0.blocks.0.conv_dw.weight"]
    if norm.ndim != 1:
        return f"stem.1.weight, which is {tuple(norm.shape)} and no norm"
    return (
        f"stages.0.blocks.0.conv_dw.weight, which is {tuple(conv.shape)} and not 7 x 7" if conv.shape[-1] != 7 else ""
    )


def to_timm(tensors: Tensors, architecture: Architecture) -> TimmModel:
    """timm's ConvNeXt. It has four stages always, the fourth is taken out of a model of three."""
    width, depths = SIZES[architecture.size]
    missing = 4 - len(depths)
    widths = [width * 2**stage for stage in range(len(depths))]
    pooled_first = "fc_norm.weight" in tensors
    arguments = {
        "in_chans": architecture.channels,
        "num_classes": len(tensors["head.weight"]) if "head.weight" in tensors else 0,
        "depths": (*depths, *[0] * missing),
        "dims": (*widths, *widths[-1:] * missing),
        "patch_size": architecture.patch_size,
        "head_norm_first": not pooled_first,
    }
    replaced = {f"stages[{stage}]": "torch.nn.Identity()" for stage in range(len(depths), 4)}
    if architecture.patch_size == 2:  # timm puts a merging of its own behind a stem of 2
        replaced["stages[0].downsample"] = "torch.nn.Identity()"
    if "eps" in architecture.options:
        last = "head.norm" if pooled_first else "norm_pre"
        replaced[last] = f"timm.layers.LayerNorm2d({widths[-1]}, eps={architecture.options['eps']!r})"
    names = {"fc_norm.": "head.norm.", "head.": "head.fc.", "norm.": "norm_pre.", "stem.": "stem.",
             "stages.": "stages."}  # fmt: skip
    renamed = rename({n: t for n, t in tensors.items() if not is_adapter(n)}, names, rest=False)
    return TimmModel("timm.models.convnext.ConvNeXt", arguments, renamed, replaced)


register(
    Family(
        name="convnext",
        title="ConvNeXt",
        sizes={
            name: f"{width} wide at first, {'-'.join(map(str, depths))} deep" for name, (width, depths) in SIZES.items()
        },
        anchor="stages.0.blocks.0.conv_dw.weight",
        mask_unit=lambda a: unit_of(a.image_size, a.patch_size, len(SIZES[a.size][1])),
        build=build,
        build_decoder=ConvNextDecoder,  # type: ignore[arg-type]
        recognise=recognise,
        to_timm=to_timm,
        from_timm=from_timm,
        image_size_in_tensors=False,
        position_table=False,
        options={"eps": EPS},
        unseen=("eps",),
        settle=settle,
        why_not=why_not,
    )
)
