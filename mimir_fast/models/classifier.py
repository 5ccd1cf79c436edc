"""The classifier: images in [0, 1] to logits, with the normalisation inside, around an encoder of any family.

Parameter names and shapes are timm's and the MIMIR authors': mean of the patch tokens → `fc_norm` → `head`, or the cls
token after `norm` → `head`. Whatever is random in a forward pass is an argument, never drawn in here: stochastic depth
takes its factors from the caller (`draw_drop_path`), so a forward without them is deterministic, as an attack wants it.

Token dropping (AGAT: Wu et al., arXiv 2207.10498) works in train mode only: after each attention layer the patch tokens
that were looked at least are left behind, so later layers, and the attack's passes with them, get cheaper.

Shapes: B images, C channels, H = W pixels, T = prefix + N tokens, D width, L layers, R branches, K classes.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from mimir_fast.layers.norms import LayerNorm, NoNorm
from mimir_fast.models.branches import Branches, DropPathLaw
from mimir_fast.models.families import Architecture, build_encoder, check_size, find_family
from mimir_fast.models.file_names import Parted, from_files
from mimir_fast.models.loading import infer_architecture
from mimir_fast.models.weight_files import NORMALIZATIONS, NormalizationName, WeightsChoice, WeightsError, read_weights
from mimir_fast.ops._precision import no_autocast
from mimir_fast.ops.patches import patchify
from mimir_fast.validation import check_choice, check_number


@dataclass
class ClassifierConfig:
    """Options of a classifier: encoder, pooling, normalisation, stochastic depth."""

    family: str = "vit"
    """Encoder family: vit, convit, cait, xcit, convstem, swin, convnext."""
    encoder: str = "base"
    """Size within the family; width/depth/heads of ViT: nano 96/4/3 (ours), tiny 192/12/3, small 384/12/6,
    base 768/12/12, large 1024/24/16."""
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
    """AGAT (family vit): patch tokens kept by each layer in train mode, 0.9 in the paper; 1 drops none."""
    normalization: NormalizationName = "none"
    """Subtracted mean and divided std, inside the model: `none` after our pre-training, timm weights need theirs."""

    def architecture(self, image_size: int, channels: int = 3) -> Architecture:
        """What the encoder is built from."""
        return Architecture(self.family, self.encoder, image_size, self.patch_size, channels)

    def resolved(self) -> "ClassifierConfig":
        """The same with the pooling of the family where it is `auto`."""
        return replace(self, global_pool=find_family(self.family).pool) if self.global_pool == "auto" else self

    def __post_init__(self) -> None:
        check_number("patch_size", self.patch_size, at_least=1)
        check_number("head_std", self.head_std, above=0)
        check_choice("global_pool", self.global_pool, ("auto", "avg", "cls"))
        check_choice("drop_path_law", self.drop_path_law, ("linear", "constant"))
        check_size(find_family(self.family), self.encoder)
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path={self.drop_path}, wanted 0 <= drop_path < 1, such as 0.1")
        if not 0 < self.token_keep_rate <= 1:
            raise ValueError(f"token_keep_rate={self.token_keep_rate}, wanted 0 < rate <= 1, such as 0.9")
        if self.token_keep_rate < 1 and self.family != "vit":
            raise ValueError(
                f"token_keep_rate={self.token_keep_rate} (AGAT) drops tokens by their attention, which is defined for "
                f"family vit only, not {self.family}: leave it at 1"
            )
        if self.normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization={self.normalization!r}, wanted one of {', '.join(NORMALIZATIONS)}")


class Classifier(Parted):
    """An encoder, pooling and a linear head.

    Args:
        config: the choices; kept as `config` and saved beside the weights.
        image_size: side of the images in pixels.
        num_classes: outputs of the head, at least 2.
        channels: of the images.
        options: what only the family knows, see Architecture.
    """

    file_parts = ("encoder",)

    def __init__(
        self, config: ClassifierConfig, image_size: int, num_classes: int, channels: int = 3,
        options: dict[str, object] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        config = config.resolved()
        if num_classes < 2:
            raise ValueError(
                f"num_classes={num_classes}: a classifier needs at least 2 classes; check the data's labels"
            )
        architecture = replace(config.architecture(image_size, channels), options=options or {})
        family = find_family(config.family)
        self.config, self.num_classes = config, num_classes
        self.image_size, self.channels = image_size, channels
        # With `avg` the norm comes after the pooling (MAE's fine-tuning), but for families that norm before it.
        norm_first = config.global_pool == "cls" or family.norm_before_pool
        self.encoder = build_encoder(architecture, final_norm=norm_first)
        if config.global_pool == "cls" and self.encoder.num_prefix == 0:
            raise ValueError(f"{family.title} has no cls token: use global_pool avg")
        self.fc_norm = NoNorm() if norm_first else LayerNorm(self.encoder.width)
        self.head = nn.Linear(self.encoder.width, num_classes)

        mean, std = NORMALIZATIONS[config.normalization]
        # Not persistent: a state dict holds the authors' names and nothing else.
        self.register_buffer("mean", torch.tensor(mean[:channels]).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std[:channels]).view(1, -1, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor
        positions = getattr(self.encoder, "pos_embed", None)
        if isinstance(positions, nn.Parameter):
            positions.requires_grad_(config.train_pos_embed)
        self.reset_head()

    def reset_head(self) -> None:
        """A fresh head; with a small `head_std` it starts at nearly uniform predictions (MAE's fine-tuning)."""
        nn.init.trunc_normal_(self.head.weight, std=self.config.head_std)
        nn.init.zeros_(self.head.bias)

    def forward_features(
        self,
        images_BCHW: Tensor,
        branch_scales_BLR: Tensor | None = None,
        branch_gates_BLR: Tensor | None = None,
    ) -> Tensor:
        """(B, T, D): all tokens after the last layer, cls in front (timm's convention); arguments as for `forward`."""
        if images_BCHW.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"images of {images_BCHW.shape[-2]} x {images_BCHW.shape[-1]} pixels for a classifier of "
                f"{self.image_size} x {self.image_size}: resize them, or build the model with that image_size"
            )
        if images_BCHW.dtype == torch.uint8:
            images_BCHW = images_BCHW.float() / 255
        with no_autocast(images_BCHW.device):
            images = images_BCHW.to(self.mean.dtype)
            if self.config.normalization != "none":
                images = (images - self.mean) / self.std
            patches = patchify(images, self.encoder.mask_unit)
        keep_rate = self.config.token_keep_rate if self.training else 1.0
        branches = None
        if branch_scales_BLR is not None or branch_gates_BLR is not None or keep_rate < 1:
            branches = Branches(branch_scales_BLR, branch_gates_BLR, keep_rate)
        return self.encoder(patches, None, branches=branches)

    def forward_head(self, tokens_BTD: Tensor) -> Tensor:
        """(B, K) logits from the tokens."""
        prefix = self.encoder.num_prefix
        pooled = tokens_BTD[:, prefix:].mean(dim=1) if self.config.global_pool == "avg" else tokens_BTD[:, 0]
        return self.head(self.fc_norm(pooled))

    def forward(
        self,
        images_BCHW: Tensor,
        branch_scales_BLR: Tensor | None = None,
        branch_gates_BLR: Tensor | None = None,
    ) -> Tensor:
        """(B, K) logits.

        Args:
            images_BCHW: float in [0, 1], or uint8.
            branch_scales_BLR: factors of the residual branches from `draw_drop_path`; None drops nothing.
            branch_gates_BLR: 1 where gradients may flow back through a residual branch, 0 where not (ARD).
        Raises:
            ValueError: images of another size.
        """
        return self.forward_head(self.forward_features(images_BCHW, branch_scales_BLR, branch_gates_BLR))

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


