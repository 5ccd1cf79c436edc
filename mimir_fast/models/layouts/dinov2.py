"""DINOv2 (arXiv 2304.07193): LayerScale, registers, a position for the cls token that timm adds to the token itself.

Its training code cuts the blocks into chunks (`blocks.0.0.…`).
"""

import re

from torch import Tensor

from mimir_fast.models.facts import facts_of_args
from mimir_fast.models.layouts import Layout, Read, register
from mimir_fast.models.layouts.dino import HINT
from mimir_fast.models.parts import Part

_CHUNKED = re.compile(r"blocks\.\d+\.(\d+)\.")


def recognise(part: Part) -> bool:
    """Registers under its name, or its mask token beside LayerScale; ours with LayerScale has a decoder, too."""
    names = part.tensors
    scaled = "mask_token" in names and "blocks.0.ls1.gamma" in names and "decoder_pred.weight" not in names
    return scaled or "register_tokens" in names or any(map(_CHUNKED.match, names))


def rename_registers(tensors: dict[str, Tensor]) -> None:
    """Under timm's name, in place; beside registers timm's cls token has no position, so it takes its own with it."""
    if {"register_tokens", "cls_token", "pos_embed"} <= tensors.keys():
        tensors["reg_token"] = tensors.pop("register_tokens")
        tensors["cls_token"] = tensors["cls_token"] + tensors["pos_embed"][:, :1]
        tensors["pos_embed"] = tensors["pos_embed"][:, 1:]


def read(part: Part) -> Read:
    """Under timm's names; registers have no position there, nor has the cls token beside them."""
    tensors = {_CHUNKED.sub(r"blocks.\1.", name): tensor for name, tensor in part.tensors.items()}
    left_out = {"mask_token": "the mask token"} if tensors.pop("mask_token", None) is not None else {}
    rename_registers(tensors)
    return Read(tensors, facts_of_args(part.beside.get("args")), left_out, HINT.replace("DINO's", "DINOv2's"))


register(Layout("dinov2", "DINOv2", recognise, read))
