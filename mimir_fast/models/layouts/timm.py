"""timm's names, which are those of ViT, DeiT and most repositories; plain encoders of any writer.

What timm says of a model beside its tensors stands in the hub's config.json (`pretrained_cfg`), or in the `args` of its
training script.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mimir_fast.checkpoints.reading import WeightsError
from mimir_fast.models.beside import HEAD
from mimir_fast.models.facts import Facts, facts_of_args, numbers, size_said
from mimir_fast.models.families import under_our_names
from mimir_fast.models.layouts import Layout, Read, register
from mimir_fast.models.parts import Part

DERIVED = (".relative_position_index", ".attn_mask", ".relative_coords_table")
COMPUTED = "computed from the sizes"
_POOLS: dict[str, Literal["avg", "cls"]] = {"avg": "avg", "token": "cls"}
_GELUS: dict[str, Literal["erf", "tanh", "quick"]] = {"GELU": "erf", "GELUTanh": "tanh", "QuickGELU": "quick"}
_CLASSES = {"ConvNeXt", "SwinTransformer", "Cait", "Xcit", "ConVit"}


def without_derived(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, what was left out and why): tables that older versions wrote beside the weights."""
    left_out = {name: COMPUTED for name in tensors if name.endswith(DERIVED)}
    return {name: tensor for name, tensor in tensors.items() if name not in left_out}, left_out


def facts_beside(part: Part) -> Facts:
    """From `pretrained_cfg`, timm's class, our export's header and the training script's options, as far as there."""
    config, settings, args = (part.beside.get(name) for name in ("config", "pretrained_cfg", "args"))
    options = args if isinstance(args, dict) else vars(args) if hasattr(args, "__dict__") else {}
    width = part.tensors["cls_token"].shape[-1] if "cls_token" in part.tensors else None
    name = options.get("model") or part.beside.get("arch")
    of_class = _facts_of_name(name, options.get("model_kwargs"), part.tensors)
    said = Facts()
    # A config.json may lie beside a file it says nothing of.
    if settings is None and isinstance(config, dict) and width in (None, config.get("num_features", width)):
        settings, arguments = config.get("pretrained_cfg"), config.get("model_args")
        of_class = _facts_of_name(config.get("architecture"), arguments, part.tensors)
        heads = arguments.get("num_heads") if isinstance(arguments, dict) else None
        said = Facts(pool=_POOLS.get(str(config.get("global_pool"))), heads=heads if isinstance(heads, int) else None)
    if isinstance(settings, dict):
        said = replace(
            said,
            mean=numbers(settings.get("mean")),
            std=numbers(settings.get("std")),
            image_size=size_said(settings.get("input_size")),
        )
    return _facts_of_export(part.beside.get("metadata") or {}).over(said).over(of_class).over(facts_of_args(args))


def _facts_of_export(metadata: Mapping[str, str]) -> Facts:
    """From the arguments and the code of timm's class, in the header of a file that our export wrote."""
    try:
        arguments = dict(json.loads(metadata["timm"]))
        size = json.loads(metadata.get("image_size", "null")) or arguments.get("img_size")
    except (KeyError, ValueError, TypeError):
        return Facts()
    heads, eps = arguments.get("num_heads"), re.search(r"eps=([\d.e+-]+\d)", metadata.get("code", ""))
    return Facts(
        heads=heads if isinstance(heads, int) else None,
        eps=float(eps[1]) if eps else None,
        gelu={None: "erf", "gelu_tanh": "tanh", "quick_gelu": "quick"}.get(arguments.get("act_layer")),  # type: ignore[arg-type]
        pool=_POOLS.get(str(arguments.get("global_pool"))),
        image_size=size_said(size),
    )


def _facts_of_name(name: Any, arguments: Any, tensors: Mapping[str, Tensor]) -> Facts:
    """Of timm's model of that name, built without memory; nothing where timm has none, or one of other shapes.

    Raises:
        WeightsError: see `facts_of_model`.
    """
    known = dict(arguments) if isinstance(arguments, dict) else {}
    # A file must not make timm download, open another file, or build without end.
    known = {n: v for n, v in known.items() if not n.startswith(("pretrained", "checkpoint", "cache"))}
    if not isinstance(name, str) or any(isinstance(value, int) and value > 2**14 for value in known.values()):
        return Facts()
    try:
        import timm

        if not timm.is_model(name):
            return Facts()
        with torch.device("meta"):
            model: Any = timm.create_model(name, **known)
        own = model.state_dict()
    except Exception:  # no timm, another package's name or arguments: timm raises anything
        return Facts()
    free = ("head", "pos_embed")
    same = [own[n].shape == t.shape for n, t in tensors.items() if n in own and not n.startswith(free)]
    return facts_of_model(model) if same and all(same) else Facts()


def facts_of_model(model: Any) -> Facts:
    """Of a live model of timm, which shows what its tensors do not; nothing of classes that no family of ours has.

    Raises:
        WeightsError: the tensors of one of ours and another function: `ResPostBlock` in a ViT, ReLU, dilation.
    """
    kind, parts = type(model).__name__, dict(model.named_modules())
    is_vit = kind.startswith("VisionTransformer")
    if not is_vit and kind not in _CLASSES:
        return Facts()
    if is_vit and (block := type(model.blocks[0]).__name__) != "Block":
        raise WeightsError(f"its blocks are timm's {block}, which no encoder of ours computes, whatever their tensors")
    acts = {type(part).__name__ for name, part in parts.items() if name.endswith("mlp.act")}
    if foreign := acts - _GELUS.keys():
        raise WeightsError(f"its activation is {', '.join(foreign)}, that of our encoders is GELU")
    if any(isinstance(part, nn.Conv2d) and part.dilation != (1, 1) for part in parts.values()):
        raise WeightsError("its convolutions are dilated, those of our encoders are not")
    eps = {part.eps for part in parts.values() if isinstance(part, nn.LayerNorm)}
    if len(eps) > 1 or (kind == "ConvNeXt" and eps != {1e-6}):
        raise WeightsError(f"its norms have eps {', '.join(map(str, eps))}, those of our encoders have one, or 1e-6")
    return Facts(
        heads=model.blocks[0].attn.num_heads if is_vit else None, eps=next(iter(eps), None),
        gelu=_GELUS[acts.pop()] if len(acts) == 1 else None,
    )  # fmt: skip


def read(part: Part) -> Read:
    """As it is, with what a family of timm's calls otherwise renamed."""
    tensors, left_out = without_derived(part.tensors)
    config: Any = part.beside.get("config")
    pool = str(config.get("global_pool", "avg")) if isinstance(config, dict) and "architecture" in config else "avg"
    if pool not in (*_POOLS, ""):
        heads = {name: f"{HEAD} on the tokens' {pool}" for name in tensors if name.startswith("head.")}
        left_out |= heads
        tensors = {name: tensor for name, tensor in tensors.items() if name not in heads}
    return Read(under_our_names(tensors), facts_beside(part), left_out)


register(Layout("timm", "timm", lambda part: True, read, fallback=True))
