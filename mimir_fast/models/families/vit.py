"""ViT and DeiT (arXiv 2010.11929, 2012.12877): the encoder of MAE and of the MIMIR authors, under timm's names.

Plain: fixed sine-cosine positions, a cls token, pre-norm blocks. Options add what timm's other ViTs have: layer scale
(DeiT III, DINOv2), registers, norms of queries and keys, a norm in front (CLIP), a distillation token (DeiT).
Visible patches only: masked ones are never embedded.
Shapes: B images, N patches, K visible, P numbers a patch, F rows of the prefix, T = F + K tokens, D width.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimir_fast.layers.norms import CLEAN, SUFFIX, LayerNorm, NoNorm, is_adapter, normalise
from mimir_fast.models.blocks import Block, PatchEmbed, check_heads, init_like_mae
from mimir_fast.models.branches import Branches
from mimir_fast.models.decoder import Decoder
from mimir_fast.models.encoder import PREFIX_TOKENS, Encoder, check_patch_size
from mimir_fast.models.families import Architecture, Family, Tensors, TimmModel, register, settled
from mimir_fast.models.positions import sincos_positions, with_positions
from mimir_fast.sizes import Size, height_width, nearest_grid, size_of
from mimir_fast.validation import check_choice, check_number

# name: (width, depth, heads). `nano` is ours, for experiments on a CPU; the others are the papers'.
SIZES: dict[str, tuple[int, int, int]] = {
    "nano": (96, 4, 3),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
# 0 is what the size has; a width of no size has heads of 64.
OPTIONS: dict[str, Any] = {
    "heads": 0, "eps": 1e-6, "gelu": ("erf", "tanh", "quick"), "layer_scale": False, "qk_norm": False,
    "pre_norm": False, "distilled": False, "registers": 0, "no_prefix_positions": False, "no_cls_token": False,
    "norm_before_pool": False, "qkv_bias": True, "mlp_ratio": 4.0, "width": 0, "depth": 0,
}  # fmt: skip
_OF_SHAPE, _OF_CLASSIFIER = ("width", "depth", "heads"), ("norm_before_pool",)


class VitEncoder(Encoder):
    """Pre-norm transformer over the visible patches.

    Args:
        eps, gelu, layer_scale, qk_norm: of the blocks, see there; `eps` of all norms.
        pre_norm: a norm in front of the blocks, and no bias in the patch projection (CLIP).
        distilled: DeiT's second class token.
        registers: tokens that belong to no place (arXiv 2309.16588).
        no_prefix_positions: only patches have positions, timm's `no_embed_class`.
    """

    def __init__(
        self, width: int, depth: int, num_heads: int, *, image_size: Size, patch_size: int, channels: int = 3,
        mlp_ratio: float = 4.0, final_norm: bool = True, qkv_bias: bool = True, eps: float = 1e-6, gelu: str = "erf",
        layer_scale: bool = False, qk_norm: bool = False, pre_norm: bool = False, distilled: bool = False,
        registers: int = 0, no_prefix_positions: bool = False, no_cls_token: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        check_patch_size(image_size, patch_size)
        self.image_size, self.mask_unit, self.channels = image_size, patch_size, channels
        self.width = self.token_width = width
        self.num_layers, self.num_heads = depth, num_heads
        rows = {"cls_token": int(not no_cls_token), "dist_token": int(distilled), "reg_token": registers}
        self.prefix_names = [name for name in PREFIX_TOKENS if rows[name]]
        for name in self.prefix_names:
            self.register_parameter(name, nn.Parameter(torch.zeros(1, rows[name], width)))
        self.num_prefix = sum(rows.values())
        positions = sincos_positions(width, self.grid, num_prefix=0 if no_prefix_positions else self.num_prefix)
        self.pos_embed = nn.Parameter(positions, requires_grad=False)
        self.patch_embed = PatchEmbed(channels, width, patch_size, bias=not pre_norm)
        self.norm_pre = LayerNorm(width, eps) if pre_norm else NoNorm()
        self.blocks = nn.ModuleList(
            Block(width, num_heads, mlp_ratio, qkv_bias, eps=eps, gelu=gelu, layer_scale=layer_scale, qk_norm=qk_norm)
            for _ in range(depth)
        )
        self.norm = LayerNorm(width, eps) if final_norm else NoNorm()
        self.apply(init_like_mae)
        for name in self.prefix_names:
            nn.init.normal_(self.token_of(name, CLEAN), std=0.02)

    def encode(
        self, tokens: Tensor, places_BK: Tensor | None, *, domain: int = CLEAN, branches: Branches | None = None
    ) -> Tensor:
        """(B, F + K, D); with a keep rate below 1 fewer tokens come out than went in (AGAT). See Encoder."""
        prefix_FD, positions, first = self.prefix_of(domain), self.pos_embed[0], self.num_prefix
        if len(positions) == self.num_patches:  # the prefix has none
            positions = F.pad(positions, (0, 0, first, 0))
        x = normalise(self.norm_pre, with_positions(tokens, places_BK, positions, prefix_FD), domain)
        for index, block in enumerate(self.blocks):
            if branches is None:
                x = block(x, domain=domain)
                continue
            keep = first + max(1, round((x.shape[1] - first) * branches.keep_rate)) if branches.keep_rate < 1 else None
            x = block(x, num_keep=keep, num_prefix=first, domain=domain, branches=branches.of_layer(index))
        return normalise(self.norm, x, domain)

    def prefix_of(self, domain: int) -> Tensor | None:
        """(F, D): what stands in front of the patches, for the data of a domain; None for nothing."""
        tokens = [self.token_of(name, domain)[0] for name in self.prefix_names]
        return torch.cat(tokens) if len(tokens) > 1 else tokens[0] if tokens else None


def shape_of(architecture: Architecture) -> tuple[int, int, int]:
    """Width, depth and heads: the size's, or those of the options; a width of no size has heads of about 64."""
    (width, depth, heads), options = SIZES[architecture.size], architecture.options
    if "width" in options:
        width = options["width"]
        heads = min((h for h in range(1, width + 1) if width % h == 0), key=lambda h: abs(width / h - 64), default=1)
    return width, options.get("depth", depth), options.get("heads", heads)


