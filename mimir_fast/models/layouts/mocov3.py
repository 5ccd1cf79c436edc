"""MoCo v3 (arXiv 2104.02057): `base_encoder` and `momentum_encoder`, a projector in place of the head.

Its ViT-S has 12 heads where DeiT's of the same shapes has 6 (App. of the paper; `vits.py` of facebookresearch/moco-v3).
"""

from mimir_fast.models.facts import Facts
from mimir_fast.models.layouts import Layout, Read, register
from mimir_fast.models.parts import Part

HINT = "MoCo v3 trains on images normalised by ImageNet's mean and std: --model.normalization imagenet"


def recognise(part: Part) -> bool:
    """By the names of its two encoders."""
    return bool({"base_encoder", "momentum_encoder"} & set(part.path))


def read(part: Part) -> Read:
    """The names are timm's; the projector stands where the head is."""
    left_out = {name: "MoCo's projector" for name in part.tensors if name.startswith("head.") and name.count(".") > 1}
    tensors = {name: tensor for name, tensor in part.tensors.items() if name not in left_out}
    small = "cls_token" in tensors and tensors["cls_token"].shape[-1] == 384
    return Read(tensors, Facts(heads=12 if small else None), left_out, HINT)


register(Layout("mocov3", "MoCo v3", recognise, read))
