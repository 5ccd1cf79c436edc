"""Where a perturbation starts: uniform noise around the clean patches, a function of (seed, step, sample).

Shapes: B images, K of their patches, P numbers a patch.
"""

from typing import NamedTuple

from torch import Tensor

from mimir_fast.ops.noisy_patches import noisy_patches
from mimir_fast.ops.patches import patchify_gather
from mimir_fast.ops.random_uniform import random_uniform
from mimir_fast.philox import Stream


class UniformNoise(NamedTuple):
    """Uniform in [-eps, eps]: not the numbers, but what they are a function of. They are drawn where they are added."""

    samples_B: Tensor
    seed: int
    step: int | Tensor
    eps: float

    def numbers(self, num_patches: int, patch_dim: int) -> Tensor:
        """(B, K, P): the noise itself, for whoever adds it in another way."""
        draws = random_uniform(self.seed, Stream.ATTACK_START, self.step, self.samples_B, num_patches * patch_dim)
        return (2 * draws - 1).mul_(self.eps).view(len(draws), num_patches, patch_dim)


def start_of(
    images_BCHW: Tensor, ids_BK: Tensor, patch_size: int, delta: UniformNoise | Tensor | None
) -> tuple[Tensor, Tensor]:
    """The clean patches and where an attack on them starts, in [0, 1]: (B, K, P) each.

    Args:
        delta: noise, or the perturbation (B, K, P) itself; None starts at the clean patches.
    """
    if isinstance(delta, UniformNoise):
        return noisy_patches(
            images_BCHW, ids_BK, patch_size, delta.samples_B, seed=delta.seed, step=delta.step, eps=delta.eps
        )
    clean = patchify_gather(images_BCHW, ids_BK, patch_size)
    return clean, clean if delta is None else (clean + delta).clamp_(0, 1)