def settle(architecture: Architecture) -> Architecture:
    """The named size of that width and depth where there is one, else the nearest; see Family.

    Raises:
        ValueError: options that cannot be built.
    """
    if architecture.size not in SIZES:  # of a family made from this one by `dataclasses.replace`
        return architecture
    width, depth, _ = shape_of(architecture)
    options = {name: value for name, value in architecture.options.items() if name not in _OF_SHAPE}
    check_number("width", width, at_least=4)
    check_number("depth", depth, at_least=1)
    check_number("eps", options.get("eps", 1e-6), above=0)
    check_number("registers", options.get("registers", 0), at_least=0)
    check_number("mlp_ratio", options.get("mlp_ratio", 4.0), at_least=1 / width)
    check_choice("gelu", options.get("gelu", "erf"), OPTIONS["gelu"])
    if options.get("distilled") and (options.get("registers") or options.get("no_cls_token")):
        raise ValueError("a distilled ViT has a cls token and no registers: leave out one of these options")
    named = [name for name, (w, d, _) in SIZES.items() if (w, d) == (width, depth)]
    size = next(iter(named + [name for name, (w, _, _) in SIZES.items() if w == width]), "base")
    for name, value, usual in zip(_OF_SHAPE, (width, depth), SIZES[size], strict=False):
        if value != usual:
            options[name] = value
    usual = shape_of(replace(architecture, size=size, options=options))[2]
    heads = architecture.options.get("heads", usual)
    check_number("heads", heads, at_least=1)
    check_heads(width, heads)
    if heads != usual:
        options["heads"] = heads
    return replace(architecture, size=size, options=options)


def build(architecture: Architecture, final_norm: bool) -> VitEncoder:
    """The encoder of an architecture."""
    beside = (*_OF_SHAPE, *_OF_CLASSIFIER)
    options = {n: value for n, value in architecture.options.items() if n in OPTIONS and n not in beside}
    return VitEncoder(
        *shape_of(architecture), image_size=architecture.image_size, patch_size=architecture.patch_size,
        channels=architecture.channels, final_norm=final_norm, **options,
    )  # fmt: skip


