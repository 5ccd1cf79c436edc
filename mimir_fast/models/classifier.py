"""The classifier: images in [0, 1] to logits, with the normalisation inside, around an encoder of any family.

Parameter names and shapes are timm's and the MIMIR authors': mean of the patch tokens → `fc_norm` → `head`, or the cls
token after `norm` → `head`. Whatever is random in a forward pass is an argument, never drawn in here: stochastic depth
takes its factors from the caller (`draw_drop_path`), so a forward without them is deterministic, as an attack wants it.

Token dropping (AGAT: Wu et al., arXiv 2207.10498): after each attention layer the patch tokens that were looked at
least are left behind, so later layers, and the attack's passes with them, get cheaper. In train mode, or always.

Shapes: B images, C channels, H x W pixels, T = prefix + N tokens, D width, L layers, R branches, K classes,
V patches that are looked at.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from mimir_fast.layers.norms import LayerNorm, NoNorm
from mimir_fast.models.beside import HEAD
from mimir_fast.models.branches import Branches, DropPathLaw
from mimir_fast.models.families import Architecture, architecture_of, build_encoder, fields_of, find_family
from mimir_fast.models.file_names import Parted
from mimir_fast.models.identify import assumed_size, infer_architecture, pool_of
from mimir_fast.models.loading import LoadReport, fill
from mimir_fast.models.normalization import (
    NormalizationName,
    Normalizer,
    Statistics,
    chosen,
)
from mimir_fast.models.normalization import check_choice as check_normalization
from mimir_fast.models.normalization import fields_of as statistics_fields
from mimir_fast.models.options import option_texts
from mimir_fast.models.weight_files import Weights, WeightsChoice, WeightsError, read_weights
from mimir_fast.ops._precision import no_autocast
from mimir_fast.ops.patches import gather_patches, patchify
from mimir_fast.sizes import Size, height_width, said
from mimir_fast.validation import check_choice, check_number, without


@dataclass
class ClassifierConfig:
    """Options of a classifier: encoder, pooling, normalisation, stochastic depth."""

    family: str = "vit"
    """Encoder family: vit, convit, cait, xcit, convstem, swin, convnext."""
    encoder: str = "base"
    """Size within the family; width/depth/heads of ViT: nano 96/4/3 (ours), tiny 192/12/3, small 384/12/6,
    base 768/12/12, large 1024/24/16, huge 1280/32/16."""
    patch_size: int = 16
    """Side of a patch in pixels: 2 for 32² images, 4 for 64², 16 for 224²; of the stem in swin and convnext, 4."""
    global_pool: Literal["auto", "avg", "cls"] = "auto"
    """`avg`: mean of patch tokens, then fc_norm; `cls`: the cls token after the encoder's norm; `auto`: as the MIMIR
    authors fine-tune the family, cls of convit, cait and xcit, avg of the others."""
    drop_path: float = 0.1
    """Stochastic depth: the last block's drop rate."""
    drop_path_law: DropPathLaw = "linear"
    """`linear`: the rate grows from 0 at the first block; `constant`: the same in all (CaiT's and XCiT's authors)."""
    head_std: float = 2e-5
    """Standard deviation of a fresh head's weights; the MIMIR authors have 2e-2 on small images."""
    train_pos_embed: bool = True
    """Train the position embedding."""
    token_keep_rate: float = 1.0
    """AGAT (family vit): patch tokens kept by each layer, 0.9 in the paper; 1 drops none."""
    token_drop: Literal["training", "always"] = "training"
    """Drop tokens in train mode only, or in every forward pass, also where the model is evaluated."""
    normalization: NormalizationName = "none"
    """Subtracted mean and divided std, inside the model: `none` after our pre-training, timm weights need theirs."""
    options: tuple[str, ...] = ()
    """What the family can do beside its plain form, as NAME or NAME=VALUE: of ViT heads, eps, gelu, layer_scale,
    qk_norm, pre_norm, distilled, registers, no_prefix_positions, no_cls_token, norm_before_pool, qkv_bias, mlp_ratio,
    width, depth; of XCiT tokens_norm; of CaiT, ConViT and XCiT norm_before_pool."""
    mean: tuple[float, ...] | None = None
    """The mean as numbers, one a channel, of images in [0, 1], in place of a name's."""
    std: tuple[float, ...] | None = None
    """The deviation as numbers, one a channel."""

    def idle(self) -> dict[str, str]:
        """Options that do nothing as the others are."""
        table = find_family(self.family).position_table
        return {
            **without(self.drop_path, "--{}drop_path is 0", "drop_path_law"),
            **without(self.token_keep_rate < 1, "--{}token_keep_rate is 1", "token_drop"),
            **without(table, f"--{{}}family is {self.family}, which has no position embedding", "train_pos_embed"),
        }

    def architecture(self, image_size: Size, channels: int = 3) -> Architecture:
        """What the encoder is built from."""
        return architecture_of(self.family, self.encoder, image_size, self.patch_size, channels, self.options)

    def resolved(self) -> "ClassifierConfig":
        """The same with the pooling of the family where it is `auto`."""
        return replace(self, global_pool=find_family(self.family).pool) if self.global_pool == "auto" else self

    def __post_init__(self) -> None:
        check_number("patch_size", self.patch_size, at_least=1)
        check_number("head_std", self.head_std, above=0)
        check_choice("global_pool", self.global_pool, ("auto", "avg", "cls"))
        check_choice("token_drop", self.token_drop, ("training", "always"))
        check_choice("drop_path_law", self.drop_path_law, ("linear", "constant"))
        self.options = tuple(self.options)
        self.architecture(self.patch_size)  # refuses unknown families, sizes and options
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path={self.drop_path}, wanted 0 <= drop_path < 1, such as 0.1")
        if not 0 < self.token_keep_rate <= 1:
            raise ValueError(f"token_keep_rate={self.token_keep_rate}, wanted 0 < rate <= 1, such as 0.9")
        if self.token_keep_rate < 1 and self.family != "vit":
            raise ValueError(
                f"token_keep_rate={self.token_keep_rate} (AGAT) drops tokens by their attention, which is defined for "
                f"family vit only, not {self.family}: leave it at 1"
            )
        check_normalization(self)


