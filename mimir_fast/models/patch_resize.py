"""The patch projection for another patch size: FlexiViT's pseudo-inverse resize (arXiv 2212.08013, §3.4), as timm's.

A patch of p × p pixels, enlarged to q × q, should give the token it gave before: ⟨x, w⟩ = ⟨Bx, ŵ⟩ with the bicubic
resize B. So ŵ = (Bᵀ)⁺ w: exact where patches grow, the least squares over all x where they shrink.
timm's `resample_patch_embed` is this function; it is not called for the sake of what importing timm costs.
"""

import functools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

# A projection is the whole of a patch's embedding only where it is one convolution: ViT, ConViT, CaiT, Swin, ConvNeXt.
PROJECTIONS = ("patch_embed.proj.weight", "stem.0.weight")


def resize_patches(weight_DCpp: Tensor, patch_size: int) -> Tensor:
    """(D, C, q, q): the kernels of a patch projection for patches of q = `patch_size` pixels, in their own dtype."""
    old = weight_DCpp.shape[-1]
    if old == patch_size:
        return weight_DCpp
    rows = weight_DCpp.float().flatten(2) @ _inverse(old, patch_size).T
    return rows.unflatten(2, (patch_size, patch_size)).to(weight_DCpp.dtype)


def with_patches_of(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], list[str]]:
    """The tensors, with the patch projection resized to a model's, and `name (shape) -> (shape)` of what was.

    Args:
        own: the model's tensors, under the names of files.
    """
    for name in PROJECTIONS:
        old, new = tensors.get(name), own.get(name)
        if old is None or new is None or old.ndim != 4 or old.shape[:2] != new.shape[:2]:
            continue
        if old.shape != new.shape and old.shape[2] == old.shape[3]:
            changed = f"{name} {tuple(old.shape)} -> {tuple(new.shape)}"
            return {**tensors, name: resize_patches(old, new.shape[-1])}, [changed]
    return tensors, []


@functools.cache
def _inverse(old: int, new: int) -> Tensor:
    """(new², old²): (Bᵀ)⁺ of the resize B from old × old to new × new pixels."""
    basis = torch.eye(old**2).view(old**2, 1, old, old)
    resize = F.interpolate(basis, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
    return torch.linalg.pinv(resize.flatten(1))
