"""timm's names, which are those of ViT, DeiT and most repositories; plain encoders of any writer.

What timm says of a model beside its tensors stands in the hub's config.json (`pretrained_cfg`), or in the `args` of its
training script.
"""

import json
from dataclasses import replace
from typing import Any, Literal

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
    """From `pretrained_cfg` and the training script's options, where they are there."""
    config: Any = part.beside.get("config")
    settings = part.beside.get("pretrained_cfg")
    width = part.tensors["cls_token"].shape[-1] if "cls_token" in part.tensors else None
    # A config.json may lie beside a file it says nothing of.
    arguments: Any = {}
    pool = None
    if settings is None and isinstance(config, dict) and width in (None, config.get("num_features", width)):
        settings, arguments = config.get("pretrained_cfg"), config.get("model_args")
        pool = _POOLS.get(str(config.get("global_pool")))
    said = Facts(pool=pool)
    if isinstance(settings, dict):
        said = replace(
            said,
            mean=numbers(settings.get("mean")),
            std=numbers(settings.get("std")),
            image_size=size_said(settings.get("input_size")),
        )
    try:  # the arguments of timm's class, in a file that our export wrote
        written = dict(json.loads((part.beside.get("metadata") or {})["timm"]))
    except (KeyError, ValueError, TypeError):
        written = {}
    heads = written.get("num_heads", arguments.get("num_heads") if isinstance(arguments, dict) else None)
    ours = Facts(heads=heads if isinstance(heads, int) else None, image_size=size_said(written.get("img_size")))
    return ours.over(said).over(facts_of_args(part.beside.get("args")))


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
