"""Kernels of a transformer's linear layers in float32 on the CPU.

The products are a library's (MKL, or oneDNN where that is faster); what stands around them takes one pass over memory
each (csrc/fp32_layers.cpp). A residual with the bias lies in the result before the product is added to it, and the
first bias of an mlp is added on the way into GELU. For the backward pass the rows' statistics and the hidden layer
before GELU are kept, nothing that can be had from them and x in one pass; gradients that nobody wants are not
computed.
The interface is `Kernels` of definitions.py. Shapes: x (…, K), r and y (…, N), W (N, K); of the mlp: W₁ (H, K),
W₂ (K, H). M rows in all.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from mimir_fast import _native
from mimir_fast.layers.definitions import Grads, Kept, MlpWeights, Norm, plain_float32
from mimir_fast.ops._products import multiply, multiply_add

NAME = "fp32"
_NATIVE = _native.has("fp32_gelu")
_BLOCK = 32  # rows whose sums are taken first, as in csrc/fp32_layers.cpp
_PIECE = 2**21  # numbers of the hidden layer that are worked on at once, beside the whole that is kept


def takes(x: Tensor, residual: Tensor | None, *parameters: Tensor | None) -> bool:
    """See Kernels: plain float32 on the CPU, outside of autocast."""
    tensors = (x, residual, *parameters)
    return (
        _NATIVE
        and plain_float32(*tensors)
        and all(t is None or (t.is_cpu and t.numel() > 0) for t in tensors)
        and not torch.is_autocast_enabled("cpu")
    )


def precision() -> AbstractContextManager[object]:
    """See Kernels: nothing to do."""
    return nullcontext()


def linear_forward(
    x: Tensor, norm: Norm | None, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Kept]:
    """See Kernels; keeps mean and 1/deviation of each row, if there is a norm."""
    rows, statistics = _rows(x), None
    if norm is not None:
        rows, statistics = _normalised(rows, norm)
    if residual is None:
        out = multiply(rows, weight, bias)
    else:
        out = multiply_add(_with_bias(_rows(residual), bias), rows, weight)
    return out.view(*x.shape[:-1], -1), (statistics,)


def linear_backward(
    grad: Tensor, x: Tensor, norm: Norm | None, weight: Tensor, kept: Kept, needs: Sequence[bool],
    along: Tensor | None = None,
) -> Grads:  # fmt: skip
    """See Kernels: normalised rows are computed again where the weight's gradient needs them."""
    grads: Grads = [None] * 5
    grad_MN, x_MK, (statistics,) = _rows(grad), _rows(x), kept
    if needs[3]:
        rows = x_MK if norm is None else _normalised(x_MK, norm, statistics)[0]
        grads[3] = multiply(grad_MN.t(), rows.t())
    if needs[4]:
        grads[4] = grad_MN.sum(0)
    if any(needs[:3]):
        to_rows = multiply(grad_MN, weight.t())
        if norm is not None and statistics is not None:
            along_MK = None if along is None else _rows(along)
            grads[1:3] = _through_norm(to_rows, x_MK, norm, statistics, along_MK, any(needs[1:3]))
        grads[0] = to_rows.view(x.shape)
    return grads


def mlp_forward(x: Tensor, norm: Norm, weights: MlpWeights, *, residual: bool, keep: bool) -> tuple[Tensor, Kept]:
    """See Kernels; keeps the hidden numbers before GELU (M, H) and the rows' statistics (M, 2)."""
    rows, w = _rows(x), weights
    normed, statistics = _normalised(rows, norm)
    out = _with_bias(rows, w.bias2) if residual else w.bias2.repeat(len(rows), 1)
    hidden = multiply(normed, w.weight1) if keep else None
    for piece in _pieces(len(rows), len(w.weight1)):
        before = multiply(normed[piece], w.weight1) if hidden is None else hidden[piece]
        activated = before if hidden is None else _passing(before.shape)
        _native.run("fp32_gelu", before, w.bias1, activated, *before.shape)
        multiply_add(out[piece], activated, w.weight2)
    return out.view(x.shape), (hidden, statistics)


