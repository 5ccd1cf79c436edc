"""The fine-tuned vision transformer: images in [0, 1] to logits, with the normalisation inside.

Parameter names and shapes are timm's and the MIMIR authors': mean of the patch tokens → `fc_norm` → `head`, or the cls
token after `norm` → `head`. Whatever is random in a forward pass is an argument, never drawn in here: stochastic depth
takes its factors from the caller (`draw_drop_path`), so a forward without them is deterministic, as an attack wants it.

Token dropping (AGAT: Wu et al., arXiv 2207.10498) works in train mode only: after each attention layer the patch tokens
that were looked at least are left behind, so later layers, and the attack's passes with them, get cheaper.

Shapes: B images, C channels, H = W pixels, T = 1 + N tokens, S = 1 + kept tokens, D width, L blocks, K classes.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimir_fast.models.loading import infer_shape
from mimir_fast.models.masked_autoencoder import ENCODERS, EncoderName, check_patch_size
from mimir_fast.models.normalization import NORMALIZATIONS, NormalizationName
from mimir_fast.models.positions import sincos_positions
from mimir_fast.models.vit import Attention, Block, PatchEmbed, init_like_mae
from mimir_fast.models.weight_files import WeightsChoice, WeightsError, read_weights
from mimir_fast.ops.patches import gather_patches, patchify
from mimir_fast.ops.random_uniform import random_uniform
from mimir_fast.philox import Stream


@dataclass
class ClassifierConfig:
    """Which classifier."""

    encoder: EncoderName = "base"
    """Width, depth and heads: nano 96/4/3 (ours), tiny 192/12/3, small 384/12/6, base 768/12/12, large 1024/24/16."""
    patch_size: int = 16
    """Side of a patch in pixels: 2 for 32² images, 4 for 64², 16 for 224²."""
    global_pool: Literal["avg", "cls"] = "avg"
    """`avg`: mean of patch tokens, then fc_norm; `cls`: the cls token after the encoder's norm."""
    drop_path: float = 0.1
    """Stochastic depth: the last block's drop rate; it grows linearly from 0 at the first."""
    train_pos_embed: bool = True
    """Train the position embedding."""
    token_keep_rate: float = 1.0
    """AGAT: patch tokens kept by each layer in train mode, 0.9 in the paper; 1 drops none."""
    normalization: NormalizationName = "none"
    """Subtracted mean and divided std, inside the model: `none` after our pre-training, timm weights need theirs."""

    def __post_init__(self) -> None:
        if self.encoder not in ENCODERS:
            raise ValueError(f"encoder={self.encoder!r}, wanted one of {', '.join(ENCODERS)}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path={self.drop_path}, wanted 0 <= drop_path < 1, such as 0.1")
        if not 0 < self.token_keep_rate <= 1:
            raise ValueError(f"token_keep_rate={self.token_keep_rate}, wanted 0 < rate <= 1, such as 0.9")
        if self.normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization={self.normalization!r}, wanted one of {', '.join(NORMALIZATIONS)}")


class ClassifierBlock(Block):
    """A pre-norm block that can scale its residual branches, gate their gradients, and drop tokens."""

    def forward(
        self, x_BTD: Tensor, scale_B2: Tensor | None = None, gate_B2: Tensor | None = None, num_keep: int | None = None
    ) -> Tensor:
        """(B, T, D), or (B, S, D) with S = num_keep.

        Args:
            scale_B2: factor of the attention and the MLP branch of each image (stochastic depth).
            gate_B2: 1 or 0, whether gradients flow back through the branch; its value is not changed.
            num_keep: tokens that stay after the attention, cls among them: those with the most attention on them.
        """
        self.branch_on_frozen()
        normed = self.norm1(x_BTD)
        if num_keep is None or num_keep >= x_BTD.shape[1]:
            x = x_BTD + _shape_branch(self.attn(normed), scale_B2, gate_B2, 0)
        else:
            branch, received_BT = attend_and_rank(self.attn, normed)
            x = x_BTD + _shape_branch(branch, scale_B2, gate_B2, 0)
            x = gather_patches(x, most_attended(received_BT, num_keep))
        return x + _shape_branch(self.mlp(self.norm2(x)), scale_B2, gate_B2, 1)


