"""Images to patches and back, reading only the wanted ones on the way.

Pixel order inside a patch is (row, column, channel), channel fastest, as in MAE and MIMIR; uint8 images become float
in [0, 1]. Shapes: B images, C channels, N = (H/p)·(W/p) patches of P = p·p·C numbers, K kept, M masked.

`patchify_gather` is linear and `unpatchify_visible`, its adjoint, an op too, so derivatives of any order exist.
`masked_targets` is `patchify_gather` with a normalisation on the way. The ops on tokens are in `tokens.py`.
"""

import torch
from torch import Tensor

from mimir_fast import _native
from mimir_fast.ops import _checks
from mimir_fast.ops._dispatch import runs_native, runs_triton
from mimir_fast.ops._op import register_op
from mimir_fast.ops.tokens import (
    gather_patches,
    gather_patches_reference,
    place_patches,
    place_patches_reference,
    scatter_patches,
    scatter_patches_reference,
)

__all__ = [
    "as_images",
    "every_patch",
    "gather_patches",
    "gather_patches_reference",
    "masked_targets",
    "masked_targets_reference",
    "normalize_patches",
    "patchify",
    "patchify_gather",
    "patchify_gather_reference",
    "place_patches",
    "scatter_patches",
    "scatter_patches_reference",
    "unpatchify",
    "unpatchify_visible",
]


NORM_EPS = 1e-6
"""Added to a patch's variance before the root is taken (MAE)."""