_LAYER = r"(norm[12]|attn\.(qkv|proj|q_norm|k_norm)|mlp\.fc[12])\.(weight|bias)|ls[12]\.gamma"
# Behind the blocks may be other things: heads, decoders, a layer in front of the head.
_KNOWN = re.compile(
    rf"{'|'.join(PREFIX_TOKENS)}|pos_embed|patch_embed\.proj\.(weight|bias)|blocks\.\d+\.({_LAYER})"
    r"|(norm_pre|norm|fc_norm)\.(weight|bias)|(head|decoder|mask_token|pre_logits\.).*"
)
_ALWAYS = [f"{layer}.{kind}" for layer in ("norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
           for kind in ("weight", "bias")] + ["attn.qkv.weight"]  # fmt: skip
_TOGETHER = [("ls1.gamma", "ls2.gamma"), ("attn.q_norm.weight", "attn.q_norm.bias", "attn.k_norm.weight",
             "attn.k_norm.bias"), ("attn.qkv.bias",)]  # fmt: skip


def _misfits(tensors: Tensors, image_size: Size | None) -> Iterator[str]:
    """What keeps these from being a ViT's, as `NAME, which …`."""
    for name in sorted(tensors):
        if not _KNOWN.fullmatch(name.removesuffix(SUFFIX)):
            yield f"{name}, which ViT has not"
    if "norm_pre.weight" in tensors and "patch_embed.proj.bias" in tensors:
        yield "patch_embed.proj.bias, which ViT with norm_pre has not"
    needed = list(_ALWAYS)
    for group in _TOGETHER:
        needed += [name for name in group if any(f"blocks.0.{one}" in tensors for one in group)]
    names = [f"blocks.{index}.{name}" for index in range(_depth_of(tensors)) for name in needed] + ["pos_embed"]
    names += [] if "norm_pre.weight" in tensors else ["patch_embed.proj.bias"]
    names += [] if "fc_norm.weight" in tensors else ["norm.weight"]
    for name in names:
        if name not in tensors:
            yield f"{name}, which is missing"
    if "dist_token" in tensors and ("reg_token" in tensors or "cls_token" not in tensors):
        yield "dist_token, which ViT has beside a cls token alone"
    first = tensors["patch_embed.proj.weight"]
    width = len(first)
    hidden = len(tensors.get("blocks.0.mlp.fc1.weight", ()))
    shapes = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.fc1": (hidden, width),
              "mlp.fc2": (width, hidden)}  # fmt: skip
    shapes = {f"blocks.0.{layer}.weight": shape for layer, shape in shapes.items()}
    for name, shape in shapes.items():
        if name in tensors and tensors[name].shape != shape:
            yield f"{name}, which is {tuple(tensors[name].shape)} and not {shape} as in ViT"
    if first.ndim != 4 or first.shape[2] != first.shape[3]:
        yield f"patch_embed.proj.weight, which is {tuple(first.shape)} and no projection of square patches"
    positions = tensors.get("pos_embed")
    if positions is not None and (positions.ndim != 3 or _size_of(tensors, image_size) is None):
        yield f"pos_embed, which is {tuple(positions.shape)} and no grid"


def _depth_of(tensors: Tensors) -> int:
    return 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))


def _size_of(tensors: Tensors, image_size: Size | None) -> tuple[Size, bool] | None:
    """Size of the images, and whether only patches have positions: what is known, else a square, else a rectangle."""
    rows, prefix = tensors["pos_embed"].shape[1], sum(tensors[n].shape[1] for n in PREFIX_TOKENS if n in tensors)
    unit = tensors["patch_embed.proj.weight"].shape[-1]
    found = [(size_of(rows - of_prefix, unit, image_size), of_prefix < prefix) for of_prefix in (0, prefix)]
    sizes = [(size, bare) for size, bare in found if size is not None]
    return next((one for one in sizes if isinstance(one[0], int)), sizes[-1] if sizes else None)


def rival(tensors: Tensors) -> Architecture | None:
    """n² rows of positions are n × n patches without positions of the prefix, or a rectangle of patches with them.

    DeiT III has 14² for 14 × 14 patches, and any ViT with a cls token as many for 13 × 15.
    """
    rows, prefix = tensors["pos_embed"].shape[1], sum(tensors[n].shape[1] for n in PREFIX_TOKENS if n in tensors)
    if not prefix or rows <= prefix or not isinstance(nearest_grid(rows), int):
        return None
    down, across = height_width(nearest_grid(rows - prefix))
    unit = tensors["patch_embed.proj.weight"].shape[-1]
    # Nobody's images are more than twice as long as wide.
    return recognise(tensors, (down * unit, across * unit)) if down < across <= 2 * down else None


# Of a CaiT and a ConViT, of which it is the size that ours may lack.
_OF_OTHERS = ("blocks.0.attn.proj_l.weight", "blocks.0.attn.gating_param")


def why_not(tensors: Tensors) -> str:
    """By which tensor a model with patches and blocks is no ViT; "" for one that is, and for what is no relative."""
    related = any(name.startswith("blocks.0.") for name in tensors) and not any(name in tensors for name in _OF_OTHERS)
    return next(_misfits(tensors, None), "") if related else ""


