"""Rows of tokens picked by ids, and put back among mask tokens.

    gather:   y[b, k] = x[b, ids[b, k]]
    place:    z[b, n] = v[b, k] where ids[b, k] = n, else 0      (the gather's adjoint)
    scatter:  z[b, n] = (v[b, k] where ids[b, k] = n, else mask_token) + pos_embed[n]

The ids of one image are distinct, so the adjoint of the gather is a scatter without additions (no atomics, the same
bits every time), and its adjoint is the gather: both are ops, which gives derivatives of any order.
Shapes: B images, N patches, K kept ones, D numbers in a token.
"""

import torch
from torch import Tensor

from mimir_fast import _native
from mimir_fast.ops import _checks
from mimir_fast.ops._dispatch import runs_native, runs_triton
from mimir_fast.ops._op import register_op


def gather_patches_reference(x_BND: Tensor, ids_BK: Tensor) -> Tensor:
    """The definition of `gather_patches`; every kernel is tested against it."""
    return torch.gather(x_BND, 1, ids_BK.unsqueeze(-1).expand(-1, -1, x_BND.shape[-1]))


def place_patches_reference(visible_BKD: Tensor, ids_BK: Tensor, num_patches: int) -> Tensor:
    """The definition of `place_patches`."""
    B, K, D = visible_BKD.shape
    return visible_BKD.new_zeros((B, num_patches, D)).scatter(1, ids_BK.unsqueeze(-1).expand(B, K, D), visible_BKD)


def scatter_patches_reference(
    visible_BKD: Tensor, ids_keep_BK: Tensor, mask_token_D: Tensor, pos_embed_ND: Tensor
) -> Tensor:
    """The definition of `scatter_patches`."""
    B, _, D = visible_BKD.shape
    full = mask_token_D.to(visible_BKD.dtype).expand(B, pos_embed_ND.shape[0], D)
    full = full.scatter(1, ids_keep_BK.unsqueeze(-1).expand(-1, -1, D), visible_BKD)
    return full + pos_embed_ND.to(full.dtype)


def gather_patches(x_BND: Tensor, ids_BK: Tensor) -> Tensor:
    """y[b, k, :] = x[b, ids[b, k], :] for distinct ids of each image, (B, K, D) of x's dtype.

    Raises:
        ValueError: batch sizes or devices differ, ids out of range or repeated (on CUDA: with MIMIR_FAST_DEBUG=1).
        TypeError: ids are not int64.
    """
    _checks.check_tensors(x=x_BND)
    if x_BND.ndim != 3:
        raise ValueError(f"x must be (B, N, D), got {tuple(x_BND.shape)}")
    _checks.check_ids_of("ids", ids_BK, x_BND)
    return _gather_patches(x_BND, ids_BK)


def place_patches(visible_BKD: Tensor, ids_BK: Tensor, num_patches: int) -> Tensor:
    """(B, N, D) of the rows' dtype: z[b, ids[b, k]] = v[b, k], zeros in the other places.

    Raises:
        ValueError: shapes or devices do not fit, ids out of range or repeated (on CUDA: with MIMIR_FAST_DEBUG=1).
        TypeError: ids are not int64.
    """
    _checks.check_tensors(visible=visible_BKD, ids=ids_BK)
    if visible_BKD.ndim != 3 or visible_BKD.shape[:2] != ids_BK.shape:
        raise ValueError(
            f"visible must be (B, K, D) with ids (B, K), got {tuple(visible_BKD.shape)} and {tuple(ids_BK.shape)}"
        )
    _checks.check_ids_of("ids", ids_BK, visible_BKD)
    return _place_patches(visible_BKD, ids_BK, num_patches)


