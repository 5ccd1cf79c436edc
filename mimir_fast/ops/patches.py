"""Images to patches and back, picking the visible ones on the way.

Pixel order inside a patch is (row, column, channel), channel fastest, as in MAE and MIMIR; uint8 images become float
in [0, 1]. Shapes: B images, C channels, N = (H/p)·(W/p) patches of P = p·p·C numbers, K kept, M masked, D channels.
"""

import torch
from torch import Tensor


def patchify(images_BCHW: Tensor, patch_size: int) -> Tensor:
    """(B, N, P) patches in raster order; uint8 is scaled to [0, 1] float32.

    Raises:
        ValueError: the image size is not divisible by the patch size.
    """
    B, C, H, W = images_BCHW.shape
    p = patch_size
    if H % p or W % p:
        raise ValueError(f"image size {H}x{W} is not divisible by patch_size={p}: choose a divisor, or resize")
    patches = images_BCHW.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1).reshape(B, -1, p * p * C)
    return patches.float() / 255 if patches.dtype == torch.uint8 else patches


def unpatchify(patches_BNP: Tensor, patch_size: int, height: int | None = None) -> Tensor:
    """(B, C, H, W) images, the inverse of `patchify`. `height` in pixels is needed only when images are not square."""
    B, N, P = patches_BNP.shape
    p = patch_size
    rows = round(N**0.5) if height is None else height // p
    if rows * (N // rows) != N or P % (p * p):
        raise ValueError(f"{N} patches of {P} numbers are no grid of {p}x{p} patches (pass height= for non-square)")
    x = patches_BNP.reshape(B, rows, N // rows, p, p, P // (p * p))
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, rows * p, N // rows * p)


def gather_patches_reference(x_BND: Tensor, ids_BK: Tensor) -> Tensor:
    """The definition of `gather_patches`; every kernel is tested against it."""
    return torch.gather(x_BND, 1, ids_BK.unsqueeze(-1).expand(-1, -1, x_BND.shape[-1]))


def gather_patches(x_BND: Tensor, ids_BK: Tensor) -> Tensor:
    """y[b, k, :] = x[b, ids[b, k], :]. The ids of one image are distinct."""
    return gather_patches_reference(x_BND, ids_BK)


def patchify_gather_reference(images_BCHW: Tensor, ids_BK: Tensor, patch_size: int) -> Tensor:
    """The definition of `patchify_gather`."""
    return gather_patches_reference(patchify(images_BCHW, patch_size), ids_BK)


def patchify_gather(images_BCHW: Tensor, ids_BK: Tensor, patch_size: int) -> Tensor:
    """(B, K, P) float: only the patches named by `ids_BK` (B, K) are read and converted."""
    return patchify_gather_reference(images_BCHW, ids_BK, patch_size)


def scatter_patches_reference(
    visible_BKD: Tensor, ids_keep_BK: Tensor, mask_token_D: Tensor, pos_embed_ND: Tensor
) -> Tensor:
    """The definition of `scatter_patches`."""
    B, _, D = visible_BKD.shape
    full = mask_token_D.to(visible_BKD.dtype).expand(B, pos_embed_ND.shape[0], D)
    full = full.scatter(1, ids_keep_BK.unsqueeze(-1).expand(-1, -1, D), visible_BKD)
    return full + pos_embed_ND.to(full.dtype)


def scatter_patches(visible_BKD: Tensor, ids_keep_BK: Tensor, mask_token_D: Tensor, pos_embed_ND: Tensor) -> Tensor:
    """The decoder's input (B, N, D): visible tokens in their places, the mask token elsewhere, plus positions."""
    return scatter_patches_reference(visible_BKD, ids_keep_BK, mask_token_D, pos_embed_ND)


def masked_targets_reference(
    images_BCHW: Tensor, ids_BM: Tensor, patch_size: int, norm_pix: bool, eps: float = 1e-6
) -> Tensor:
    """The definition of `masked_targets`."""
    target = patchify_gather_reference(images_BCHW, ids_BM, patch_size)
    return normalize_patches(target, eps) if norm_pix else target


def normalize_patches(patches_BMP: Tensor, eps: float = 1e-6) -> Tensor:
    """Each patch to zero mean and unit (unbiased) variance, + eps under the root (MAE's `norm_pix_loss`)."""
    mean = patches_BMP.mean(dim=-1, keepdim=True)
    var = patches_BMP.var(dim=-1, keepdim=True)
    return (patches_BMP - mean) / (var + eps).sqrt()


def masked_targets(images_BCHW: Tensor, ids_BM: Tensor, patch_size: int, *, norm_pix: bool = True) -> Tensor:
    """(B, M, P) float targets of the reconstruction at the patches `ids_BM`, normalised per patch on demand."""
    return masked_targets_reference(images_BCHW, ids_BM, patch_size, norm_pix)