def mlp_backward(
    grad: Tensor, x: Tensor, norm: Norm, weights: MlpWeights, kept: Kept, *, residual: bool, needs: Sequence[bool]
) -> Grads:
    """See Kernels: some rows at a time, from the hidden numbers before GELU."""
    weight1, bias1, weight2, _ = weights
    hidden_MH, statistics = kept
    assert hidden_MH is not None and statistics is not None
    grads: Grads = [None] * 7
    grad_MK, x_MK = _rows(grad), _rows(x)
    wants = any(needs[3:6])
    normed = _normalised(x_MK, norm, statistics)[0] if wants else None
    to_weight1, to_weight2 = (torch.empty_like(w) if wants else None for w in (weight1, weight2))
    sums = _block_sums(hidden_MH) if wants else None
    to_x = torch.empty_like(x_MK) if any(needs[:3]) else None
    for piece in _pieces(*hidden_MH.shape):
        hidden, grad_piece = hidden_MH[piece], grad_MK[piece]
        to_hidden = multiply(grad_piece, weight2.t(), out=_passing(hidden.shape))
        activated = _passing(hidden.shape) if wants else None
        sums_piece = None if sums is None else sums[piece.start // _BLOCK :]
        _native.run("fp32_gelu_backward", hidden, bias1, to_hidden, activated, sums_piece, *hidden.shape)
        if normed is not None and activated is not None and to_weight1 is not None and to_weight2 is not None:
            multiply_add(to_weight2, grad_piece.t(), activated.t(), first=piece.start == 0)
            multiply_add(to_weight1, to_hidden.t(), normed[piece].t(), first=piece.start == 0)
        if to_x is not None:
            multiply(to_hidden, weight1.t(), out=to_x[piece])
    if sums is not None:
        grads[3:6] = [to_weight1, sums.sum(0), to_weight2]
    if needs[6]:
        grads[6] = grad_MK.sum(0)
    if to_x is not None:
        grads[1:3] = _through_norm(to_x, x_MK, norm, statistics, grad_MK if residual else None, any(needs[1:3]))
        grads[0] = to_x.view(x.shape)
    return grads


# The parts.


def _rows(x: Tensor) -> Tensor:
    """(M, K), dense."""
    return x.reshape(-1, x.shape[-1]).contiguous()


def _passing(shape: torch.Size) -> Tensor:
    """Memory that is given back soon; a little more than asked for.

    glibc takes a freed piece for an aligned tensor only if it is larger, and what comes next is often a tensor of the
    same size, to be kept. Without it a step of ViT-T/2 has 70 MiB more in holes.
    """
    return torch.empty(shape.numel() + 64)[: shape.numel()].view(shape)


def _pieces(rows: int, hidden: int) -> list[slice]:
    """Rows in whole blocks, so that little memory is needed beside the hidden layer itself."""
    step = max(1, _PIECE // hidden // _BLOCK) * _BLOCK
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _with_bias(residual_MN: Tensor, bias: Tensor | None) -> Tensor:
    return residual_MN.clone() if bias is None else residual_MN + bias


def _normalised(x_MK: Tensor, norm: Norm, statistics_M2: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Normalised rows, and the mean and 1/deviation of each, which may be known."""
    out, known = _passing(x_MK.shape), statistics_M2 is not None
    statistics = x_MK.new_empty((len(x_MK), 2)) if statistics_M2 is None else statistics_M2
    _native.run("fp32_norm", x_MK, *norm, known, statistics, out, *x_MK.shape)
    return out, statistics


def _through_norm(
    grad_MK: Tensor, x_MK: Tensor, norm: Norm, statistics_M2: Tensor, along_MK: Tensor | None, wants: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Makes of the normalised rows' gradient that of x, plus `along`; returns those of gamma and beta if wanted."""
    sums = _block_sums(x_MK, 2) if wants else None
    _native.run("fp32_norm_backward", x_MK, norm.weight, statistics_M2, along_MK, grad_MK, sums, *x_MK.shape)
    if sums is None:
        return None, None
    to_gamma, to_beta = sums.sum(0)
    return to_gamma, to_beta


def _block_sums(like_MN: Tensor, count: int = 1) -> Tensor:
    """Room for sums over blocks of rows: so that the number of threads does not matter."""
    M, N = like_MN.shape
    return like_MN.new_empty((-(-M // _BLOCK), count, N) if count > 1 else (-(-M // _BLOCK), N))
