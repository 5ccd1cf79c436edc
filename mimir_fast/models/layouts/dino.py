"""DINO, iBOT (arXiv 2104.14294, 2111.07832): teacher and student side by side, each with a projection head."""

from mimir_fast.models.facts import facts_of_args
from mimir_fast.models.layouts import Layout, Read, register
from mimir_fast.models.parts import Part

HINT = "DINO's own weights were trained on images normalised by ImageNet's mean and std: --model.normalization imagenet"


def recognise(part: Part) -> bool:
    """A backbone beside the projection head of DINO."""
    return any(name.startswith(("head.last_layer.", "head.mlp.")) for name in part.siblings)


def read(part: Part) -> Read:
    """The names are timm's."""
    left_out = {name: "the mask token" for name in part.tensors if name == "masked_embed"}
    tensors = {name: tensor for name, tensor in part.tensors.items() if name not in left_out}
    return Read(tensors, facts_of_args(part.beside.get("args")), left_out, HINT)


register(Layout("dino", "DINO", recognise, read))
