"""timm's names, which are those of ViT, DeiT and most repositories; plain encoders of any writer.

What timm says of a model beside its tensors stands in the hub's config.json (`architecture`, `model_args`,
`pretrained_cfg`), or in the options of a training script.
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mimir_fast.checkpoints.reading import WeightsError
from mimir_fast.models.facts import (
    Facts,
    facts_of_arguments,
    facts_of_file,
    named,
    numbers,
    pool_said,
    size_said,
    tables,
)
from mimir_fast.models.families import recognise, under_our_names
from mimir_fast.models.layouts import Layout, Read, register
from mimir_fast.models.parts import Part

DERIVED = (".relative_position_index", ".attn_mask", ".relative_coords_table")
COMPUTED = "computed from the sizes"


def without_derived(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, what was left out and why): tables that older versions wrote beside the weights."""
    left_out = {name: COMPUTED for name in tensors if name.endswith(DERIVED)}
    return {name: tensor for name, tensor in tensors.items() if name not in left_out}, left_out


def facts_beside(part: Part) -> Facts:
    """From our export's header, `pretrained_cfg`, timm's class, and the training script's options, as far as there."""
    beside = part.beside
    config: Any = beside.get("config.json", beside.get("config"))
    settings, said = beside.get("pretrained_cfg"), Facts()
    width = part.tensors["cls_token"].shape[-1] if "cls_token" in part.tensors else None
    # A config.json may lie beside a file it says nothing of.
    if settings is None and isinstance(config, dict) and width in (None, config.get("num_features", width)):
        # Up to timm 0.8 the settings were not under a key of their own.
        settings = config.get("pretrained_cfg", config if "architecture" in config else None)
        arguments = config.get("model_args")
        said = facts_of_arguments(arguments).over(Facts(pool=pool_said(config.get("global_pool"))))
        said = said.over(facts_of_name(config.get("architecture"), arguments, part.tensors))
    if isinstance(settings, dict):
        mean, std = numbers(settings.get("mean")), numbers(settings.get("std"))
        said = said.over(Facts(mean=mean, std=std, image_size=size_said(settings.get("input_size"))))
    said = _facts_of_export(beside.get("metadata") or {}).over(said).over(facts_of_file(beside))
    for table in tables(beside):
        for name in {name: None for word in _NAMES if isinstance(name := table.get(word), str)}:
            said = said.over(facts_of_name(name, table | named(table.get("model_kwargs")), part.tensors))
    return said


def _facts_of_export(metadata: Mapping[str, str]) -> Facts:
    """From the arguments and the code of timm's class, in the header of a file that our export wrote."""
    try:
        arguments, size = json.loads(metadata["timm"]), json.loads(metadata.get("image_size", "null"))
    except (KeyError, ValueError, TypeError):
        return Facts()
    # ConvNeXt's is in the code alone.
    return facts_of_arguments({"norm_layer": metadata.get("code", "")} | named(arguments)).over(
        Facts(image_size=size_said(size))
    )


def facts_of_name(name: Any, arguments: Any, tensors: Mapping[str, Tensor]) -> Facts:
    """What timm's model of that name is beside its tensors; nothing where there is none, or one of other shapes.

    It is built without memory and without weights, so nothing is downloaded.

    Args:
        arguments: of its constructor, beside what the name stands for.
        tensors: of the file, under timm's names.
    Raises:
        WeightsError: see `facts_of_model`.
    """
    try:
        import timm
    except ImportError:
        return Facts()
    if not isinstance(name, str) or ":" in name or not timm.is_model(name := name.partition(".")[0]):
        return Facts()
    more: dict[str, Any] = {
        n: value for n, value in named(arguments).items() if n in _SHAPING and isinstance(value, (int, float, str))
    }
    try:
        with warnings.catch_warnings(action="ignore"), torch.device("meta"):
            model = timm.create_model(name, pretrained=False, **more)
    except Exception:  # arguments that this version of timm does not know raise anything
        return Facts()
    own = model.state_dict()
    first = [n for n in own if n.startswith(("blocks.0.", "layers.0.", "stages.0.")) and not n.endswith(DERIVED)]
    if any(n not in tensors or tensors[n].shape != own[n].shape for n in first):
        return Facts()
    pools_alike = ("fc_norm.weight" in own) == ("fc_norm.weight" in tensors)
    return facts_of_model(model) if pools_alike else replace(facts_of_model(model), pool=None)