def scatter_patches(visible_BKD: Tensor, ids_keep_BK: Tensor, mask_token_D: Tensor, pos_embed_ND: Tensor) -> Tensor:
    """The decoder's input (B, N, D): visible tokens in their places, the mask token elsewhere, plus positions.

    Differentiable in all three; mask token and positions are cast to the dtype of the visible tokens.

    Raises:
        ValueError: shapes or devices do not fit, ids out of range or repeated (on CUDA: with MIMIR_FAST_DEBUG=1).
        TypeError: an integer dtype, or ids that are not int64.
    """
    _checks.check_tensors(visible=visible_BKD, ids_keep=ids_keep_BK, mask_token=mask_token_D, pos_embed=pos_embed_ND)
    if visible_BKD.ndim != 3 or visible_BKD.shape[:2] != ids_keep_BK.shape:
        raise ValueError(
            f"visible must be (B, K, D) with ids_keep (B, K), "
            f"got {tuple(visible_BKD.shape)} and {tuple(ids_keep_BK.shape)}"
        )
    D = visible_BKD.shape[2]
    if mask_token_D.shape != (D,) or pos_embed_ND.ndim != 2 or pos_embed_ND.shape[1] != D:
        raise ValueError(
            f"for visible tokens of {D} numbers mask_token must be ({D},) and pos_embed (N, {D}), "
            f"got {tuple(mask_token_D.shape)} and {tuple(pos_embed_ND.shape)}"
        )
    _checks.check_ids_of("ids_keep", ids_keep_BK, visible_BKD)
    _checks.check_same_device(visible=visible_BKD, mask_token=mask_token_D, pos_embed=pos_embed_ND)
    _checks.check_floating(visible=visible_BKD, mask_token=mask_token_D, pos_embed=pos_embed_ND)
    dtype = visible_BKD.dtype
    return _scatter_patches(visible_BKD, ids_keep_BK, mask_token_D.to(dtype), pos_embed_ND.to(dtype))


