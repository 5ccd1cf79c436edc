"""Swin (Liu et al., arXiv 2103.14030): attention in windows that move by half a window from block to block.

Queries, keys and values are computed for visible units only. For the attention they are laid out in windows, masked
places are keys that nobody looks at, and the visible tokens are picked up again; windows and their shift are an order
of the tokens, so laying out, shifting and cutting is one copy. Values, and names inside a stage, are timm's.
A window is as wide as the image has units, 7 for 224 pixels and units of 32, 6 for 192, 12 for 384, as in all published
models; so windows tile every stage, and the last stage is one window. Of an image that is no square, neither are they.

Shapes: B images, N units in a grid, K visible, u tokens a side of a unit, S = grid·u tokens a side of the image, V
visible tokens (K·u², or all S²), W windows of A tokens (window² of a square), H heads, D width.
"""

import inspect
import re
from collections.abc import Sequence
from typing import NamedTuple, cast

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
    numbered,
    rename,
    unit_of,
)
from mimir_fast.ops.patches import gather_patches, place_patches
from mimir_fast.sizes import Size, area, as_size, divided, height_width, nearest_grid, typed

EPS = 1e-5  # of the norms, in Swin
Shift = int | tuple[int, int]  # of the windows along both axes, or along rows and columns

# name: (width of the first stage, blocks of each stage, heads of each stage). `nano` is ours, for experiments on a CPU.
SIZES: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {
    "nano": (32, (2, 2, 2), (2, 4, 8)),
    "tiny": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "base": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "large": (192, (2, 2, 18, 2), (6, 12, 24, 48)),
}


class Windows(NamedTuple):
    """Where the tokens lie.

    Attributes:
        slots: (B, V) int64: place of each visible token among the W·A of the image, window after window.
        hidden: (B·W, 1, 1, A) bool, true for keys that are masked; None when there are none.
    """

    slots: Tensor
    hidden: Tensor | None