class Classifier(Parted):
    """An encoder, pooling and a linear head.

    Args:
        config: the choices; kept as `config` and saved beside the weights.
        image_size: of the images, in pixels.
        num_classes: outputs of the head, at least 2.
        channels: of the images.
        norm_first: the encoder's norm comes before the pooling; None: where `global_pool` and the family have it.
    """

    file_parts = ("encoder",)

    def __init__(
        self, config: ClassifierConfig, image_size: Size, num_classes: int, channels: int = 3,
        norm_first: bool | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        config = config.resolved()
        if num_classes < 2:
            raise ValueError(
                f"num_classes={num_classes}: a classifier needs at least 2 classes; check the data's labels"
            )
        architecture = config.architecture(image_size, channels)
        family = find_family(config.family)
        self.config, self.num_classes = config, num_classes
        self.image_size, self.channels = image_size, channels
        # With `avg` the norm comes after the pooling (MAE's fine-tuning), but for families that norm before it.
        options = architecture.options
        if norm_first is None:
            before = family.norm_before_pool or options.get("norm_before_pool", False)
            norm_first = config.global_pool == "cls" or before
        self.encoder = build_encoder(architecture, final_norm=norm_first)
        if config.global_pool == "cls" and not self.encoder.has_cls_token:
            raise ValueError(f"this {family.title} has no cls token: use global_pool avg")
        self.fc_norm = NoNorm() if norm_first else LayerNorm(self.encoder.width, options.get("eps", 1e-6))
        self.head = nn.Linear(self.encoder.width, num_classes)
        has_two = config.global_pool == "cls" and options.get("distilled", False)
        self.head_dist = nn.Linear(self.encoder.width, num_classes) if has_two else None

        self.normalizer = Normalizer(chosen(config, channels))
        positions = getattr(self.encoder, "pos_embed", None)
        if isinstance(positions, nn.Parameter):
            positions.requires_grad_(config.train_pos_embed)
        self.reset_head()

    def reset_head(self) -> None:
        """A fresh head; with a small `head_std` it starts at nearly uniform predictions (MAE's fine-tuning)."""
        for head in (self.head, self.head_dist):
            if head is not None:
                nn.init.trunc_normal_(head.weight, std=self.config.head_std)
                nn.init.zeros_(head.bias)

    def forward_features(
        self,
        images_BCHW: Tensor,
        branch_scales_BLR: Tensor | None = None,
        branch_gates_BLR: Tensor | None = None,
        places_BV: Tensor | None = None,
    ) -> Tensor:
        """(B, T, D): all tokens after the last layer, cls in front (timm's convention); arguments as for `forward`."""
        if images_BCHW.shape[-2:] != height_width(self.image_size):
            raise ValueError(
                f"images of {images_BCHW.shape[-2]} x {images_BCHW.shape[-1]} pixels for a classifier of "
                f"{said(self.image_size)}: resize them, or build the model with that image_size"
            )
        if images_BCHW.dtype == torch.uint8:
            images_BCHW = images_BCHW.float() / 255
        with no_autocast(images_BCHW.device):
            images = self.normalizer(images_BCHW.to(self.normalizer.mean.dtype))
            patches = patchify(images, self.encoder.mask_unit)
            if places_BV is not None:
                patches = gather_patches(patches, places_BV)
        drops = self.training or self.config.token_drop == "always"
        keep_rate = self.config.token_keep_rate if drops else 1.0
        branches = None
        if branch_scales_BLR is not None or branch_gates_BLR is not None or keep_rate < 1:
            branches = Branches(branch_scales_BLR, branch_gates_BLR, keep_rate)
        return self.encoder(patches, places_BV, branches=branches)

    def forward_head(self, tokens_BTD: Tensor) -> Tensor:
        """(B, K) logits from the tokens; of a distilled model the mean of both heads', as in DeiT's evaluation."""
        prefix = self.encoder.num_prefix
        if self.head_dist is not None:
            return (self.head(tokens_BTD[:, 0]) + self.head_dist(tokens_BTD[:, 1])) / 2
        pooled = tokens_BTD[:, prefix:].mean(dim=1) if self.config.global_pool == "avg" else tokens_BTD[:, 0]
        return self.head(self.fc_norm(pooled))

    def forward(
        self,
        images_BCHW: Tensor,
        branch_scales_BLR: Tensor | None = None,
        branch_gates_BLR: Tensor | None = None,
        places_BV: Tensor | None = None,
    ) -> Tensor:
        """(B, K) logits.

        Args:
            images_BCHW: float in [0, 1], or uint8.
            branch_scales_BLR: factors of the residual branches from `draw_drop_path`; None drops nothing.
            branch_gates_BLR: 1 where gradients may flow back through a residual branch, 0 where not (ARD).
            places_BV: (B, V) int64 numbers of the patches that are looked at, the others do not exist; None: all.
        Raises:
            ValueError: images of another size.
        """
        return self.forward_head(self.forward_features(images_BCHW, branch_scales_BLR, branch_gates_BLR, places_BV))

    def layers(self) -> list[nn.Module]:
        """What is compiled and sharded one by one."""
        return self.encoder.layers()

    def layer_of(self, name: str) -> int:
        """Layer of a parameter for layer-wise learning rates, by its name in files."""
        return self.encoder.layer_of(name)

    @property
    def num_layers(self) -> int:
        """Layers of the encoder, for layer-wise learning rates."""
        return self.encoder.num_layers


def build_classifier(config: ClassifierConfig, image_size: Size, num_classes: int, channels: int = 3) -> Classifier:
    """The classifier a config names, freshly initialised from torch's global generator."""
    return Classifier(config, image_size, num_classes, channels)


def load_classifier(
    source: str | Path | Weights, which: WeightsChoice = "auto", *, num_classes: int | None = None,
    statistics: Statistics | None = None, options: Sequence[str] = (), image_size: Size | None = None,
) -> Classifier:  # fmt: skip
    """A trained classifier in eval mode, taking images in [0, 1], from anything `read_weights` reads.

    Args:
        source: a fine-tuning run or checkpoint folder, an exported .safetensors file, an authors' .pth, timm:NAME, or
            weights already read.
        which: `model`, `ema`, or `auto` for the moving average where there is one.
        num_classes: what the data has; checked.
        statistics: (mean, std) to normalise by, in place of what the weights say; None where neither does is none.
        options: what neither tensors nor file say, as in ClassifierConfig: heads=12, eps=1e-5, gelu=tanh.
        image_size: of images that are no squares, where the file does not say it.
    Raises:
        WeightsError: not a classifier, damaged, of another architecture, or for another number of classes.
    """
    weights = source if isinstance(source, Weights) else read_weights(source, which)
    return classifier_of(
        weights, num_classes=num_classes, statistics=statistics, options=options, image_size=image_size
    )[0]


def unseen_of(weights: Weights, model: Classifier) -> list[str]:
    """What no tensor shows of a classifier of these weights, as it is typed, without what is usual."""
    architecture = model.config.architecture(model.image_size, model.channels)
    unseen = find_family(architecture.family).unseen
    texts = option_texts({name: value for name, value in architecture.options.items() if name in unseen})
    pool, usual = model.config.global_pool, pool_of(Weights(weights.tensors, weights.origin), architecture)
    return [*texts, *([f"pool={pool}"] if pool != usual else [])]


def classifier_of(
    weights: Weights, *, num_classes: int | None = None, statistics: Statistics | None = None,
    options: Sequence[str] = (), image_size: Size | None = None,
) -> tuple[Classifier, LoadReport]:  # fmt: skip
    """The classifier that weights are of, in eval mode, and what became of them; see `load_classifier`.

    Sizes come from the tensors' shapes, the rest from the configuration saved with them where there is one, or from
    what the file says. Decoder, mask token and the norms for adversarial images are left out.
    """
    architecture, found_classes = infer_architecture(weights, options, image_size)
    if found_classes is None:
        others = {name: "" for name in weights.tensors if name.startswith("head")}
        others |= {name: f" ({why})" for name, why in weights.left_out.items() if why.startswith(HEAD)}
        listed = ", ".join(name + why for name, why in list(others.items())[:3])
        what = f"which {listed} is not" if others else "it is a pre-trained encoder"
        path = shlex.quote(weights.origin.partition(" (")[0])
        raise WeightsError(
            f"{weights.origin} has no classification head of one linear layer (head.weight), {what}: fine-tune it "
            f"first with python -m mimir_fast.finetune --recipe … --init {path}"
        )
    if num_classes is not None and num_classes != found_classes:
        raise WeightsError(
            f"{weights.origin} has {found_classes} classes, the data has {num_classes}: "
            "choose the data set it was trained on (--data.source)"
        )
    if (pool := pool_of(weights, architecture)) not in ("avg", "cls"):
        raise WeightsError(
            f"{weights.origin} pools its tokens by {pool}, which no classifier of ours does: evaluate its own model as "
            "module:function, or fine-tune from it with a pooling of ours"
        )
    saved = (weights.config or {}).get("model", {})
    names = {f.name for f in fields(ClassifierConfig)}
    norm_first = "fc_norm.weight" not in weights.tensors
    shown = {**fields_of(architecture), "global_pool": pool}
    shown |= statistics_fields(weights.statistics(architecture.channels, statistics))
    config = ClassifierConfig(**{k: v for k, v in saved.items() if k in names} | shown)
    model = Classifier(config, architecture.image_size, found_classes, architecture.channels, norm_first)
    report = fill(model, weights, whole=True)
    report.assumed += assumed_size(weights, architecture, image_size)
    return model.eval(), report
