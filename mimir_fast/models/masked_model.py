"""A masked model: an encoder that sees the visible patches of a view, and a decoder that predicts the others.

It works in patch space: a view holds visible patches, not images; nothing walks back to pixels between attack, encoder
and loss. A view says of which domain its pixels are (AEMIM's clean and adversarial streams). With the linear decoder
the encoder runs at full length, over visible and mask tokens (SimMIM).

Parameter names and shapes are those of MAE and of the MIMIR authors, so their checkpoints load strictly.
Shapes: B batch, N patches, K kept, M masked, P = p·p·C numbers a patch, D encoder width.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from mimir_fast.layers.norms import CLEAN
from mimir_fast.models.decoder import Decoder, LinearDecoder
from mimir_fast.models.encoder import Encoder
from mimir_fast.models.families import Architecture, architecture_of, build_encoder, find_family
from mimir_fast.models.file_names import Parted
from mimir_fast.models.normalization import (
    NormalizationName,
    Normalizer,
    Statistics,
    check_choice,
    chosen,
    none_of,
)
from mimir_fast.ops.patches import gather_patches
from mimir_fast.sizes import Size
from mimir_fast.validation import check_number, without

DecoderName = Literal["light", "mae", "linear"]
Positions = Literal["true", "official"]

# `light` is the MIMIR authors' decoder, `mae` the one of He et al.: (width, depth, heads).
DECODERS: dict[str, tuple[int, int, int]] = {"light": (128, 2, 16), "mae": (512, 8, 16)}


@dataclass
class ModelConfig:
    """Options of a masked model: encoder, decoder, positions, adapters."""

    family: str = "vit"
    """Encoder family: vit, convit, cait, xcit, convstem, swin, convnext."""
    encoder: str = "base"
    """Size within the family; width/depth/heads of ViT: nano 96/4/3 (ours), tiny 192/12/3, small 384/12/6,
    base 768/12/12, large 1024/24/16, huge 1280/32/16."""
    patch_size: int = 16
    """Side of a patch in pixels: 2 for 32² images, 4 for 64², 16 for 224²; of the stem in swin and convnext, 4."""
    decoder: DecoderName = "light"
    """`light` 128 wide, 2 deep, 16 heads (the authors'); `mae` 512 wide, 8 deep, 16 heads; `linear` SimMIM's."""
    positions: Positions = "true"
    """Where convit and xcit assume the kept patches to be: `true`, or the square grid of the `official` code."""
    adapters: bool = False
    """Keep norm layers and cls token twice, for clean and for adversarial images; method aemim switches it on."""
    options: tuple[str, ...] = ()
    """What the family can do beside its plain form, as NAME or NAME=VALUE: of ViT heads, eps, gelu, layer_scale,
    qk_norm, pre_norm, distilled, registers, no_prefix_positions, no_cls_token, qkv_bias, mlp_ratio, width, depth; of
    XCiT tokens_norm."""
    normalization: NormalizationName = "none"
    """Mean and deviation taken out of images where the encoder embeds them, as for MAE's public weights (imagenet);
    attack and reconstruction stay in [0, 1]."""
    mean: tuple[float, ...] | None = None
    """The mean as numbers, one a channel, of images in [0, 1], in place of a name's."""
    std: tuple[float, ...] | None = None
    """The deviation as numbers, one a channel."""

    def __post_init__(self) -> None:
        check_number("patch_size", self.patch_size, at_least=1)
        self.options = tuple(self.options)
        if self.decoder not in (*DECODERS, "linear"):
            raise ValueError(f"decoder={self.decoder!r}, wanted one of {', '.join((*DECODERS, 'linear'))}")
        if self.positions not in ("true", "official"):
            raise ValueError(f"positions={self.positions!r}, wanted true or official")
        check_choice(self)
        self.architecture(self.patch_size)  # refuses unknown families, sizes and options

    def idle(self) -> dict[str, str]:
        """Options that do nothing as the others are."""
        on_a_grid = find_family(self.family).kept_on_a_grid
        return without(on_a_grid, f"--{{}}family is {self.family}, whose positions are always true", "positions")

    def architecture(self, image_size: Size, channels: int = 3) -> Architecture:
        """What the encoder is built from."""
        architecture = architecture_of(self.family, self.encoder, image_size, self.patch_size, channels, self.options)
        if self.positions == "true":
            return architecture
        return replace(architecture, options={**architecture.options, "positions": self.positions})


class View(NamedTuple):
    """What the model is shown of a batch, and what it is asked for.

    Attributes:
        patches: (B, K, P) visible patches in [0, 1], (row, column, channel) order inside a patch.
        keep: (B, K) int64, where they belong.
        masked: (B, M) int64, where predictions are wanted; None for everywhere. Places that are neither here nor in
            `keep` do not exist for the decoder.
        domain: 0 clean, 1 adversarial; 1 needs a model with adapters.
    """

    patches: Tensor
    keep: Tensor
    masked: Tensor | None = None
    domain: int = CLEAN


class Output(NamedTuple):
    """Latent (B, prefix + K, D), or of all N patches at full length; predicted patches (B, M, P); logits of a head."""

    latent: Tensor
    prediction: Tensor
    logits: Tensor | None = None


class MaskedModel(Parted):
    """An encoder over visible patches and a decoder over all of them.

    Args:
        full_length: mask tokens go into the encoder instead of the decoder.
        num_classes: of a linear head on the cls token (the mean patch token where there is none); 0 is no head.
        statistics: (mean, std) taken out of the patches where the encoder embeds them; None takes nothing.
    """

    file_parts = ("encoder", "decoder")

    def __init__(
        self, encoder: Encoder, decoder: nn.Module, *, full_length: bool = False, num_classes: int = 0,
        statistics: Statistics | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder, self.decoder, self.full_length = encoder, decoder, full_length
        self.num_patches, self.patch_size, self.channels = encoder.num_patches, encoder.mask_unit, encoder.channels
        if full_length:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, encoder.token_width))
            nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.head = nn.Linear(encoder.width, num_classes) if num_classes else None
        self.normalizer = Normalizer(statistics or none_of(encoder.channels))

    def encode(self, view: View) -> Tensor:
        """(B, prefix + K, D) latent in the order of `view.keep`, of all N places in raster order at full length."""
        if view.domain != CLEAN and not self.encoder.has_adapters:
            raise ValueError("a view of adversarial data, but the model has no adapters: build it with adapters=True")
        mask_token = self.mask_token[0, 0] if self.full_length else None
        patches = self.normalizer(view.patches)
        return self.encoder(patches, view.keep, domain=view.domain, mask_token_D=mask_token)

    @property
    def decodes_parts(self) -> bool:
        """Whether a view may want less than all masked patches and save the decoder the others."""
        return isinstance(self.decoder, Decoder) and self.decoder.takes_parts

    def visible(self, latent_BTD: Tensor, ids_keep_BK: Tensor) -> Tensor:
        """(B, prefix + K, D): the latent of the visible patches only, whatever the length of the encoder."""
        if not self.full_length:
            return latent_BTD
        prefix = self.encoder.num_prefix
        rows = gather_patches(latent_BTD[:, prefix:], ids_keep_BK)
        return torch.cat([latent_BTD[:, :prefix], rows], dim=1) if prefix else rows

    @overload
    def forward(
        self, view: View, *, decode: Literal[True] = True, beside: tuple[View, Tensor] | None = None
    ) -> Output: ...
    @overload
    def forward(self, view: View, *, decode: Literal[False]) -> Tensor: ...

    def forward(self, view: View, *, decode: bool = True, beside: tuple[View, Tensor] | None = None) -> Output | Tensor:
        """Latent, prediction and logits of a view; only the latent with `decode=False`.

        Args:
            beside: another view of as many patches and its latent; the output has its rows first, then those of `view`.
                One pass through the decoder for both: its weights are read, and their gradients written, once.
        """
        latent = self.encode(view)
        if not decode:
            return latent
        keep, masked = view.keep, view.masked
        if beside is not None:
            other, other_latent = beside
            latent, keep = torch.cat([other_latent, latent]), torch.cat([other.keep, keep])
            if masked is not None and other.masked is not None:
                masked = torch.cat([other.masked, masked])
        places = None if self.full_length else keep
        return Output(latent, self.decoder(latent, places, masked), self.classify(latent))

    def classify(self, latent_BTD: Tensor) -> Tensor | None:
        """(B, classes) logits, or None without a head."""
        if self.head is None:
            return None
        prefix = self.encoder.num_prefix
        return self.head(latent_BTD[:, 0] if self.encoder.has_cls_token else latent_BTD[:, prefix:].mean(dim=1))

    def layers(self) -> list[nn.Module]:
        """What is compiled and sharded one by one."""
        return [*self.encoder.layers(), *self.decoder.layers()]  # type: ignore[operator]

    def layer_of(self, name: str) -> int:
        """Layer of a parameter for layer-wise learning rates, by its name in files."""
        return self.encoder.layer_of(name)

    @property
    def num_layers(self) -> int:
        """Layers of the encoder, for layer-wise learning rates."""
        return self.encoder.num_layers


def build_masked_model(config: ModelConfig, image_size: Size, channels: int = 3, num_classes: int = 0) -> MaskedModel:
    """The model a config names, freshly initialised from torch's global generator."""
    encoder = build_encoder(config.architecture(image_size, channels))
    if config.decoder == "linear":
        decoder: nn.Module = LinearDecoder(encoder)
    else:
        decoder = find_family(config.family).build_decoder(encoder, *DECODERS[config.decoder])
    if config.adapters:
        encoder.add_adapters()
    return MaskedModel(
        encoder, decoder, full_length=config.decoder == "linear", num_classes=num_classes,
        statistics=chosen(config, channels),
    )  # fmt: skip