# Under which words training scripts keep the name of timm's model.
_NAMES = ("model", "arch", "architecture", "model_name", "backbone", "encoder", "network", "net", "name")
# Arguments that change what is computed, not how many layers there are; none by which a file makes timm open another.
_SHAPING = ("embed_dim", "num_heads", "mlp_ratio", "qkv_bias", "qk_norm", "init_values", "act_layer", "norm_layer",
            "norm_eps", "tokens_norm", "global_pool", "output_stride")  # fmt: skip
_STAGED = ("SwinTransformer", "ConvNeXt")
_CLASSES = ("VisionTransformer", "VisionTransformerDistilled", "Cait", "Xcit", "ConVit", *_STAGED)
_ACTIVATIONS = {"GELU": "erf", "GELUTanh": "tanh", "QuickGELU": "quick"}


def facts_of_model(model: Any) -> Facts:
    """Of a live model of timm, which shows what its tensors do not; nothing of one that is none of our families.

    Raises:
        WeightsError: it has the tensors of one of our families and computes another function: `ResPostBlock` in a ViT,
            another activation, dilation, several epsilons.
    """
    kind, parts = type(model).__name__, dict(model.named_modules())
    if kind not in _CLASSES:
        if recognise(under_our_names(model.state_dict())) is not None:
            raise WeightsError(f"it is timm's {kind}, which no encoder of ours computes, whatever its tensors")
        return Facts()
    is_vit = kind.startswith("VisionTransformer")
    if is_vit and (block := type(model.blocks[0]).__name__) != "Block":
        raise WeightsError(f"its blocks are timm's {block}, which no encoder of ours computes, whatever their tensors")
    acts = {type(part).__name__ for name, part in parts.items() if name.endswith("mlp.act")}
    if foreign := acts - _ACTIVATIONS.keys():
        raise WeightsError(f"its activation is {', '.join(foreign)}, that of our encoders is GELU")
    if any(isinstance(part, nn.Conv2d) and part.dilation != (1, 1) for part in parts.values()):
        raise WeightsError("its convolutions are dilated, those of our encoders are not")
    eps = {part.eps for part in parts.values() if isinstance(part, nn.LayerNorm)}
    if len(eps) > 1 or (kind == "ConvNeXt" and eps != {1e-6}):
        said = ", ".join(map(str, eps)) or "none"
        raise WeightsError(f"its norms have eps {said}, those of our encoders have one, or 1e-6")
    pool = model.head.global_pool.pool_type if kind in _STAGED else model.global_pool
    if is_vit and hasattr(model, "head_dist"):
        pool = "token"
    elif is_vit and model.pool_include_prefix:
        pool = "prefix"
    return Facts(
        heads=model.blocks[0].attn.num_heads if is_vit else None, eps=next(iter(eps), None),
        gelu=_ACTIVATIONS[acts.pop()] if len(acts) == 1 else None, pool=pool_said(pool),
        tokens_norm=model.cls_attn_blocks[0].tokens_norm if kind == "Xcit" else None,
    )  # fmt: skip


def read(part: Part) -> Read:
    """As it is, with what a family of timm's calls otherwise renamed."""
    tensors, left_out = without_derived(part.tensors)
    return Read(under_our_names(tensors), facts_beside(part), left_out)


register(Layout("timm", "timm", lambda part: True, read, fallback=True))
