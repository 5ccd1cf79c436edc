"""ViT with a convolutional stem (Xiao et al., arXiv 2106.14881), as the robust ViTs of Singh et al. (arXiv 2303.01870).

Convolutions of 3 × 3 and stride 2, each with a norm over channels and GELU, halve the image until a patch is one place;
a linear layer brings it to the model's width. Their receptive field crosses patches, so masked pixels are zero before
the stem, and only the tokens of visible patches leave it: nothing masked leaks. All else is ViT; names are Singh's.
Shapes: B images, N = grid² patches, K visible, P numbers a patch, p its side, D width.
"""

from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from mimir_fast.layers.convolution import conv_of_squares
from mimir_fast.layers.norms import CLEAN, LayerNorm, is_adapter, normalise
from mimir_fast.models.decoder import Decoder
from mimir_fast.models.encoder import check_patch_size
from mimir_fast.models.families import Architecture, Family, Tensors, TimmModel, register
from mimir_fast.models.families.vit import SIZES as VIT_SIZES
from mimir_fast.models.families.vit import VitEncoder, timm_arguments
from mimir_fast.ops._precision import no_autocast
from mimir_fast.ops.patches import gather_patches, unpatchify, unpatchify_visible
from mimir_fast.sizes import Size, height_width, size_of

# ViT's sizes; `nano` is ours.
SIZES = {name: VIT_SIZES[name] for name in ("nano", "small", "base")}
WIDEST = 384  # of a convolution: Singh's end at 384 for small and for base


class ConvStem(nn.Module):
    """From images to tokens: `proj.stem` holds the layers, in Singh's order."""

    def __init__(self, channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise([channels, *stem_widths(dim, patch_size)]):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), LayerNorm(after), nn.GELU()]
        layers.append(nn.Conv2d(after, dim, 1))
        self.proj = nn.ModuleDict({"stem": nn.ModuleList(layers)})

    def forward(self, images_BCHW: Tensor, domain: int = CLEAN) -> Tensor:
        """(B, N, D). The first convolution runs in fp32 whatever autocast says, see Encoder.embed."""
        x = images_BCHW
        *stem, last = cast(nn.ModuleList, self.proj["stem"])
        for index, layer in enumerate(stem):
            if index % 3 == 1:  # a norm over channels, which lie last in memory
                x = normalise(layer, x.permute(0, 2, 3, 1), domain).permute(0, 3, 1, 2)
            elif index == 0:
                with no_autocast(x.device):
                    x = layer(x.to(next(layer.parameters()).dtype).contiguous(memory_format=torch.channels_last))
            else:
                x = layer(x)
        return conv_of_squares(last, x.permute(0, 2, 3, 1).flatten(1, 2), 1)


class ConvStemEncoder(VitEncoder):
    """ViT's encoder behind the stem."""

    def __init__(
        self, width: int, depth: int, num_heads: int, *, patch_size: int, channels: int = 3, **rest: Any
    ) -> None:
        super().__init__(width, depth, num_heads, patch_size=patch_size, channels=channels, **rest)
        self.patch_embed = ConvStem(channels, width, patch_size)  # type: ignore[assignment]

    def embed(self, patches_BKP: Tensor, places_BK: Tensor | None, domain: int = CLEAN) -> Tensor:
        """(B, K, D); see Encoder."""
        height, width = height_width(self.image_size)
        if places_BK is None:
            return self.patch_embed(unpatchify(patches_BKP, self.mask_unit, height), domain)
        images = unpatchify_visible(patches_BKP, places_BK, self.mask_unit, height, width)
        return gather_patches(self.patch_embed(images, domain), places_BK)


def stem_widths(dim: int, patch_size: int) -> list[int]:
    """Channels of the convolutions: doubling up to 384 or to a smaller model's width; 48, 96, 192, 384 for patch 16.

    Raises:
        ValueError: the patch is no power of 2, or so large that the first convolution would have no channels.
    """
    count = patch_size.bit_length() - 1
    last = min(dim, WIDEST)
    if count < 1 or 2**count != patch_size or last % 2 ** (count - 1):
        raise ValueError(
            f"patch_size={patch_size}: the convolutional stem halves the image once a convolution, so patches are "
            "2, 4, 8 or 16 pixels"
        )
    return [last // 2 ** (count - 1 - index) for index in range(count)]


def mask_unit(architecture: Architecture) -> int:
    """The patch size; raises ValueError for patches that do not tile the image or that no stem makes."""
    stem_widths(SIZES[architecture.size][0], architecture.patch_size)
    return check_patch_size(architecture.image_size, architecture.patch_size)


def build(architecture: Architecture, final_norm: bool) -> ConvStemEncoder:
    """The encoder of an architecture."""
    return ConvStemEncoder(
        *SIZES[architecture.size], image_size=architecture.image_size, patch_size=architecture.patch_size,
        channels=architecture.channels, final_norm=final_norm,
    )  # fmt: skip


def recognise(tensors: Tensors, image_size: Size | None = None) -> Architecture | None:
    """From the shapes: a convolution of 3 × 3 for each halving, one of 1 × 1 behind them."""
    stem = {n: t for n, t in tensors.items() if n.startswith("patch_embed.proj.stem.") and t.ndim == 4}
    kernels = [stem[name] for name in sorted(stem, key=lambda name: int(name.split(".")[3]))]
    if len(kernels) < 2 or "pos_embed" not in tensors or kernels[-1].shape[-1] != 1:
        return None
    patch_size, channels, width = 2 ** (len(kernels) - 1), kernels[0].shape[1], len(kernels[-1])
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    size = next((name for name, (w, d, _) in SIZES.items() if (w, d) == (width, depth)), None)
    found = size_of(tensors["pos_embed"].shape[1] - 1, patch_size, image_size)
    if size is None or found is None:
        return None
    if [len(kernel) for kernel in kernels[:-1]] != stem_widths(width, patch_size):
        return None
    return Architecture("convstem", size, found, patch_size, channels)


def to_timm(tensors: Tensors, architecture: Architecture) -> TimmModel:
    """timm's VisionTransformer, with layers of torch and timm in place of the patch projection."""
    width = SIZES[architecture.size][0]
    layers = []
    for before, after in pairwise([architecture.channels, *stem_widths(width, architecture.patch_size)]):
        layers.append(f"torch.nn.Conv2d({before}, {after}, 3, 2, 1), timm.layers.LayerNorm2d({after}), torch.nn.GELU()")
    layers.append(f"torch.nn.Conv2d({after}, {width}, 1)")
    stem = f"torch.nn.Sequential(collections.OrderedDict(stem=torch.nn.Sequential({', '.join(layers)})))"
    own = {name: tensor for name, tensor in tensors.items() if not is_adapter(name)}
    path = "timm.models.vision_transformer.VisionTransformer"
    return TimmModel(path, timm_arguments(tensors, architecture), own, {"patch_embed.proj": stem})


register(
    Family(
        name="convstem",
        title="ConvStem",
        sizes={name: f"{w} wide, {d} deep, {h} heads" for name, (w, d, h) in SIZES.items()},
        anchor="patch_embed.proj.stem.0.weight",
        mask_unit=mask_unit,
        build=build,
        build_decoder=Decoder,
        recognise=recognise,
        sized=recognise,
        to_timm=to_timm,
    )
)
