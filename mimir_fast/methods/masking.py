"""Which patches a step sees: the draws of a masked method, by counters.

Kept apart from the methods so that a test can put in draws of its own. A mask hides whole units: the model's
patches, or larger squares of them (SimMIM hides 32 × 32 pixels of 16 × 16 patches).
Shapes: B images, N patches, K kept, M masked.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mimir_fast.models.masked_model import MaskedModel
from mimir_fast.ops.random_masks import TokenOrder, random_masks
from mimir_fast.philox import Stream


@dataclass
class Mask:
    """ids_keep (B, K) and ids_masked (B, M), int64; `masked` is what is predicted, all of the others or a share."""

    keep: Tensor
    masked: Tensor


def num_keep(num_patches: int, mask_ratio: float) -> int:
    """int(N·(1 − mask_ratio)), as MAE counts.

    Raises:
        ValueError: nothing would stay visible, or nothing would be masked.
    """
    keep = int(num_patches * (1 - mask_ratio))
    if not 0 < keep < num_patches:
        raise ValueError(
            f"mask_ratio={mask_ratio} leaves {keep} of {num_patches} patches visible; "
            f"wanted a ratio between {1 / num_patches:.3f} and {1 - 1 / num_patches:.3f}"
        )
    return keep


def unit_factor(mask_unit: int | None, patch_size: int, image_size: int) -> int:
    """Patches a side of a unit of `mask_unit` pixels; 1 for None.

    Raises:
        ValueError: the unit is no multiple of the patch, or does not tile the image.
    """
    if mask_unit is None:
        return 1
    if mask_unit % patch_size or image_size % mask_unit:
        fits = [u for u in range(patch_size, image_size, patch_size) if image_size % u == 0]
        raise ValueError(
            f"mask_unit={mask_unit} must be a multiple of the patch ({patch_size} pixels) and tile the image "
            f"({image_size}): {', '.join(map(str, fits)) or 'take smaller patches'} would do"
        )
    return mask_unit // patch_size


def draw_mask(
    model: MaskedModel, samples_B: Tensor, mask_ratio: float, *, seed: int, step: int | Tensor, stream: Stream,
    order: TokenOrder, mask_unit: int | None = None,
) -> Mask:  # fmt: skip
    """The mask of this (seed, step, sample) in this stream, in the model's patches."""
    factor = unit_factor(mask_unit, model.patch_size, model.encoder.image_size)
    num_units = model.num_patches // factor**2
    keep, masked = random_masks(
        samples_B, num_units, num_keep(num_units, mask_ratio), seed=seed, step=step, stream=stream, order=order
    )
    if factor == 1:
        return Mask(keep, masked)
    keep, masked = (patches_of_units(ids, factor, model.encoder.grid) for ids in (keep, masked))
    return Mask(keep.sort(dim=1).values if order == "sorted" else keep, masked.sort(dim=1).values)


# The stream that draws which of a mask's patches are predicted.
SHARES = {Stream.MASK: Stream.DECODE, Stream.ATTACK_MASK: Stream.ATTACK_DECODE}


def draw_share(mask: Mask, samples_B: Tensor, ratio: float, *, seed: int, step: int | Tensor, stream: Stream) -> Mask:
    """The mask with a random share of its masked patches, of (seed, step, sample): at least one (CrossMAE, §3.2)."""
    if ratio == 1:
        return mask
    num_masked = mask.masked.shape[1]
    chosen, _ = random_masks(
        samples_B, num_masked, max(1, round(ratio * num_masked)), seed=seed, step=step, stream=stream, order="sorted"
    )
    return Mask(mask.keep, mask.masked.gather(1, chosen))


def check_decode_ratio(model: MaskedModel, ratio: float) -> None:
    """Raises ValueError where a share of the masked patches cannot be predicted without the others."""
    if ratio < 1 and not model.decodes_parts:
        raise ValueError(
            f"decode_ratio={ratio:g} needs a decoder that takes any set of patches, but {type(model.decoder).__name__} "
            "works on the whole grid: use 1, or another --model.family (vit, cait, convstem, swin) or --model.decoder"
        )


def patches_of_units(ids_BU: Tensor, factor: int, grid: int) -> Tensor:
    """(B, U·factor²) numbers of the patches inside the units `ids_BU`, of a grid × grid image."""
    units = grid // factor
    inside = torch.arange(factor, device=ids_BU.device)
    offsets = (inside[:, None] * grid + inside[None, :]).flatten()
    first = ids_BU // units * (factor * grid) + ids_BU % units * factor
    return (first.unsqueeze(-1) + offsets).flatten(1)