def patchify(images_BCHW: Tensor, patch_size: int) -> Tensor:
    """(B, N, P) patches in raster order; uint8 is scaled to [0, 1] float32.

    Raises:
        ValueError: the image size is not divisible by the patch size.
    """
    B, C, H, W = images_BCHW.shape
    p = patch_size
    _check_size(H, W, p)
    x = images_BCHW.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1)
    patches = x.reshape(B, H // p * (W // p), p * p * C)
    return patches.float().div_(255) if patches.dtype == torch.uint8 else patches


def unpatchify(patches_BNP: Tensor, patch_size: int, height: int | None = None) -> Tensor:
    """(B, C, H, W) images, the inverse of `patchify`. `height` in pixels is needed only when images are not square.

    Raises:
        ValueError: the patches form no such grid.
    """
    B, N, P = patches_BNP.shape
    p = patch_size
    rows = round(int(N) ** 0.5) if height is None else height // p  # int: a tensor under torch.jit.trace
    if rows < 1 or N % rows or P % (p * p) or (height is None and rows * rows != N):
        raise ValueError(f"{N} patches of {P} numbers are no grid of {p}x{p} patches (pass height= for non-square)")
    x = patches_BNP.reshape(B, rows, N // rows, p, p, P // (p * p))
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, P // (p * p), rows * p, N // rows * p)


def every_patch(images_BCHW: Tensor, patch_size: int) -> Tensor:
    """(B, N) int64, a view: the numbers of all patches, in raster order."""
    B, _, H, W = images_BCHW.shape
    N = (H // patch_size) * (W // patch_size)
    return torch.arange(N, device=images_BCHW.device).expand(B, N)


def as_images(patches_BNP: Tensor) -> Tensor:
    """(B, P, N, 1), a view: patches as images whose pixels are patches, for what reads images with patch_size=1."""
    return patches_BNP.transpose(1, 2).unsqueeze(-1)


def unpatchify_visible_reference(
    patches_BKP: Tensor, ids_BK: Tensor, patch_size: int, height: int, width: int
) -> Tensor:
    """The definition of `unpatchify_visible`."""
    num_patches = height // patch_size * (width // patch_size)
    return unpatchify(place_patches_reference(patches_BKP, ids_BK, num_patches), patch_size, height)


def unpatchify_visible(patches_BKP: Tensor, ids_BK: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """(B, C, H, W) images with the patches in the places `ids_BK`, zero elsewhere: the adjoint of `patchify_gather`.

    Raises:
        ValueError: sizes or devices do not fit, ids out of range or repeated (on CUDA: with MIMIR_FAST_DEBUG=1).
        TypeError: ids are not int64.
    """
    _checks.check_tensors(patches=patches_BKP, ids=ids_BK)
    if patches_BKP.ndim != 3 or patches_BKP.shape[:2] != ids_BK.shape or patches_BKP.shape[2] % patch_size**2:
        raise ValueError(
            f"patches must be (B, K, P) with ids (B, K) and P a multiple of {patch_size}², "
            f"got {tuple(patches_BKP.shape)} and {tuple(ids_BK.shape)}"
        )
    _check_size(height, width, patch_size)
    _checks.check_ids_of("ids", ids_BK, patches_BKP)
    return _unpatchify_visible(patches_BKP, ids_BK, patch_size, height, width)


def patchify_gather_reference(images_BCHW: Tensor, ids_BK: Tensor, patch_size: int) -> Tensor:
    """The definition of `patchify_gather`; every kernel is tested against it."""
    return gather_patches_reference(patchify(images_BCHW, patch_size), ids_BK)


def patchify_gather(images_BCHW: Tensor, ids_BK: Tensor, patch_size: int) -> Tensor:
    """(B, K, P): only the patches named by `ids_BK` (B, K) are read and converted.

    Args:
        images_BCHW: uint8 (the result is float32 in [0, 1]) or float (the result has its dtype), any memory format.
        ids_BK: int64, distinct within an image.
    Raises:
        ValueError: sizes or devices do not fit, ids out of range or repeated (on CUDA: with MIMIR_FAST_DEBUG=1).
        TypeError: images of another integer dtype, or ids that are not int64.
    """
    check_images(images_BCHW, ids_BK, patch_size)
    return _patchify_gather(images_BCHW, ids_BK, patch_size, None)


def normalize_patches(patches_BMP: Tensor, eps: float = NORM_EPS) -> Tensor:
    """Each patch to zero mean and unit (unbiased) variance, + eps under the root (MAE's `norm_pix_loss`)."""
    mean = patches_BMP.mean(dim=-1, keepdim=True)
    var = patches_BMP.var(dim=-1, keepdim=True)
    return (patches_BMP - mean) / (var + eps).sqrt()


def masked_targets_reference(
    images_BCHW: Tensor, ids_BM: Tensor, patch_size: int, norm_pix: bool, eps: float = NORM_EPS
) -> Tensor:
    """The definition of `masked_targets`."""
    target = patchify_gather_reference(images_BCHW, ids_BM, patch_size)
    return normalize_patches(target, eps) if norm_pix else target


def masked_targets(images_BCHW: Tensor, ids_BM: Tensor, patch_size: int, *, norm_pix: bool = True) -> Tensor:
    """(B, M, P) targets of the reconstruction at the patches `ids_BM`, normalised per patch on demand.

    One pass over the masked pixels; differentiable in float images. Arguments and errors as for `patchify_gather`.
    """
    check_targets(images_BCHW, ids_BM, patch_size, norm_pix)
    return _patchify_gather(images_BCHW, ids_BM, patch_size, NORM_EPS if norm_pix else None)


def _check_size(height: int, width: int, patch_size: int) -> None:
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(f"image size {height}x{width} is not divisible by {patch_size=}: choose a divisor, or resize")


def check_targets(images_BCHW: Tensor, ids_BM: Tensor, patch_size: int, norm_pix: bool) -> None:
    """What `check_images` refuses, and patches that cannot be normalised."""
    check_images(images_BCHW, ids_BM, patch_size)
    if norm_pix and patch_size**2 * images_BCHW.shape[1] < 2:
        raise ValueError("a patch of one number has no variance: use norm_pix=False or a larger patch_size")


def check_images(images_BCHW: Tensor, ids_BK: Tensor, patch_size: int) -> None:
    """Raises ValueError or TypeError unless these are images in such patches, and int64 ids (B, K) of theirs."""
    _checks.check_tensors(images=images_BCHW)
    if images_BCHW.ndim != 4:
        raise ValueError(f"images must be (B, C, H, W), got {tuple(images_BCHW.shape)}")
    if images_BCHW.dtype != torch.uint8 and not images_BCHW.is_floating_point():
        raise TypeError(f"images must be uint8 or floating point, got {images_BCHW.dtype}: use images.to(torch.uint8)")
    _check_size(images_BCHW.shape[2], images_BCHW.shape[3], patch_size)
    _checks.check_ids_of("ids", ids_BK, images_BCHW)


def _new_patches(images: Tensor, ids: Tensor, patch_size: int) -> Tensor:
    dtype = torch.float32 if images.dtype == torch.uint8 else images.dtype
    return images.new_empty((*ids.shape, patch_size**2 * images.shape[1]), dtype=dtype)


def _definition(images_BCHW: Tensor, ids_BK: Tensor, patch_size: int, norm_eps: float | None) -> Tensor:
    eps = 0.0 if norm_eps is None else norm_eps
    return masked_targets_reference(images_BCHW, ids_BK, patch_size, norm_eps is not None, eps)


@register_op("patchify_gather", _definition)
def _patchify_gather(images_BCHW: Tensor, ids_BK: Tensor, patch_size: int, norm_eps: float | None) -> Tensor:
    """The patches, normalised if `norm_eps` is given: `patchify_gather` and `masked_targets` are one op."""
    _, C, H, W = images_BCHW.shape
    columns = W // patch_size
    _checks.check_ids("ids", ids_BK, H // patch_size * columns)
    ids, is_uint8 = ids_BK.contiguous(), images_BCHW.dtype == torch.uint8
    norm, eps = norm_eps is not None, norm_eps or 0.0
    if runs_triton(images_BCHW):
        from mimir_kernels import patches as kernels

        out = _new_patches(images_BCHW, ids, patch_size)
        kernels.patchify_gather(images_BCHW, ids, out, patch_size, norm, eps)
        return out
    if runs_native("patchify_gather", images_BCHW, dtype=torch.uint8 if is_uint8 else torch.float32):
        out = _new_patches(images_BCHW, ids, patch_size)
        layout = (C, patch_size, columns, images_BCHW.stride())
        _native.run("patchify_gather", images_BCHW, ids, out, *ids.shape, *layout, is_uint8, norm, eps)
        return out
    return _definition(images_BCHW, ids, patch_size, norm_eps)


@_patchify_gather.register_fake
def _(images_BCHW: Tensor, ids_BK: Tensor, patch_size: int, norm_eps: float | None) -> Tensor:
    return _new_patches(images_BCHW, ids_BK, patch_size)


@register_op("unpatchify_visible", unpatchify_visible_reference)
def _unpatchify_visible(patches_BKP: Tensor, ids_BK: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    _checks.check_ids("ids", ids_BK, height // patch_size * (width // patch_size))
    patches, ids, p = patches_BKP.contiguous(), ids_BK.contiguous(), patch_size
    B, K, P = patches.shape
    if runs_triton(patches, any_dtype=True):
        from mimir_kernels import patches as kernels

        images = patches.new_zeros((B, P // p**2, height, width))
        kernels.unpatchify_visible(patches, ids, images, p)
        return images
    if runs_native("unpatchify_visible", patches):
        images = patches.new_zeros((B, P // p**2, height, width))
        layout = (P // p**2, p, width // p, images.stride())
        _native.run("unpatchify_visible", patches, ids, images, B, K, *layout)
        return images
    return unpatchify_visible_reference(patches, ids, p, height, width)


@_unpatchify_visible.register_fake
def _(patches_BKP: Tensor, ids_BK: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    B, _, P = patches_BKP.shape
    return patches_BKP.new_empty((B, P // patch_size**2, height, width))


def _gather_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    images, ids, ctx.patch_size, ctx.norm_eps = inputs
    ctx.size = images.shape[2:]
    ctx.save_for_backward(ids, *([] if ctx.norm_eps is None else [images]))


def _gather_backward(ctx, grad_BKP: Tensor):  # type: ignore[no-untyped-def]
    ids, *images = ctx.saved_tensors
    if images:
        patches = _patchify_gather(images[0], ids, ctx.patch_size, None)
        grad_BKP = _through_normalisation(grad_BKP, patches, ctx.norm_eps)
    return _unpatchify_visible(grad_BKP, ids, ctx.patch_size, *ctx.size), None, None, None


def _through_normalisation(grad_BMP: Tensor, x_BMP: Tensor, eps: float) -> Tensor:
    """With y = (x − mean)/s: dx = (g − mean(g) − y·⟨g, y⟩/(P − 1))/s, from operations that can be derived again."""
    centred = x_BMP - x_BMP.mean(-1, keepdim=True)
    s = (x_BMP.var(-1, keepdim=True) + eps).sqrt()
    y = centred / s
    along = (grad_BMP * y).sum(-1, keepdim=True) / (x_BMP.shape[-1] - 1)
    return (grad_BMP - grad_BMP.mean(-1, keepdim=True) - y * along) / s


def _visible_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, ids, ctx.patch_size, _, _ = inputs
    ctx.save_for_backward(ids)


def _visible_backward(ctx, grad_BCHW: Tensor):  # type: ignore[no-untyped-def]
    return _patchify_gather(grad_BCHW, ctx.saved_tensors[0], ctx.patch_size, None), None, None, None, None


_patchify_gather.register_autograd(_gather_backward, setup_context=_gather_context)
_unpatchify_visible.register_autograd(_visible_backward, setup_context=_visible_context)
