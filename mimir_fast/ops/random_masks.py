"""Random masks of a masked autoencoder, as a function of (seed, stream, step, sample).

MAE keeps the patches with the smallest of N random draws (arXiv 2111.06377, §3). Here the draws are Philox words, so
the mask of a sample is the same on CPU and CUDA, on one rank or eight, before and after a resume.

Shapes: B samples, N patches, K kept, M = N − K masked.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from mimir_fast import _native
from mimir_fast.ops import _checks
from mimir_fast.ops._dispatch import runs_native, runs_triton
from mimir_fast.ops._op import register_op
from mimir_fast.philox import Stream, random_bits, signed_seed, steps_of

TokenOrder = Literal["shuffled", "sorted"]


def random_masks_reference(
    samples_B: Tensor, num_patches: int, num_keep: int, seed: int, step: int | Tensor, stream: int, order: TokenOrder
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
    step: int | Tensor,
    stream: int = Stream.MASK,
    order: TokenOrder = "sorted",
) -> tuple[Tensor, Tensor]:
    """Which patches are visible and which are masked.

    Args:
        samples_B: (B,) int64, global sample indices.
        num_patches: N, at most 65,536.
        num_keep: K, 1 ≤ K ≤ N.
        step: one number, or a (B,) tensor when the samples of a batch are at different steps.
        order: `sorted` lists the kept patches in raster order, `shuffled` in the order of their draws (the authors').
    Returns:
        ids_keep (B, K) and ids_masked (B, N − K), int64, ids_masked ascending.
    Raises:
        ValueError: num_keep or num_patches out of range, an unknown order.    TypeError: samples_B is not int64.
    """
    if not 1 <= num_keep <= num_patches <= 65536:
        raise ValueError(
            f"num_keep and num_patches must be 1 <= num_keep <= num_patches <= 65536, got {num_keep} and {num_patches}"
        )
    _checks.check_choice("order", order, get_args(TokenOrder))
    _checks.check_index_dtype("samples_B", samples_B)
    steps = steps_of(step, samples_B)
    return _random_masks(samples_B, steps, num_patches, num_keep, signed_seed(seed), int(stream), order == "shuffled")


def _definition(
    samples_B: Tensor, steps_B: Tensor, num_patches: int, num_keep: int, seed: int, stream: int, shuffled: bool
) -> tuple[Tensor, Tensor]:
    order: TokenOrder = "shuffled" if shuffled else "sorted"
    return random_masks_reference(samples_B, num_patches, num_keep, seed, steps_B, stream, order)


@register_op("random_masks", _definition)
def _random_masks(
    samples_B: Tensor, steps_B: Tensor, num_patches: int, num_keep: int, seed: int, stream: int, shuffled: bool
) -> tuple[Tensor, Tensor]:
    samples, steps = samples_B.contiguous(), steps_B.contiguous()
    if runs_triton(samples):
        from mimir_kernels import random_masks as kernels

        if num_patches <= kernels.MAX_PATCHES:
            return kernels.random_masks(samples, steps, num_patches, num_keep, seed, stream, shuffled)
    elif runs_native("random_masks", samples, dtype=None):
        keep, masked = (samples.new_empty((len(samples), count)) for count in (num_keep, num_patches - num_keep))
        _native.run(
            "random_masks",
            samples,
            steps,
            keep,
            masked,
            len(samples),
            num_patches,
            num_keep,
            seed % 2**64,
            stream,
            shuffled,
        )
        return keep, masked
    return _definition(samples, steps, num_patches, num_keep, seed, stream, shuffled)


@_random_masks.register_fake
def _(
    samples_B: Tensor, steps_B: Tensor, num_patches: int, num_keep: int, seed: int, stream: int, shuffled: bool
) -> tuple[Tensor, Tensor]:
    B = len(samples_B)
    return samples_B.new_empty((B, num_keep)), samples_B.new_empty((B, num_patches - num_keep))
