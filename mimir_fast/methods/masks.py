"""What a mask may be: how many patches it keeps, in which units, and how much of it is predicted.

A mask hides whole units: the model's patches, or larger squares of them (SimMIM hides 32 × 32 pixels of 16 × 16
patches). Shapes: B images, N patches, K kept, M masked.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mimir_fast.methods.registry import Objective
from mimir_fast.models.masked_model import MaskedModel
from mimir_fast.ops.random_masks import TokenOrder, random_masks
from mimir_fast.philox import Stream
from mimir_fast.sizes import Size, area, divided, divides, height_width, typed
from mimir_fast.validation import check_number


@dataclass
class MaskConfig(Objective):
    """What is masked, and what of it is predicted."""

    mask_ratio: float = 0.75
    """Fraction of the patches that is masked."""
    mask_unit: int | None = None
    """Side in pixels of what is masked as a whole, a multiple of the patch; None: the patch. SimMIM: 32."""
    decode_ratio: float = 1.0
    """Share of the masked patches that is predicted and paid for, drawn anew in each step; the decoder sees no mask
    tokens in the other places, and an attack maximises the error of this share. CrossMAE: 0.25."""

    def __post_init__(self) -> None:
        check_number("mask_ratio", self.mask_ratio, above=0, below=1, hint="a fraction between 0 and 1, such as 0.75")
        if self.mask_unit is not None:
            check_number("mask_unit", self.mask_unit, at_least=1, hint="a multiple of the patch in pixels, such as 32")
        check_number("decode_ratio", self.decode_ratio, above=0, at_most=1)

    def units(self, patch_size: int, image_size: Size) -> tuple[int, int, int]:
        """Patches a side of a unit, N units of an image, and how many stay visible: int(N·(1 − mask_ratio)), as in MAE.

        Raises:
            ValueError: `mask_unit` does not fit the patch or the image; nothing would be visible, or nothing masked.
        """
        unit, ratio = self.mask_unit or patch_size, self.mask_ratio
        if unit % patch_size or not divides(unit, image_size):
            short = min(height_width(image_size))
            fits = [u for u in range(patch_size, short, patch_size) if divides(u, image_size)]
            raise ValueError(
                f"mask_unit={unit} must be a multiple of the patch ({patch_size} pixels) and tile the image "
                f"({typed(image_size)}): {', '.join(map(str, fits)) or 'take smaller patches'} would do"
            )
        num_units = area(divided(image_size, unit))
        keep = int(num_units * (1 - ratio))
        if not 0 < keep < num_units:
            raise ValueError(
                f"mask_ratio={ratio} leaves {keep} of {num_units} patches visible; "
                f"wanted a ratio between {1 / num_units:.3f} and {1 - 1 / num_units:.3f}"
            )
        return unit // patch_size, num_units, keep

    def draw(
        self, model: MaskedModel, samples_B: Tensor, *, seed: int, step: int | Tensor, stream: Stream = Stream.MASK,
        order: TokenOrder = "sorted",
    ) -> "Mask":  # fmt: skip
        """Masks of these samples, functions of (seed, step, sample, stream); a share is predicted (CrossMAE, §3.2)."""
        random, grid = partial(random_masks, samples_B, seed=seed, step=step), model.encoder.grid
        factor, num_units, num_keep = self.units(model.patch_size, model.encoder.image_size)
        keep, masked = random(num_units, num_keep, stream=stream, order=order)
        if factor > 1:
            keep, masked = (patches_of_units(ids, factor, grid) for ids in (keep, masked))
            keep, masked = keep.sort(dim=1).values if order == "sorted" else keep, masked.sort(dim=1).values
        if self.decode_ratio < 1:
            share = Stream.DECODE if stream == Stream.MASK else Stream.ATTACK_DECODE
            num_masked = masked.shape[1]
            chosen, _ = random(num_masked, max(1, round(self.decode_ratio * num_masked)), stream=share)
            masked = masked.gather(1, chosen)
        return Mask(keep, masked)


class Mask(NamedTuple):
    """(B, K) and (B, M) int64 patch numbers; `masked` is what is predicted: all that is not kept, or a share of it."""

    keep: Tensor
    masked: Tensor


def patches_of_units(ids_BU: Tensor, factor: int, grid: Size) -> Tensor:
    """(B, U·factor²) numbers of the patches inside the units `ids_BU`, of an image of that grid of patches."""
    _, columns = height_width(grid)
    units = columns // factor
    inside = torch.arange(factor, device=ids_BU.device)
    offsets = (inside[:, None] * columns + inside[None, :]).flatten()
    first = ids_BU // units * (factor * columns) + ids_BU % units * factor
    return (first.unsqueeze(-1) + offsets).flatten(1)


def check_decode_ratio(model: MaskedModel, ratio: float) -> None:
    """Raises ValueError where a share of the masked patches cannot be predicted without the others."""
    if ratio < 1 and not model.decodes_parts:
        raise ValueError(
            f"decode_ratio={ratio:g} needs a decoder that takes any set of patches, but {type(model.decoder).__name__} "
            "works on the whole grid: use 1, or another --model.family (vit, cait, convstem, swin) or --model.decoder"
        )