def recognise(tensors: Tensors, image_size: Size | None = None) -> Architecture | None:
    """From names and shapes, of which none may be unknown in front of the blocks or in them: it would change them."""
    if "blocks.0.attn.qkv.weight" not in tensors or next(_misfits(tensors, image_size), ""):
        return None
    if (found := _size_of(tensors, image_size)) is None:
        return None
    width, channels, patch_size, _ = tensors["patch_embed.proj.weight"].shape
    size, bare_prefix = found
    options = {
        "width": width,
        "depth": _depth_of(tensors),
        "layer_scale": "blocks.0.ls1.gamma" in tensors,
        "qk_norm": "blocks.0.attn.q_norm.weight" in tensors,
        "pre_norm": "norm_pre.weight" in tensors,
        "distilled": "dist_token" in tensors,
        "registers": tensors["reg_token"].shape[1] if "reg_token" in tensors else 0,
        "no_prefix_positions": bare_prefix,
        "no_cls_token": "cls_token" not in tensors,
        "norm_before_pool": "cls_token" not in tensors and {"norm.weight", "head.weight"} <= tensors.keys(),
        "qkv_bias": "blocks.0.attn.qkv.bias" in tensors,
        "mlp_ratio": shortest_ratio(len(tensors["blocks.0.mlp.fc1.weight"]), width),
    }
    return settled(Architecture("vit", "base", size, patch_size, channels, options))


def shortest_ratio(hidden: int, width: int) -> float:
    """The number of fewest digits by which `int(width · ratio)` is `hidden`, which is what the authors typed."""
    for digits in range(1, 16):
        ratio = math.ceil(hidden / width * 10**digits) / 10**digits
        if int(width * ratio) == hidden:
            return ratio
    return hidden / width


class _Code(str):
    """An argument that is Python; as JSON it is a string, which timm refuses rather than misreads."""

    __repr__ = str.__str__


def timm_arguments(tensors: Tensors, architecture: Architecture) -> dict[str, Any]:
    """Arguments of the constructor of timm's `VisionTransformer`."""
    (width, depth, num_heads), options = shape_of(architecture), architecture.options
    has_cls, pools_late = not options.get("no_cls_token"), "fc_norm.weight" in tensors
    arguments: dict[str, Any] = {
        "img_size": architecture.image_size,
        "patch_size": architecture.patch_size,
        "in_chans": architecture.channels,
        "embed_dim": width,
        "depth": depth,
        "num_heads": num_heads,
        "num_classes": len(tensors["head.weight"]) if "head.weight" in tensors else 0,
        "global_pool": "token" if has_cls and not pools_late and not options.get("norm_before_pool") else "avg",
    }
    if arguments["global_pool"] == "avg" and not pools_late:
        arguments["fc_norm"] = False
    words = {"mlp_ratio": "mlp_ratio", "qkv_bias": "qkv_bias", "qk_norm": "qk_norm", "pre_norm": "pre_norm",
             "no_prefix_positions": "no_embed_class", "registers": "reg_tokens"}  # fmt: skip
    arguments |= {words[name]: value for name, value in options.items() if name in words}
    if options.get("layer_scale"):
        arguments["init_values"] = 1e-5
    if not has_cls:
        arguments["class_token"] = False
    if "gelu" in options:
        arguments["act_layer"] = {"tanh": "gelu_tanh", "quick": "quick_gelu"}[options["gelu"]]
    if "eps" in options:
        arguments["norm_layer"] = _Code(f"functools.partial(timm.layers.LayerNorm, eps={options['eps']!r})")
    return arguments


def to_timm(tensors: Tensors, architecture: Architecture) -> TimmModel:
    """The same model as timm's `VisionTransformer`, or its distilled subclass, with its tensors."""
    path = "timm.models.vision_transformer.VisionTransformer"
    if architecture.options.get("distilled"):
        path = "timm.models.deit.VisionTransformerDistilled"
    own = {name: tensor for name, tensor in tensors.items() if not is_adapter(name)}
    return TimmModel(path, timm_arguments(tensors, architecture), own)


register(
    Family(
        name="vit",
        title="ViT",
        sizes={name: f"{w} wide, {d} deep, {h} heads" for name, (w, d, h) in SIZES.items()},
        anchor="patch_embed.proj.weight",
        mask_unit=lambda a: check_patch_size(a.image_size, a.patch_size),
        build=build,
        build_decoder=Decoder,
        recognise=recognise,
        sized=recognise,
        rival=rival,
        to_timm=to_timm,
        options=OPTIONS,
        unseen=("heads", "eps", "gelu"),
        settle=settle,
        why_not=why_not,
    )
)
