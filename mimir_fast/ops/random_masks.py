"""Random masks of a masked autoencoder, as a function of (seed, stream, step, sample).

MAE keeps the patches with the smallest of N random draws (arXiv 2111.06377, §3). Here the draws are Philox words, so
the mask of a sample is the same on CPU and CUDA, on one rank or eight, before and after a resume.

Shapes: B samples, N patches, K kept, M = N − K masked.
"""

from typing import Literal

import torch
from torch import Tensor

from mimir_fast.philox import Stream, random_bits

TokenOrder = Literal["shuffled", "sorted"]


def random_masks_reference(
    samples_B: Tensor, num_patches: int, num_keep: int, seed: int, step: int, stream: int, order: TokenOrder
) -> tuple[Tensor, Tensor]:
    """The definition; every kernel is tested against it."""
    bits = random_bits(seed, stream, step, samples_B, num_patches)
    # The patch number in the low bits makes all keys distinct: ties break the same way on every device.
    keys = (bits << 16) | torch.arange(num_patches, device=bits.device)
    ids = keys.sort(dim=1).values & 0xFFFF
    return _split(ids, num_keep, order)


def masks_from_noise(noise_BN: Tensor, num_keep: int, order: TokenOrder = "shuffled") -> tuple[Tensor, Tensor]:
    """(ids_keep (B, K), ids_masked (B, M)) for given draws: the kept patches have the smallest ones."""
    return _split(noise_BN.argsort(dim=1, stable=True), num_keep, order)


def _split(ids: Tensor, num_keep: int, order: TokenOrder) -> tuple[Tensor, Tensor]:
    keep, masked = ids[:, :num_keep], ids[:, num_keep:]
    # The order of the masked patches carries no meaning; ascending is kinder to memory.
    masked = masked.sort(dim=1).values
    return (keep.sort(dim=1).values if order == "sorted" else keep.contiguous()), masked


def random_masks(
    samples_B: Tensor,
    num_patches: int,
    num_keep: int,
    *,
    seed: int,
    step: int,
    stream: int = Stream.MASK,
    order: TokenOrder = "sorted",
) -> tuple[Tensor, Tensor]:
    """Which patches are visible and which are masked.

    Args:
        samples_B: (B,) int64, global sample indices.
        num_patches: N, at most 65,536.
        num_keep: K, 1 ≤ K ≤ N.
        order: `sorted` lists the kept patches in raster order, `shuffled` in the order of their draws (the authors').
    Returns:
        ids_keep (B, K) and ids_masked (B, N − K), int64, ids_masked ascending.
    Raises:
        ValueError: num_keep or num_patches out of range.
    """
    if not 1 <= num_keep <= num_patches <= 65536:
        raise ValueError(f"wanted 1 <= num_keep <= num_patches <= 65536, got num_keep={num_keep}, {num_patches=}")
    return random_masks_reference(samples_B, num_patches, num_keep, seed, int(step), int(stream), order)
