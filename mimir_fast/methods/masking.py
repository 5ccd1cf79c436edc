"""Which patches a step sees, and where its attack starts: all draws of a pre-training step, by counters.

Kept apart from the methods so that a test can put in draws of its own.
Shapes: B images, N patches, K kept, M masked, P numbers a patch.
"""

from dataclasses import dataclass

from torch import Tensor

from mimir_fast.ops.random_masks import TokenOrder, random_masks
from mimir_fast.philox import Stream


@dataclass
class Mask:
    """ids_keep (B, K) and ids_masked (B, M), int64."""

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


def draw_mask(
    samples_B: Tensor, num_patches: int, mask_ratio: float, *, seed: int, step: int, stream: Stream, order: TokenOrder
) -> Mask:
    """The mask of this (seed, step, sample) in this stream."""
    keep, masked = random_masks(
        samples_B, num_patches, num_keep(num_patches, mask_ratio), seed=seed, step=step, stream=stream, order=order
    )
    return Mask(keep, masked)