def _shape_branch(branch_BTD: Tensor, scale_B2: Tensor | None, gate_B2: Tensor | None, which: int) -> Tensor:
    if gate_B2 is not None:
        gate = gate_B2[:, which].view(-1, 1, 1).bool()
        branch_BTD = torch.where(gate, branch_BTD, branch_BTD.detach())
    if scale_B2 is not None:
        branch_BTD = branch_BTD * scale_B2[:, which].view(-1, 1, 1).to(branch_BTD.dtype)
    return branch_BTD


def attend_and_rank(attn: Attention, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """The attention's output (B, T, D), and (B, T) fp32: what each token received, summed over heads and queries.

    The fused kernels do not give out the probabilities, so they are computed in the open.
    """
    B, T, D = x_BTD.shape
    q, k, v = attn.qkv(x_BTD).view(B, T, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    probs_BHTT = (q @ k.transpose(-2, -1) * (D // attn.num_heads) ** -0.5).float().softmax(dim=-1)
    out = (probs_BHTT.to(v.dtype) @ v).transpose(1, 2).flatten(2)
    return attn.proj(out), probs_BHTT.sum(dim=(1, 2))


def most_attended(received_BT: Tensor, num_keep: int) -> Tensor:
    """(B, num_keep) int64 ascending: cls (token 0) and the patch tokens with the most attention; ties to the first."""
    order = received_BT[:, 1:].detach().argsort(dim=1, descending=True, stable=True)
    kept = order[:, : num_keep - 1].sort(dim=1).values + 1
    return F.pad(kept, (1, 0), value=0)


class VisionTransformer(nn.Module):
    """A ViT classifier.

    Args:
        config: the choices; kept as `config` and saved beside the weights.
        image_size: side of the images in pixels.
        num_classes: outputs of the head, at least 2.
        channels: of the images.
    """

    def __init__(self, config: ClassifierConfig, image_size: int, num_classes: int, channels: int = 3) -> None:
        super().__init__()
        check_patch_size(image_size, config.patch_size)
        if num_classes < 2:
            raise ValueError(
                f"num_classes={num_classes}: a classifier needs at least 2 classes; check the data's labels"
            )
        width, depth, num_heads = ENCODERS[config.encoder]
        self.config, self.num_classes = config, num_classes
        self.patch_size, self.image_size, self.channels = config.patch_size, image_size, channels
        grid = image_size // config.patch_size
        mean, std = NORMALIZATIONS[config.normalization]
        # Not persistent: a state dict holds the authors' names and nothing else.
        self.register_buffer("mean", torch.tensor(mean[:channels]).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std[:channels]).view(1, -1, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(sincos_positions(width, grid), requires_grad=config.train_pos_embed)
        self.patch_embed = PatchEmbed(channels, width, config.patch_size)
        self.blocks = nn.ModuleList(ClassifierBlock(width, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6) if config.global_pool == "cls" else nn.Identity()
        self.fc_norm = nn.LayerNorm(width, eps=1e-6) if config.global_pool == "avg" else nn.Identity()
        self.head = nn.Linear(width, num_classes)

        self.apply(init_like_mae)
        nn.init.normal_(self.cls_token, std=0.02)
        self.reset_head()

    def reset_head(self) -> None:
        """A fresh head that starts at nearly uniform predictions (MAE's fine-tuning)."""
        nn.init.trunc_normal_(self.head.weight, std=2e-5)
        nn.init.zeros_(self.head.bias)

    def embed(self, images_BCHW: Tensor) -> Tensor:
        """(B, T, D) tokens with positions, from images in [0, 1]; in fp32 whatever autocast says.

        bf16 has a spacing of 1/256 at the top of [0, 1], and ε is 8 of those.
        """
        if images_BCHW.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"images of {images_BCHW.shape[-2]} x {images_BCHW.shape[-1]} pixels for a classifier of "
                f"{self.image_size} x {self.image_size}: resize them, or build the model with that image_size"
            )
        if images_BCHW.dtype == torch.uint8:
            images_BCHW = images_BCHW.float() / 255
        with torch.autocast(images_BCHW.device.type, enabled=False):
            images = images_BCHW.to(self.pos_embed.dtype)
            if self.config.normalization != "none":
                images = (images - self.mean) / self.std
            tokens = self.patch_embed(patchify(images, self.patch_size))
            return torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1) + self.pos_embed

    def forward_features(
        self,
        images_BCHW: Tensor,
        branch_scales_BL2: Tensor | None = None,
        branch_gates_BL2: Tensor | None = None,
    ) -> Tensor:
        """(B, T, D): all tokens after the last block, cls in front (timm's convention); arguments as for `forward`."""
        x = self.embed(images_BCHW)
        drops = self.training and self.config.token_keep_rate < 1
        for index, block in enumerate(self.blocks):
            scale = None if branch_scales_BL2 is None else branch_scales_BL2[:, index]
            gate = None if branch_gates_BL2 is None else branch_gates_BL2[:, index]
            # The last layer's tokens are pooled at once; dropping there saves an MLP, as everywhere.
            keep = 1 + max(1, round((x.shape[1] - 1) * self.config.token_keep_rate)) if drops else None
            x = block(x, scale, gate, keep)
        return self.norm(x)

    def forward_head(self, tokens_BTD: Tensor) -> Tensor:
        """(B, K) logits from the tokens."""
        pooled = tokens_BTD[:, 1:].mean(dim=1) if self.config.global_pool == "avg" else tokens_BTD[:, 0]
        return self.head(self.fc_norm(pooled))

    def forward(
        self,
        images_BCHW: Tensor,
        branch_scales_BL2: Tensor | None = None,
        branch_gates_BL2: Tensor | None = None,
    ) -> Tensor:
        """(B, K) logits.

        Args:
            images_BCHW: float in [0, 1], or uint8.
            branch_scales_BL2: factors of the residual branches from `draw_drop_path`; None drops nothing.
            branch_gates_BL2: 1 where gradients may flow back through a residual branch, 0 where not (ARD).
        Raises:
            ValueError: images of another size.
        """
        return self.forward_head(self.forward_features(images_BCHW, branch_scales_BL2, branch_gates_BL2))


def draw_drop_path(model: VisionTransformer, samples_B: Tensor, *, seed: int, step: int) -> Tensor | None:
    """(B, L, 2) float32 factors of the residual branches of one training step; None where nothing can be dropped.

    A branch of block l is 0 with probability rate·l/(L−1), else 1/(1 − that), so its mean is unchanged (stochastic
    depth: Huang et al., arXiv 1603.09382). Functions of (seed, step, sample), like all randomness here.
    """
    rate, depth = model.config.drop_path, len(model.blocks)
    if rate == 0:
        return None
    rates_L = torch.linspace(0, rate, depth, device=samples_B.device).view(1, depth, 1)
    draws = random_uniform(seed, Stream.DROP_PATH, step, samples_B, 2 * depth).view(len(samples_B), depth, 2)
    return (draws >= rates_L) / (1 - rates_L)


def build_classifier(
    config: ClassifierConfig, image_size: int, num_classes: int, channels: int = 3
) -> VisionTransformer:
    """The classifier a config names, freshly initialised from torch's global generator."""
    return VisionTransformer(config, image_size, num_classes, channels)


def load_classifier(
    source: str | Path, which: WeightsChoice = "auto", *, num_classes: int | None = None
) -> VisionTransformer:
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
    shape = infer_shape(weights)
    if shape.num_classes is None:
        raise WeightsError(
            f"{weights.origin} has no classification head, it is a pre-trained encoder: fine-tune it first with "
            f"python -m mimir_fast.finetune --recipe … --init {source}"
        )
    if num_classes is not None and num_classes != shape.num_classes:
        raise WeightsError(
            f"{weights.origin} has {shape.num_classes} classes, the data has {num_classes}: "
            "choose the data set it was trained on (--data.source)"
        )
    saved = (weights.config or {}).get("model", {})
    names = {f.name for f in fields(ClassifierConfig)}
    config = ClassifierConfig(**{k: v for k, v in saved.items() if k in names})
    config.encoder, config.patch_size = shape.encoder, shape.patch_size
    config.global_pool = "avg" if "fc_norm.weight" in weights.tensors else "cls"
    if weights.normalization is not None:
        config.normalization = _normalization_name(weights.normalization)
    model = build_classifier(config, shape.image_size, shape.num_classes, shape.channels)
    missing, unexpected = model.load_state_dict(weights.tensors, strict=False)
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