def build_classifier(config: ClassifierConfig, image_size: int, num_classes: int, channels: int = 3) -> Classifier:
    """The classifier a config names, freshly initialised from torch's global generator."""
    return Classifier(config, image_size, num_classes, channels)


def load_classifier(source: str | Path, which: WeightsChoice = "auto", *, num_classes: int | None = None) -> Classifier:
    """A trained classifier in eval mode, taking images in [0, 1], from anything `read_weights` reads.

    Sizes come from the tensors' shapes, the rest from the configuration saved with them where there is one.

    Args:
        source: a fine-tuning run or checkpoint folder, an exported .safetensors file, an authors' .pth, timm:NAME.
        which: `model`, `ema`, or `auto` for the moving average where there is one.
        num_classes: what the data has; checked.
    Raises:
        WeightsError: not a classifier, damaged, of another architecture, or for another number of classes.
    """
    weights = read_weights(source, which)
    architecture, found_classes = infer_architecture(weights)
    if found_classes is None:
        raise WeightsError(
            f"{weights.origin} has no classification head, it is a pre-trained encoder: fine-tune it first with "
            f"python -m mimir_fast.finetune --recipe … --init {source}"
        )
    if num_classes is not None and num_classes != found_classes:
        raise WeightsError(
            f"{weights.origin} has {found_classes} classes, the data has {num_classes}: "
            "choose the data set it was trained on (--data.source)"
        )
    saved = (weights.config or {}).get("model", {})
    names = {f.name for f in fields(ClassifierConfig)}
    config = ClassifierConfig(**{k: v for k, v in saved.items() if k in names})
    config.family, config.encoder = architecture.family, architecture.size
    config.patch_size = architecture.patch_size
    normed_late = "fc_norm.weight" in weights.tensors or find_family(architecture.family).norm_before_pool
    config.global_pool = "avg" if normed_late else "cls"
    if weights.normalization is not None:
        config.normalization = _normalization_name(weights.normalization)
    model = Classifier(
        config, architecture.image_size, found_classes, architecture.channels, dict(architecture.options)
    )
    missing, unexpected = model.load_state_dict(from_files(model, weights.tensors), strict=False)
    if missing or unexpected:
        raise WeightsError(
            f"{weights.origin} is no classifier of ours: {len(missing)} tensors are missing "
            f"({', '.join(missing[:3])}), {len(unexpected)} unknown ({', '.join(unexpected[:3])})"
        )
    return model.eval()


def _normalization_name(stats: tuple[tuple[float, ...], tuple[float, ...]]) -> NormalizationName:
    for name, known in NORMALIZATIONS.items():
        if known == stats:
            return name
    raise WeightsError(f"normalisation with mean {stats[0]} and std {stats[1]} is none of {', '.join(NORMALIZATIONS)}")
