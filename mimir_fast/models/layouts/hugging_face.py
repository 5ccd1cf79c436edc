"""Hugging Face's transformers: ViT, DeiT, ViTMAE, DINOv2, Swin and ConvNeXt; queries, keys and values stand apart.

The rest of the model (heads, eps, activation, image size) is in the config.json beside the file, mean and std in its
preprocessor_config.json, or under `image_processor` in processor_config.json, which goes first as in transformers.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mimir_fast.checkpoints.reading import WeightsError
from mimir_fast.models.facts import Facts, numbers, size_said
from mimir_fast.models.families import under_our_names
from mimir_fast.models.layouts import Layout, Read, register
from mimir_fast.models.layouts.dinov2 import rename_registers
from mimir_fast.models.normalization import Statistics, none_of, typed
from mimir_fast.models.parts import Part

Rules = Iterable[tuple[str, str | Callable[[re.Match[str]], str]]]

_BLOCK: Rules = (
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.self\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.self\.relative_position_bias_table$", ".attn.relative_position_bias_table"),
    (r"\.attention\.self\.relative_position_index$", ".attn.relative_position_index"),
    # Names of a live model since transformers 5; its files keep the others.
    (r"\.attention\.q_proj\.", ".attn.query."),
    (r"\.attention\.k_proj\.", ".attn.key."),
    (r"\.attention\.v_proj\.", ".attn.value."),
    (r"\.attention\.relative_position_bias\.", ".attn."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
)
_VIT: Rules = (
    (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.register_tokens$", "register_tokens"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(encoder\.layer|layers)\.", "blocks."),
    (r"^layernorm\.", "norm."),
    (r"^pooler\.layernorm\.", "fc_norm."),  # of BEiT's, behind the mean of the patches
    *_BLOCK,
)
_DECODER: Rules = (
    (r"^decoder\.decoder_(layers|encoder\.layer)\.", "decoder_blocks."),
    (r"^decoder\.(decoder_|mask_token)", r"\1"),
    *_BLOCK,
)
_SWIN: Rules = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.norm\.", "patch_embed.norm."),
    (r"^embeddings\.mask_token$", "mask_token"),
    (r"^encoder\.layers\.(\d+)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.downsample."),
    (r"^encoder\.layers\.", "stages."),
    (r"^layernorm\.", "norm."),
    *_BLOCK,
)
_CONVNEXT: Rules = (
    (r"^embeddings\.patch_embeddings\.", "stem.0."),
    (r"^embeddings\.layernorm\.", "stem.1."),
    (r"^encoder\.stages\.(\d+)\.downsampling_layer\.", r"stages.\1.downsample."),
    (r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.dwconv\.", r"stages.\1.blocks.\2.conv_dw."),
    (r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.layernorm\.", r"stages.\1.blocks.\2.norm."),
    (r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.pwconv", r"stages.\1.blocks.\2.mlp.fc"),
    (r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.layer_scale_parameter$", r"stages.\1.blocks.\2.gamma"),
    (r"^layernorm\.", "fc_norm."),
)
# What stands beside the encoder and belongs to a model of ours: MAE's decoder, linear heads.
_BESIDE = re.compile(r"decoder\.(decoder_|mask_token).*|(cls_|distillation_)?classifier\.(weight|bias)")
_HEADS: Rules = ((r"^(cls_)?classifier\.", "head."), (r"^distillation_classifier\.", "head_dist."))

# Names of transformers' activations → the function.
_GELUS = {
    "gelu": "erf", "gelu_python": "erf", "gelu_new": "tanh", "gelu_fast": "tanh", "gelu_accurate": "tanh",
    "gelu_pytorch_tanh": "tanh", "gelu_python_tanh": "tanh", "quick_gelu": "quick",
}  # fmt: skip


def recognise(part: Part) -> bool:
    """By the embedding of the patches."""
    return any(anchor in part.tensors for anchor in ANCHORS)


def read(part: Part) -> Read:
    """Under our names: queries, keys and values joined."""
    names, config = part.tensors, _config(part)
    # ViT MSN's files have `vit.embeddings` and, outside of it, `encoder.layer`.
    layers = (
        [] if any(n.startswith("encoder.") for n in names) else [n for n in part.siblings if n[:14] == "encoder.layer."]
    )
    names = names | {name: part.siblings[name] for name in layers}
    swin, convnext = "embeddings.norm.weight" in names, "embeddings.patch_embeddings.weight" in names
    pattern = r"\.lambda_\d$|\.weights_in\.|\.grn\.|\.mask_emb" + ("" if swin else r"|relative_position_bias")
    foreign = next((name for name in names if re.search(pattern, name)), "")
    if convnext and not any(name.startswith("encoder.stages.") for name in names):  # DINOv3's ViT
        foreign = "embeddings.patch_embeddings.weight"
    if foreign:
        kind = config.get("model_type", "BEiT, Data2Vec or such")
        raise WeightsError(f"{foreign} is of another architecture than ours ({kind}): use ViT, DeiT, ViTMAE, DINOv2, "
                           "Swin or ConvNeXt")  # fmt: skip
    tensors = joined(renamed(names, _CONVNEXT if convnext else _SWIN if swin else _VIT))
    left_out = {name: "the pooling of transformers" for name in names if re.match(r"pooler\.(?!layernorm\.)", name)}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in left_out}
    taken = [name for name in part.siblings if _BESIDE.fullmatch(name)]
    tensors |= joined(renamed({name: part.siblings[name] for name in taken}, (*_DECODER, *_HEADS)))
    width = next((t.shape[-1] for n, t in tensors.items() if n == "cls_token"), None)
    head = tensors.get("head.weight")
    if head is not None and width is not None and head.ndim == 2 and head.shape[1] == 2 * width:
        for kind in ("weight", "bias"):
            tensors.pop(f"head.{kind}", None)
            left_out[f"classifier.{kind}"] = "a head on cls and mean of the patches together"
    if {"dist_token", "head.weight"} <= tensors.keys() and "head_dist.weight" not in tensors:
        tensors["reg_token"] = tensors.pop("dist_token")  # nobody asks it: a register
    if "decoder_embed.weight" not in tensors and tensors.pop("mask_token", None) is not None:
        left_out["embeddings.mask_token"] = "the mask token"
    rename_registers(tensors)
    index = [name for name in tensors if name.endswith(".relative_position_index")]
    left_out |= dict.fromkeys(index, "computed from the sizes")
    tensors = {name: tensor for name, tensor in tensors.items() if name not in index}
    pool = "cls" if "cls_token" in tensors and "fc_norm.weight" not in tensors else "avg"
    facts = replace(facts_of(config, _processor(part)), pool=pool)
    return Read(under_our_names(tensors), facts, left_out, taken=[*taken, *layers])


def renamed(tensors: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    """Every rule that fits is applied, in their order."""
    found = {}
    for name, tensor in tensors.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        found[name] = tensor
    return found


def joined(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`attn.query`, `attn.key` and `attn.value` as one `attn.qkv`; a bias that one of them lacks is zero."""
    found = dict(tensors)
    for name in tensors:
        if not name.endswith(".attn.query.weight"):
            continue
        block = name.removesuffix("query.weight")
        three = [f"{block}{word}" for word in ("query", "key", "value")]
        if all(f"{word}.weight" in found for word in three):
            weights = [found.pop(f"{word}.weight") for word in three]
            biases = [found.pop(f"{word}.bias", None) for word in three]
            found[f"{block}qkv.weight"] = torch.cat(weights)
            if any(bias is not None for bias in biases):
                whole = [w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]
                found[f"{block}qkv.bias"] = torch.cat(whole)
    return found


