"""Tokens with their positions, behind the cls token: the input of an encoder in one pass.

    out[b, t] = (prefix[t] for t < F, else tokens[b, t − F]) + positions[ids[b, t]]

Without ids row t gets position t.
Shapes: B images, K tokens each, F rows in front of them (a cls token or none), T = F + K, R positions, D width.
"""

from typing import Any

import torch
from torch import Tensor

from mimir_fast import _native
from mimir_fast.ops import _checks
from mimir_fast.ops._dispatch import runs_native, runs_triton
from mimir_fast.ops._op import register_op
from mimir_fast.ops.tokens import dense_rows, place_patches


def add_positions_reference(
    tokens_BKD: Tensor, ids_BT: Tensor | None, positions_RD: Tensor, prefix_FD: Tensor
) -> Tensor:
    """The definition of `add_positions`; every kernel is tested against it."""
    prefix = prefix_FD.to(tokens_BKD.dtype).expand(tokens_BKD.shape[0], -1, -1)
    positions = positions_RD.to(tokens_BKD.dtype)
    return torch.cat([prefix, tokens_BKD], dim=1) + (positions if ids_BT is None else positions[ids_BT])


def behind_prefix(ids_BK: Tensor, num_prefix: int) -> Tensor:
    """(B, F + K): 0 … F − 1, then the ids moved up by F: rows of what has F rows in front of its patches."""
    if not num_prefix:
        return ids_BK
    first = torch.arange(num_prefix, device=ids_BK.device).expand(ids_BK.shape[0], -1)
    return torch.cat([first, ids_BK + num_prefix], dim=1)


def add_positions(
    tokens_BKD: Tensor, ids_BT: Tensor | None, positions_RD: Tensor, prefix_FD: Tensor | None = None
) -> Tensor:
    """(B, F + K, D) of the tokens' dtype, to which positions and prefix are cast; differentiable in all three.

    Args:
        tokens_BKD: floating.
        ids_BT: int64, which position each row gets, those of the prefix first (`behind_prefix`), distinct in an image;
            None: row t of F + K gets position t of as many.
        positions_RD: table of positions.
        prefix_FD: rows in front of the tokens, the same for all images; None for none.
    Raises:
        ValueError: shapes or devices do not fit, ids out of range or repeated (on CUDA: with MIMIR_FAST_DEBUG=1).
        TypeError: an integer dtype, or ids that are not int64.
    """
    _checks.check_tensors(tokens=tokens_BKD, positions=positions_RD)
    if tokens_BKD.ndim != 3:
        raise ValueError(f"tokens must be (B, K, D), got {tuple(tokens_BKD.shape)}")
    dtype, D = tokens_BKD.dtype, tokens_BKD.shape[2]
    prefix = tokens_BKD.new_empty(0, D) if prefix_FD is None else prefix_FD
    if positions_RD.ndim != 2 or positions_RD.shape[1] != D or prefix.ndim != 2 or prefix.shape[1] != D:
        raise ValueError(
            f"for tokens of {D} numbers positions must be (R, {D}) and prefix (F, {D}), "
            f"got {tuple(positions_RD.shape)} and {tuple(prefix.shape)}"
        )
    if ids_BT is not None:
        _checks.check_ids_of("ids", ids_BT, tokens_BKD)
    given = len(positions_RD) if ids_BT is None else ids_BT.shape[1]
    if given != len(prefix) + tokens_BKD.shape[1]:
        name = "rows of positions" if ids_BT is None else "ids of an image"
        raise ValueError(f"{name} must be {len(prefix)} + {tokens_BKD.shape[1]}, for prefix and tokens, got {given}")
    _checks.check_same_device(tokens=tokens_BKD, positions=positions_RD, prefix=prefix)
    _checks.check_floating(tokens=tokens_BKD, positions=positions_RD, prefix=prefix)
    return _add_positions(tokens_BKD, ids_BT, positions_RD.to(dtype), prefix.to(dtype))


@register_op("add_positions", add_positions_reference)
def _add_positions(tokens_BKD: Tensor, ids_BT: Tensor | None, positions_RD: Tensor, prefix_FD: Tensor) -> Tensor:
    if ids_BT is not None:
        _checks.check_ids("ids", ids_BT, len(positions_RD))
    tokens, ids = dense_rows(tokens_BKD), None if ids_BT is None else ids_BT.contiguous()
    positions, prefix = positions_RD.contiguous(), prefix_FD.contiguous()
    out = _empty_rows(tokens, prefix)
    if runs_triton(tokens, any_dtype=True):
        from mimir_kernels import tokens as kernels

        kernels.add_positions(tokens, ids, positions, prefix, out)
        return out
    is_bf16, size = tokens.dtype == torch.bfloat16, tokens.element_size()
    if runs_native("add_positions", tokens, positions, dtype=torch.bfloat16 if is_bf16 else torch.float32):
        strides = size * tokens.stride(0), size * tokens.stride(1)
        B, T, D = out.shape
        _native.run("add_positions", tokens, ids, positions, prefix, out, B, T, len(prefix), D, *strides, is_bf16)
        return out
    return add_positions_reference(tokens, ids, positions, prefix)


@_add_positions.register_fake
def _(tokens_BKD: Tensor, ids_BT: Tensor | None, positions_RD: Tensor, prefix_FD: Tensor) -> Tensor:
    return _empty_rows(tokens_BKD, prefix_FD)


def _empty_rows(tokens: Tensor, prefix: Tensor) -> Tensor:
    B, K, D = tokens.shape
    return tokens.new_empty((B, len(prefix) + K, D))


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    _, ids, positions, prefix = inputs
    ctx.num_positions, ctx.num_prefix = len(positions), len(prefix)
    ctx.has_ids = ids is not None
    ctx.save_for_backward(*([ids] if ids is not None else []))


def _backward(ctx: Any, grad_BTD: Tensor) -> tuple[Tensor | None, ...]:
    needs_tokens, _, needs_positions, needs_prefix = ctx.needs_input_grad
    F = ctx.num_prefix
    # Placed and then summed: no two threads add to the same row, so the bits are the same every time.
    placed = grad_BTD
    if needs_positions and ctx.has_ids:
        placed = place_patches(grad_BTD, ctx.saved_tensors[0], ctx.num_positions)
    return (
        grad_BTD.narrow(1, F, grad_BTD.shape[1] - F)
        if needs_tokens
        else None,  # [:, 0:] would be an alias, which has no rule for stacked gradients
        None,
        placed.sum(0) if needs_positions else None,
        grad_BTD[:, :F].sum(0) if needs_prefix else None,
    )


_add_positions.register_autograd(_backward, setup_context=_save_for_backward)