class WindowAttention(nn.Module):
    """Attention inside windows, with a learned bias for the offset between query and key."""

    def __init__(self, dim: int, num_heads: int, window: Size) -> None:
        super().__init__()
        self.num_heads, self.window = num_heads, window
        self.relative_position_bias_table = nn.Parameter(torch.empty(num_offsets(window), num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("offsets_AA", offset_ids(window), persistent=False)
        self.offsets_AA: Tensor
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, windows: Windows, apart_WAA: Tensor | None) -> Tensor:
        """Same shape as x, visible units or a whole image; `apart_WAA` is added to the scores."""
        B, D, A = x.shape[0], x.shape[-1], area(self.window)
        num_slots = x.shape[1] * x.shape[2] if windows.hidden is None else windows.hidden.numel() // B
        qkv = place_patches(self.qkv(x).view(B, -1, 3 * D), windows.slots, num_slots)
        q, k, v = qkv.view(-1, A, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.offsets_AA].permute(2, 0, 1)
        if apart_WAA is not None:
            bias = bias + apart_WAA.unsqueeze(1)
        scores = (q * (D // self.num_heads) ** -0.5) @ k.transpose(-2, -1)
        scores = (scores.unflatten(0, (B, -1)) + bias).flatten(0, 1)
        if windows.hidden is not None:
            # Not −inf: nobody reads a window whose keys are all masked, but its NaN would spread through gradients.
            scores = scores.masked_fill(windows.hidden, torch.finfo(scores.dtype).min)
        out = (scores.softmax(dim=-1).to(v.dtype) @ v).transpose(1, 2).reshape(B, num_slots, D)
        return self.proj(gather_patches(out, windows.slots)).view_as(x)


class SwinBlock(StageBlock):
    """x + windowed Attention(LN(x)), then x + MLP(LN(x)).

    Args:
        resolution: S, tokens a side of the image.
        shift: by how many tokens the windows are moved, along both axes or along each.
    """

    def __init__(self, dim: int, num_heads: int, resolution: Size, window: Size, shift: Shift) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, EPS)
        self.attn = WindowAttention(dim, num_heads, window)
        self.norm2 = LayerNorm(dim, EPS)
        self.mlp = Mlp(dim, 4 * dim)
        self.register_buffer(
            "apart_WAA", keep_apart(resolution, window, shift) if shift != 0 else None, persistent=False
        )
        self.apart_WAA: Tensor | None

    def forward(
        self, x: Tensor, windows: Windows, *, domain: int = CLEAN, branches: LayerBranches | None = None
    ) -> Tensor:
        """Same shape as x, (B, K, u, u, D) or (B, S, S, D)."""
        x = x + shape_branch(self.attn(normalise(self.norm1, x, domain), windows, self.apart_WAA), branches, 0)
        return x + shape_branch(norm_mlp(self.norm2, self.mlp, x, domain, residual=False), branches, 1)


class PatchMerging(nn.Module):
    """A norm, and four tokens to one."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = LayerNorm(4 * dim, EPS)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor, domain: int = CLEAN) -> Tensor:
        """(…, h/2, w/2, 2D) from (…, h, w, D)."""
        # Swin's order of the four is column by column.
        return self.reduction(normalise(self.norm, cut(x, 2).transpose(-3, -2).flatten(-3), domain))


class SwinStage(Stage):
    """See Stage. The windows stand still in even blocks and are moved in odd ones."""

    def __init__(self, grid: Size, side: int, dim: int, depth: int, num_heads: int, first: bool) -> None:
        (down, across), window = height_width(grid), grid
        resolution = as_size((down * side, across * side))
        self.shift: Shift = 0
        if side > 1:
            self.shift = window // 2 if isinstance(window, int) else (down // 2, across // 2)
        shifts = [self.shift if index % 2 else 0 for index in range(depth)]
        blocks = [SwinBlock(dim, num_heads, resolution, window, shift) for shift in shifts]
        super().__init__(grid, side, None if first else PatchMerging(dim // 2), blocks)
        slots = torch.stack([slots_of(resolution, window, shift) for shift in (0, self.shift)])
        self.register_buffer("slots_2SS", slots, persistent=False)
        self.slots_2SS: Tensor

    def layouts(self, places_BK: Tensor | None, batch: int) -> tuple[Windows, Windows]:
        """Of windows that stand still, and of moved ones."""
        if places_BK is None:
            still, moved = (Windows(slots.flatten().expand(batch, -1), None) for slots in self.slots_2SS)
            return still, moved
        units = cut(self.slots_2SS.unsqueeze(-1), self.side).reshape(2, area(self.grid), -1)
        num_slots, A = units[0].numel(), area(self.grid)
        layouts = []
        for of_units in units:
            slots = of_units[places_BK].flatten(1)
            hidden = torch.ones(batch, num_slots, dtype=torch.bool, device=slots.device).scatter_(1, slots, False)
            layouts.append(Windows(slots, hidden.view(-1, 1, 1, A)))
        return layouts[0], layouts[1]


class SwinStem(nn.Module):
    """A linear layer of the pixels of a token, and a norm."""

    def __init__(self, channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(channels, dim, patch_size, patch_size)
        self.norm = LayerNorm(dim, EPS)

    def forward(self, pixels: Tensor, domain: int = CLEAN) -> Tensor:
        """(…, D) from (…, patch²·C)."""
        return normalise(self.norm, conv_of_squares(self.proj, pixels, self.patch_size), domain)


class SwinEncoder(StagedEncoder):
    """Over the visible units."""

    def __init__(
        self, width: int, depths: Sequence[int], num_heads: Sequence[int], *, image_size: Size, patch_size: int,
        channels: int = 3, final_norm: bool = True,
    ) -> None:  # fmt: skip
        widths = [width * 2**stage for stage in range(len(depths))]
        super().__init__(widths, depths, image_size=image_size, patch_size=patch_size, channels=channels)
        self.patch_embed = SwinStem(channels, width, patch_size)
        self.stages = nn.ModuleList(
            SwinStage(self.grid, side, dim, depth, heads, first=index == 0)
            for index, (side, dim, depth, heads) in enumerate(zip(self.sides(), widths, depths, num_heads, strict=True))
        )
        self.norm = LayerNorm(self.width, EPS) if final_norm else NoNorm()
        # Not the stem: it keeps the bias of a fresh convolution, as in timm. The norm behind a linear map without bias
        # tells the sign of a flat patch and not how bright it is, and then pre-training learns nothing from an image.
        self.stages.apply(init_like_timm)

    def stem_of(self, pixels: Tensor, domain: int) -> Tensor:
        """(…, D) tokens from the pixels (…, patch²·C) of each, see StagedEncoder."""
        return self.patch_embed(pixels, domain)


def windowed(x_SS: Tensor, window: Size, shift: Shift) -> Tensor:
    """(W, A): what lies in each window, of a map over the image, when the windows are moved."""
    (rows, columns), (down, across) = both(shift), height_width(window)
    return cut(x_SS.roll((-rows, -columns), (0, 1)).unsqueeze(-1), down, across).reshape(-1, down * across)


def slots_of(resolution: Size, window: Size, shift: Shift) -> Tensor:
    """(S, S) int64: the place of each token in the order of the windows."""
    tokens = torch.arange(area(resolution)).view(height_width(resolution))
    return windowed(tokens, window, shift).flatten().argsort().view(height_width(resolution))


def keep_apart(resolution: Size, window: Size, shift: Shift) -> Tensor:
    """(W, A, A) fp32: −100 between tokens that a moved window took from opposite borders of the image, else 0."""
    rows, columns = (torch.zeros(length, dtype=torch.int64) for length in height_width(resolution))
    for band, moved in zip((rows, columns), both(shift), strict=True):
        band[:moved] = 1  # rolled to the end, where they meet the last rows
    regions = windowed(2 * rows[:, None] + columns[None, :], window, shift)
    return torch.where(regions[:, :, None] == regions[:, None, :], 0.0, -100.0)


def both(shift: Shift) -> tuple[int, int]:
    """A shift along rows and columns."""
    return (shift, shift) if isinstance(shift, int) else shift


def num_offsets(window: Size) -> int:
    """Rows of the bias table: offsets between two tokens of a window."""
    down, across = height_width(window)
    return (2 * down - 1) * (2 * across - 1)


def offset_ids(window: Size) -> Tensor:
    """(A, A) int64: row of the bias table for query and key."""
    sides = height_width(window)
    places = torch.meshgrid(*(torch.arange(side) for side in sides), indexing="ij")
    down, right = (
        x[:, None] - x[None, :] + side - 1 for x, side in zip((p.flatten() for p in places), sides, strict=True)
    )
    return down * (2 * sides[1] - 1) + right


def build(architecture: Architecture, final_norm: bool) -> SwinEncoder:
    """The encoder of an architecture."""
    return SwinEncoder(
        *SIZES[architecture.size], image_size=architecture.image_size, patch_size=architecture.patch_size,
        channels=architecture.channels, final_norm=final_norm,
    )  # fmt: skip


def from_timm(tensors: Tensors) -> dict[str, Tensor]:
    """timm's stages are called layers, and its head is a module."""
    # Written by older versions of timm, and computed here.
    tensors = {n: t for n, t in tensors.items() if not n.endswith((".relative_position_index", ".attn_mask"))}
    return rename(tensors, {"layers.": "stages.", "head.fc.": "head."}, rest=True)


def recognise(tensors: Tensors, image_size: Size | None = None) -> Architecture | None:
    """From the shapes; the image is as large as the windows of the last stage. See Family."""
    stem, num_stages = tensors.get("patch_embed.proj.weight"), numbered(tensors, "stages.{}.blocks.0.attn.qkv.weight")
    if stem is None or stem.ndim != 4 or "patch_embed.norm.weight" not in tensors or not num_stages:
        return None
    width, channels, patch_size, _ = stem.shape
    depths = tuple(numbered(tensors, f"stages.{s}.blocks.{{}}.attn.qkv.weight") for s in range(num_stages))
    size = next((name for name, shape in SIZES.items() if shape[:2] == (width, depths)), None)
    if size is None:
        return None
    table = tensors[f"stages.{num_stages - 1}.blocks.0.attn.relative_position_bias_table"]
    unit = patch_size * 2 ** (num_stages - 1)
    if image_size is not None:
        window = divided(image_size, unit)
        return (
            Architecture("swin", size, image_size, patch_size, channels) if len(table) == num_offsets(window) else None
        )
    rows, columns = ((side + 1) // 2 for side in height_width(nearest_grid(len(table))))
    return Architecture("swin", size, as_size((rows * unit, columns * unit)), patch_size, channels)


_KNOWN = re.compile(
    r"patch_embed\.(proj|norm)\.(weight|bias)|stages\.\d+\.(downsample\.(norm|reduction)\.(weight|bias)|blocks\.\d+\."
    r"(attn\.relative_position_bias_table|(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)))"
    r"|(norm|head|decoder|mask_token).*"
)


def why_not(tensors: Tensors) -> str:
    """By which tensor a relative, such as Swin v2, is no Swin; "" for one that is, and for what is no relative."""
    renamed = from_timm(tensors)
    if "stages.0.blocks.0.attn.qkv.weight" not in renamed:
        return ""
    return next((f"{n}, which Swin has not" for n in renamed if not _KNOWN.fullmatch(n) and not is_adapter(n)), "")


def resize(
    name: str, tensor: Tensor, shape: torch.Size, old: Size | None = None, new: Size | None = None
) -> Tensor | None:
    """The bias of offsets for windows of another size, interpolated as timm does; see Family."""
    if not name.endswith("relative_position_bias_table") or tensor.shape[1:] != shape[1:]:
        return None
    from timm.layers import resize_rel_pos_bias_table

    window = (round(shape[0] ** 0.5) + 1) // 2
    more = {} if old is None or isinstance(old, int) else {"old_window_size": old}
    if more.keys() - inspect.signature(resize_rel_pos_bias_table).parameters.keys():
        raise ValueError(
            f"{name}: this version of timm takes the windows of the weights for squares, and they are "
            f"{typed(cast(Size, old))}: pip install 'timm>=1.0.31'"
        )
    return resize_rel_pos_bias_table(tensor, height_width(window if new is None else new), tuple(shape), **more)


def to_timm(tensors: Tensors, architecture: Architecture) -> TimmModel:
    """The same model as timm's `SwinTransformer`, with its tensors."""
    width, depths, num_heads = SIZES[architecture.size]
    unit = architecture.patch_size * 2 ** (len(depths) - 1)
    arguments = {
        "img_size": architecture.image_size,
        "patch_size": architecture.patch_size,
        "in_chans": architecture.channels,
        "num_classes": len(tensors["head.weight"]) if "head.weight" in tensors else 0,
        "embed_dim": width,
        "depths": depths,
        "num_heads": num_heads,
        "window_size": divided(architecture.image_size, unit),
    }
    names = {"stages.": "layers.", "head.": "head.fc.", "norm.": "norm.", "patch_embed.": "patch_embed."}
    renamed = rename({n: t for n, t in tensors.items() if not is_adapter(n)}, names, rest=False)
    return TimmModel("timm.models.swin_transformer.SwinTransformer", arguments, renamed)


register(
    Family(
        name="swin",
        title="Swin",
        sizes={
            name: f"{width} wide at first, {'-'.join(map(str, depths))} deep, {'-'.join(map(str, heads))} heads"
            for name, (width, depths, heads) in SIZES.items()
        },
        anchor="patch_embed.proj.weight",
        mask_unit=lambda a: unit_of(a.image_size, a.patch_size, len(SIZES[a.size][1])),
        build=build,
        build_decoder=Decoder,
        recognise=recognise,
        sized=recognise,
        to_timm=to_timm,
        from_timm=from_timm,
        resize=resize,
        why_not=why_not,
        norm_before_pool=True,
        position_table=False,
        size_of_window=True,
        fixed={"eps": EPS, "gelu": "erf"},
    )
)