def dense_rows(x: Tensor) -> Tensor:
    """x (B, N, D) itself if each row lies in one piece, as in a slice x[:, 1:]; else a copy."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


@register_op("gather_patches", gather_patches_reference)
def _gather_patches(x_BND: Tensor, ids_BK: Tensor) -> Tensor:
    _checks.check_ids("ids", ids_BK, x_BND.shape[1])
    ids = ids_BK.contiguous()
    if runs_triton(x_BND, any_dtype=True):
        from mimir_kernels import tokens as kernels

        x = dense_rows(x_BND)
        out = x.new_empty((*ids.shape, x.shape[2]))
        kernels.gather_patches(x, ids, out)
        return out
    B, N, D = x_BND.shape
    if D and x_BND.numel() and x_BND.stride()[1:] == (D, 1) and x_BND.stride(0) % D == 0:
        # Rows of one table, though x may be a slice of it such as x[:, 1:]: whole rows move faster this way than number
        # by number, and than by C++ of our own.
        step = x_BND.stride(0) // D
        table = x_BND.as_strided(((B - 1) * step + N, D), (D, 1))
        first_rows = torch.arange(B, device=ids.device) * step
        return table.index_select(0, (ids + first_rows[:, None]).flatten()).view(*ids.shape, D)
    return gather_patches_reference(x_BND, ids)


@_gather_patches.register_fake
def _(x_BND: Tensor, ids_BK: Tensor) -> Tensor:
    return x_BND.new_empty((*ids_BK.shape, x_BND.shape[2]))


@register_op("place_patches", place_patches_reference)
def _place_patches(visible_BKD: Tensor, ids_BK: Tensor, num_patches: int) -> Tensor:
    _checks.check_ids("ids", ids_BK, num_patches)
    visible, ids = visible_BKD.contiguous(), ids_BK.contiguous()
    B, K, D = visible.shape
    if runs_triton(visible, any_dtype=True):
        from mimir_kernels import tokens as kernels

        out = visible.new_empty((B, num_patches, D))
        kernels.place_patches(visible, kernels.inverse(ids, num_patches), out)
        return out
    if runs_native("place_patches", visible, dtype=None):
        out = visible.new_empty((B, num_patches, D))
        _native.run("place_patches", visible, ids, out, B, K, num_patches, D * visible.element_size())
        return out
    return place_patches_reference(visible, ids, num_patches)


@_place_patches.register_fake
def _(visible_BKD: Tensor, ids_BK: Tensor, num_patches: int) -> Tensor:
    return visible_BKD.new_empty((visible_BKD.shape[0], num_patches, visible_BKD.shape[2]))


@register_op("scatter_patches", scatter_patches_reference)
def _scatter_patches(visible_BKD: Tensor, ids_keep_BK: Tensor, mask_token_D: Tensor, pos_embed_ND: Tensor) -> Tensor:
    N, D = pos_embed_ND.shape
    _checks.check_ids("ids_keep", ids_keep_BK, N)
    visible, ids = dense_rows(visible_BKD), ids_keep_BK.contiguous()
    mask_token, pos_embed = mask_token_D.contiguous(), pos_embed_ND.contiguous()
    B, K = ids.shape
    out = visible.new_empty((B, N, D))
    if runs_triton(visible, any_dtype=True):
        from mimir_kernels import tokens as kernels

        kernels.scatter_patches(visible, kernels.inverse(ids, N), mask_token, pos_embed, out)
        return out
    is_bf16, size = visible.dtype == torch.bfloat16, visible.element_size()
    if runs_native("scatter_patches", visible, pos_embed, dtype=torch.bfloat16 if is_bf16 else torch.float32):
        strides = size * visible.stride(0), size * visible.stride(1)
        _native.run("scatter_patches", visible, ids, mask_token, pos_embed, out, B, K, N, D, *strides, is_bf16)
    else:
        return scatter_patches_reference(visible, ids, mask_token, pos_embed)
    return out


@_scatter_patches.register_fake
def _(visible_BKD: Tensor, ids_keep_BK: Tensor, mask_token_D: Tensor, pos_embed_ND: Tensor) -> Tensor:
    return visible_BKD.new_empty((visible_BKD.shape[0], *pos_embed_ND.shape))


def masked_rows_reference(ids_BK: Tensor, num_patches: int) -> Tensor:
    """(B, N) booleans: True where no id names the patch."""
    return ids_BK.new_ones((ids_BK.shape[0], num_patches), dtype=torch.bool).scatter(1, ids_BK, False)


@register_op("masked_rows", masked_rows_reference)
def _masked_rows(ids_BK: Tensor, num_patches: int) -> Tensor:
    ids = ids_BK.contiguous()
    if runs_triton(ids):
        from mimir_kernels import tokens as kernels

        return kernels.inverse(ids, num_patches) < 0
    return masked_rows_reference(ids, num_patches)


@_masked_rows.register_fake
def _(ids_BK: Tensor, num_patches: int) -> Tensor:
    return ids_BK.new_empty((len(ids_BK), num_patches), dtype=torch.bool)


def _gather_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, ids = inputs
    ctx.num_patches = x.shape[1]
    ctx.save_for_backward(ids)


def _gather_backward(ctx, grad_BKD: Tensor):  # type: ignore[no-untyped-def]
    return _place_patches(grad_BKD, ctx.saved_tensors[0], ctx.num_patches), None


def _place_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(inputs[1])


def _place_backward(ctx, grad_BND: Tensor):  # type: ignore[no-untyped-def]
    return _gather_patches(grad_BND, ctx.saved_tensors[0]), None, None


def _scatter_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(inputs[1])


def _scatter_backward(ctx, grad_BND: Tensor):  # type: ignore[no-untyped-def]
    (ids,) = ctx.saved_tensors
    needs_visible, _, needs_token, needs_pos = ctx.needs_input_grad
    grad_token = None
    if needs_token:  # one matrix-vector product instead of a copy of the masked rows
        masked = _masked_rows(ids, grad_BND.shape[1]).to(grad_BND.dtype)
        grad_token = masked.reshape(-1) @ grad_BND.reshape(-1, grad_BND.shape[2])
    return (
        _gather_patches(grad_BND, ids) if needs_visible else None,
        None,
        grad_token,
        grad_BND.sum(0) if needs_pos else None,
    )


_gather_patches.register_autograd(_gather_backward, setup_context=_gather_context)
_place_patches.register_autograd(_place_backward, setup_context=_place_context)
_scatter_patches.register_autograd(_scatter_backward, setup_context=_scatter_context)