def _config(part: Part) -> dict[str, Any]:
    """The config.json beside the file, if it is of a model of this width."""
    config: Any = part.beside.get("config.json", part.beside.get("config"))
    if not isinstance(config, dict) or "model_type" not in config:
        return {}
    for name in ANCHORS:
        if (stem := part.tensors.get(name)) is not None:
            width = config.get("embed_dim") or (config.get("hidden_sizes") or [None])[0] or config.get("hidden_size")
            return config if width in (None, len(stem)) else {}
    return config


def _processor(part: Part) -> dict[str, Any]:
    """What the folder says of its image processor; {} where it says nothing."""
    inside, beside = (part.beside.get(f"{name}.json") or {} for name in ("processor_config", "preprocessor_config"))
    found = inside.get("image_processor") or beside
    return found if isinstance(found, dict) else {}


# Steps of transformers' image processors that give other pixels, and that nothing here can stand for.
_OTHER_PIXELS = ("do_flip_channel_order", "do_grayscale", "do_color_quantize", "include_top")


def _normalization(processor: Mapping[str, Any], config: Mapping[str, Any]) -> Statistics | None:
    """Of images in [0, 1], what a processor does to those in [0, 255]: x·rescale_factor, then (x − mean) / std.

    With `rescale_offset` (EfficientNet's processor) it takes 1 away in between.

    Raises:
        WeightsError: numbers that are none, a factor of 0, or a step that changes the colours.
    """
    if step := next((name for name in _OTHER_PIXELS if processor.get(name)), ""):
        raise WeightsError(
            f"its image processor says {step} {processor[step]!r}, so its model takes other colours than our images "
            "have: give evaluate the model with that step inside, as module:function"
        )
    rescales = processor.get("do_rescale", True)
    factor = processor.get("rescale_factor", 1 / 255) if rescales else 1
    if not isinstance(factor, (int, float)) or not factor > 0:
        raise WeightsError(f"its image processor says rescale_factor {factor!r}: wanted a number such as 1/255")
    scale, offset = 255 * factor, int(bool(rescales and processor.get("rescale_offset")))
    mean, std = numbers(processor.get("image_mean")), numbers(processor.get("image_std"))
    if not processor.get("do_normalize", True):
        mean, std = none_of(config.get("num_channels", 3))
    if mean is None or std is None:
        return None
    if abs(scale - 1) < 1e-6 and not offset:
        return mean, std
    return typed((m + offset) / scale for m in mean), typed(s / scale for s in std)


def facts_of(config: Mapping[str, Any], processor: Mapping[str, Any]) -> Facts:
    """What config.json and the image processor's file say."""
    heads = config.get("num_attention_heads", config.get("num_heads"))
    heads = heads[0] if isinstance(heads, (list, tuple)) and heads else heads
    eps, act = config.get("layer_norm_eps"), str(config.get("hidden_act", ""))
    if act and act not in _GELUS:
        raise WeightsError(f"config.json says hidden_act {act}, which no encoder of ours has: they use gelu")
    mean, std = _normalization(processor, config) or (None, None)
    return Facts(
        heads=heads if isinstance(heads, int) else None,
        eps=eps if isinstance(eps, float) else None,
        gelu=_GELUS.get(act),
        mean=mean,
        std=std,
        image_size=size_said(config.get("image_size")),
        decoder_heads=config.get("decoder_num_attention_heads"),
        norm_pixels=config.get("norm_pix_loss"),
    )


ANCHORS = ("embeddings.patch_embeddings.projection.weight", "embeddings.patch_embeddings.weight")

register(Layout("hugging_face", "Hugging Face transformers", recognise, read, anchors=ANCHORS))
