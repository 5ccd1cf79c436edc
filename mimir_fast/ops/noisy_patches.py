"""Patches of images and, beside them, where an attack starts: the same with uniform noise, in one pass.

    clean = patches(images)[ids]        noisy = clamp(clean + ε·(2u − 1), 0, 1)      u: Philox numbers of the sample

Pixels are read once and noise never lies in memory; the numbers are those of `random_uniform`, bit for bit. Who needs
the noisy ones only calls `only_noisy_patches`, which takes half the memory.
Shapes: B images, N = (H/p)·(W/p) patches of P = p·p·C numbers, K taken.
"""

import torch
from torch import Tensor

from mimir_fast import _native, philox
from mimir_fast.ops import _checks
from mimir_fast.ops._dispatch import runs_native, runs_triton
from mimir_fast.ops._op import register_op
from mimir_fast.ops.ball import within
from mimir_fast.ops.patches import check_images, patchify_gather_reference
from mimir_fast.philox import Stream, signed_seed, steps_of


def noisy_patches_reference(
    images_BCHW: Tensor,
    ids_BK: Tensor,
    patch_size: int,
    samples_B: Tensor,
    seed: int,
    step: int | Tensor,
    eps: float,
    stream: int = Stream.ATTACK_START,
) -> tuple[Tensor, Tensor]:
    """The definition of `noisy_patches`; every kernel is tested against it."""
    clean = patchify_gather_reference(images_BCHW, ids_BK, patch_size)
    numbers = philox.uniform(seed, stream, step, samples_B, clean.shape[1] * clean.shape[2])
    noise = (2 * numbers - 1).mul_(eps).view(clean.shape)
    return clean, within(clean + noise.to(clean.dtype), clean, eps, 0, 1)


def noisy_patches(
    images_BCHW: Tensor,
    ids_BK: Tensor,
    patch_size: int,
    samples_B: Tensor,
    *,
    seed: int,
    step: int | Tensor,
    eps: float,
    stream: int = Stream.ATTACK_START,
) -> tuple[Tensor, Tensor]:
    """The clean patches and the noisy ones, (B, K, P) each; no gradient flows to the images.

    Args:
        images_BCHW: uint8 (the results are float32 in [0, 1]) or float (the results have its dtype), any memory format.
        ids_BK: int64, distinct within an image.
        samples_B: (B,) int64 global sample indices: number i of an image's K·P is number i of its sample.
        step: one number or a (B,) tensor; another step is another noise.
        eps: radius of the noise, 0 ≤ eps ≤ 1.
    Raises:
        ValueError: sizes or devices do not fit, eps out of range, ids out of range or repeated or pixels outside of
            [0, 1] (on CUDA: with MIMIR_FAST_DEBUG=1).
        TypeError: wrong dtypes.
    """
    return _checked(images_BCHW, ids_BK, patch_size, samples_B, seed, step, eps, stream, with_clean=True)


def only_noisy_patches(
    images_BCHW: Tensor,
    ids_BK: Tensor,
    patch_size: int,
    samples_B: Tensor,
    *,
    seed: int,
    step: int | Tensor,
    eps: float,
    stream: int = Stream.ATTACK_START,
) -> Tensor:
    """The noisy patches of `noisy_patches` (B, K, P), bit for bit; arguments and errors are the same."""
    return _checked(images_BCHW, ids_BK, patch_size, samples_B, seed, step, eps, stream, with_clean=False)[1]


def _checked(
    images_BCHW: Tensor, ids_BK: Tensor, patch_size: int, samples_B: Tensor, seed: int, step: int | Tensor, eps: float,
    stream: int, *, with_clean: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_images(images_BCHW, ids_BK, patch_size)
    _checks.check_index_dtype("samples_B", samples_B)
    _checks.check_same_device(images=images_BCHW, samples_B=samples_B)
    _checks.check_eps(eps, images_BCHW.shape, (0.0, 1.0))
    if samples_B.shape != images_BCHW.shape[:1]:
        raise ValueError(f"samples_B must be ({len(images_BCHW)},), one for each image, got {tuple(samples_B.shape)}")
    steps = steps_of(step, samples_B)
    return _noisy_patches(
        images_BCHW, ids_BK, samples_B, steps, patch_size, signed_seed(seed), int(stream), float(eps), with_clean
    )


def _definition(
    images_BCHW: Tensor, ids_BK: Tensor, samples_B: Tensor, steps_B: Tensor, patch_size: int, seed: int, stream: int,
    eps: float, with_clean: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    clean, noisy = noisy_patches_reference(images_BCHW, ids_BK, patch_size, samples_B, seed, steps_B, eps, stream)
    return clean if with_clean else clean.new_empty(0), noisy


@register_op("noisy_patches", _definition)
def _noisy_patches(
    images_BCHW: Tensor, ids_BK: Tensor, samples_B: Tensor, steps_B: Tensor, patch_size: int, seed: int, stream: int,
    eps: float, with_clean: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Without the clean patches these are an empty tensor."""
    _, C, H, W = images_BCHW.shape
    columns = W // patch_size
    _checks.check_ids("ids", ids_BK, H // patch_size * columns)
    ids, samples, steps = ids_BK.contiguous(), samples_B.contiguous(), steps_B.contiguous()
    clean, noisy = _empty_pair(images_BCHW, ids, patch_size, with_clean)
    to = clean if with_clean else None
    is_uint8 = images_BCHW.dtype == torch.uint8
    if not is_uint8:
        _checks.check_in_range("images", images_BCHW, 0, 1)
    if runs_triton(images_BCHW):
        from mimir_kernels import noisy_patches as kernels

        kernels.noisy_patches(images_BCHW, ids, samples, steps, to, noisy, patch_size, seed, stream, eps)
        return clean, noisy
    if runs_native("noisy_patches", images_BCHW, dtype=torch.uint8 if is_uint8 else torch.float32):
        _native.run(
            *("noisy_patches", images_BCHW, ids, samples, steps, to, noisy, *ids.shape, C, patch_size, columns),
            *(images_BCHW.stride(), is_uint8, seed % 2**64, stream, eps),
        )
        return clean, noisy
    return _definition(images_BCHW, ids, samples, steps, patch_size, seed, stream, eps, with_clean)


@_noisy_patches.register_fake
def _(
    images_BCHW: Tensor, ids_BK: Tensor, samples_B: Tensor, steps_B: Tensor, patch_size: int, seed: int, stream: int,
    eps: float, with_clean: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _empty_pair(images_BCHW, ids_BK, patch_size, with_clean)


def _empty_pair(images: Tensor, ids: Tensor, patch_size: int, with_clean: bool) -> tuple[Tensor, Tensor]:
    dtype = torch.float32 if images.dtype == torch.uint8 else images.dtype
    shape = (*ids.shape, patch_size**2 * images.shape[1])
    return images.new_empty(shape if with_clean else (0,), dtype=dtype), images.new_empty(shape, dtype=dtype)
