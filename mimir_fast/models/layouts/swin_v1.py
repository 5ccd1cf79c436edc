"""Swin as Microsoft's repository, SimMIM and timm up to 0.6 write it: merging stands at the end of a stage.

timm has it at the start of the next one. Beside the weights stand tables that follow from the sizes. SimMIM's decoder
is one convolution.
"""

import re

from mimir_fast.models.facts import facts_of_args
from mimir_fast.models.families import under_our_names
from mimir_fast.models.layouts import Layout, Read, register
from mimir_fast.models.layouts.timm import without_derived
from mimir_fast.models.parts import Part

_MERGING = re.compile(r"layers\.(\d+)\.downsample\.")


def recognise(part: Part) -> bool:
    """A merging in the first stage."""
    return "layers.0.downsample.reduction.weight" in part.tensors


def read(part: Part) -> Read:
    """The merging of each stage becomes the next one's."""
    tensors, left_out = without_derived(part.tensors)
    moved = {_MERGING.sub(lambda m: f"layers.{int(m[1]) + 1}.downsample.", name): t for name, t in tensors.items()}
    if moved.pop("mask_token", None) is not None:
        left_out["mask_token"] = "the mask token"
    return Read(under_our_names(moved), facts_of_args(part.beside.get("args")), left_out)


register(Layout("swin_v1", "Swin (Microsoft, SimMIM, timm 0.6)", recognise, read))
