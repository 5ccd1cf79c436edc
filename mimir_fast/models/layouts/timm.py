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
from torch import Tensor

from mimir_fast.checkpoints.reading import WeightsError
from mimir_fast.models.facts import Facts, facts_of_args, numbers, size_said
from mimir_fast.models.families import under_our_names
from mimir_fast.models.layouts import Layout, Read, register
from mimir_fast.models.parts import Part

DERIVED = (".relative_position_index", ".attn_mask", ".relative_coords_table")
COMPUTED = "computed from the sizes"
_POOLS: dict[str, Literal["avg", "cls"]] = {"avg": "avg", "token": "cls"}


def without_derived(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, what was left out and why): tables that older versions wrote beside the weights."""
    left_out = {name: COMPUTED for name in tensors if name.endswith(DERIVED)}
    return {name: tensor for name, tensor in tensors.items() if name not in left_out}, left_out


def facts_beside(part: Part) -> Facts:
    """From `pretrained_cfg`, timm's class, our export's header and the training script's options, as far as there."""
    config, settings, args = (part.beside.get(name) for name in ("config", "pretrained_cfg", "args"))
    options = args if isinstance(args, dict) else vars(args) if hasattr(args, "__dict__") else {}
    width = part.tensors["cls_token"].shape[-1] if "cls_token" in part.tensors else None
    of_class = _facts_of_name(options.get("model") or part.beside.get("arch"), options.get("model_kwargs"), width)
    said = Facts()
    # A config.json may lie beside a file it says nothing of.
    if settings is None and isinstance(config, dict) and width in (None, config.get("num_features", width)):
        settings, arguments = config.get("pretrained_cfg"), config.get("model_args")
        of_class = _facts_of_name(config.get("architecture"), arguments, width)
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
    except (KeyError, ValueError, TypeError):
        return Facts()
    heads, eps = arguments.get("num_heads"), re.search(r"eps=([\d.e+-]+\d)", metadata.get("code", ""))
    return Facts(
        heads=heads if isinstance(heads, int) else None,
        eps=float(eps[1]) if eps else None,
        gelu={None: "erf", "gelu_tanh": "tanh", "quick_gelu": "quick"}.get(arguments.get("act_layer")),  # type: ignore[arg-type]
        pool=_POOLS.get(str(arguments.get("global_pool"))),
        image_size=size_said(arguments.get("img_size")),
    )


def _facts_of_name(name: Any, arguments: Any, width: int | None) -> Facts:
    """Of timm's model of that name, built without memory; nothing where timm has none, or one of another width.

    Raises:
        WeightsError: see `facts_of_model`.
    """
    try:
        import timm

        with torch.device("meta"):
            model: Any = timm.create_model(name, **(arguments or {}))
    except Exception:  # no timm, another package's name or arguments: timm raises anything
        return Facts()
    return facts_of_model(model) if getattr(model, "embed_dim", None) == width else Facts()


def facts_of_model(model: Any) -> Facts:
    """Of a live ViT of timm, which shows what its tensors do not; nothing of other models.

    Raises:
        WeightsError: blocks that have a plain ViT's tensors and compute another function, such as `ResPostBlock`.
    """
    if not type(model).__name__.startswith("VisionTransformer"):
        return Facts()
    block = model.blocks[0]
    if (kind := type(block).__name__) != "Block":
        raise WeightsError(f"its blocks are timm's {kind}, which no encoder of ours computes, whatever their tensors")
    gelus: dict[str, Any] = {"GELU": "erf", "GELUTanh": "tanh", "QuickGELU": "quick"}
    return Facts(
        heads=block.attn.num_heads, eps=getattr(block.norm1, "eps", None), gelu=gelus.get(type(block.mlp.act).__name__)
    )


def read(part: Part) -> Read:
    """As it is, with what a family of timm's calls otherwise renamed."""
    tensors, left_out = without_derived(part.tensors)
    return Read(under_our_names(tensors), facts_beside(part), left_out)


register(Layout("timm", "timm", lambda part: True, read, fallback=True))
