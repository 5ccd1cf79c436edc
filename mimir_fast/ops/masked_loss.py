"""The reconstruction error of a masked autoencoder, from pixels and prediction in one pass, with its gradient.

    loss = Σ (prediction − target)² / count      target: the masked patches, each normalised where asked (`patches.py`)

Neither the target nor the difference exists as a tensor: a patch is read, normalised and compared while it lies in
registers or the L1 cache, and where a gradient is wanted it is written in that moment, in the prediction's dtype. What
is left for the backward pass is one multiplication by the incoming number, and on a CPU not even that where it is 1.
Shapes: B images, M masked patches of P = p·p·C numbers.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mimir_fast import _native
from mimir_fast.ops import _checks
from mimir_fast.ops._dispatch import runs_native, runs_triton
from mimir_fast.ops._op import differentiated_again, gradients_of, register_op
from mimir_fast.ops._precision import accumulation_dtype
from mimir_fast.ops.patches import NORM_EPS, check_targets, masked_targets, masked_targets_reference

Kind = Literal["l2", "l1"]
Reduction = Literal["mean", "sum"]


def masked_loss_reference(
    prediction_BMP: Tensor,
    images_BCHW: Tensor,
    ids_BM: Tensor,
    patch_size: int,
    norm_pix: bool = True,
    kind: Kind = "l2",
    reduction: Reduction = "mean",
) -> Tensor:
    """The definition of `masked_loss`; every kernel is tested against it."""
    target = masked_targets_reference(images_BCHW, ids_BM, patch_size, norm_pix)
    return _error(prediction_BMP, target, kind, reduction)


def masked_loss(
    prediction_BMP: Tensor,
    images_BCHW: Tensor,
    ids_BM: Tensor,
    patch_size: int,
    *,
    norm_pix: bool = True,
    kind: Kind = "l2",
    reduction: Reduction = "mean",
) -> Tensor:
    """How far the predicted patches are from those of the images, a scalar.

    Args:
        prediction_BMP: (B, M, P) of any floating dtype.
        images_BCHW: (B, C, H, W), uint8 or float in [0, 1], any memory format.
        ids_BM: int64, which patches were predicted, distinct within an image.
        norm_pix: compare with patches of zero mean and unit variance each (MAE's `norm_pix_loss`).
        kind: squared (`l2`, MAE) or absolute (`l1`, SimMIM) errors.
        reduction: their `mean` or `sum`.
    Returns:
        float32 (float64 for a float64 prediction), the same bits for any number of threads; derivatives of any order.
        If the images need a gradient too, their target is made as a tensor.
    Raises:
        ValueError: sizes or devices do not fit, an unknown option, ids out of range or repeated (on CUDA: with
            MIMIR_FAST_DEBUG=1).
        TypeError: wrong dtypes.
    """
    _checks.check_choice("kind", kind, ("l2", "l1"))
    _checks.check_choice("reduction", reduction, ("mean", "sum"))
    _checks.check_floating(prediction=prediction_BMP)
    check_targets(images_BCHW, ids_BM, patch_size, norm_pix)
    _checks.check_same_device(prediction=prediction_BMP, images=images_BCHW)
    wanted = (*ids_BM.shape, patch_size**2 * images_BCHW.shape[1])
    if prediction_BMP.shape != wanted:
        raise ValueError(f"prediction must be (B, M, P) = {tuple(wanted)}, got {tuple(prediction_BMP.shape)}")
    if torch.is_grad_enabled() and images_BCHW.requires_grad:
        return _error(
            prediction_BMP, masked_targets(images_BCHW, ids_BM, patch_size, norm_pix=norm_pix), kind, reduction
        )
    with_gradient = torch.is_grad_enabled() and prediction_BMP.requires_grad
    options = patch_size, norm_pix, kind, reduction
    return _masked_loss(prediction_BMP, images_BCHW, ids_BM, *options, with_gradient)[0]


def _error(prediction_BMP: Tensor, target_BMP: Tensor, kind: str, reduction: str) -> Tensor:
    dtype = accumulation_dtype(prediction_BMP)
    error = F.mse_loss if kind == "l2" else F.l1_loss
    return error(prediction_BMP.to(dtype), target_BMP.to(dtype), reduction=reduction)


def _definition(
    prediction_BMP: Tensor,
    images_BCHW: Tensor,
    ids_BM: Tensor,
    patch_size: int,
    norm_pix: bool,
    kind: str,
    reduction: str,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    target = masked_targets_reference(images_BCHW, ids_BM, patch_size, norm_pix)
    return _error(prediction_BMP, target, kind, reduction), prediction_BMP.new_empty(0)


@register_op("masked_loss", _definition)
def _masked_loss(
    prediction_BMP: Tensor,
    images_BCHW: Tensor,
    ids_BM: Tensor,
    patch_size: int,
    norm_pix: bool,
    kind: str,
    reduction: str,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """The loss and its gradient (B, M, P), which is empty unless asked for."""
    _, C, H, W = images_BCHW.shape
    columns = W // patch_size
    _checks.check_ids("ids", ids_BM, H // patch_size * columns)
    prediction, ids = prediction_BMP.contiguous(), ids_BM.contiguous()
    gradient = prediction.new_empty(prediction.shape if with_gradient else 0)
    absolute, share = kind == "l1", _share(prediction, reduction)
    slope = 1.0 if _stored_whole(prediction) else share
    if runs_triton(prediction, images_BCHW):
        from mimir_kernels import masked_loss as kernels

        errors = kernels.masked_loss(
            prediction, images_BCHW, ids, gradient, patch_size, norm_pix, absolute, NORM_EPS, slope
        )
        return errors.sum(dtype=torch.float64).mul_(share).float(), gradient
    is_uint8, is_bf16 = images_BCHW.dtype == torch.uint8, prediction.dtype == torch.bfloat16
    if runs_native("masked_loss", images_BCHW, dtype=torch.uint8 if is_uint8 else torch.float32) and runs_native(
        "masked_loss", prediction, dtype=torch.bfloat16 if is_bf16 else torch.float32
    ):
        total = _native.run(
            *("masked_loss", images_BCHW, ids, prediction, gradient if with_gradient else None, *ids.shape),
            *(C, patch_size, columns, images_BCHW.stride(), is_uint8, is_bf16, norm_pix, absolute, NORM_EPS, share),
        )
        return torch.tensor(total * share, dtype=torch.float32), gradient
    dtype = accumulation_dtype(prediction)
    difference = prediction.to(dtype) - masked_targets_reference(images_BCHW, ids, patch_size, norm_pix).to(dtype)
    if with_gradient:
        gradient = (difference.sign() if absolute else 2 * difference).mul_(slope).to(prediction.dtype)
    errors = difference.abs() if absolute else difference.square()
    return errors.sum(dtype=torch.float64).mul_(share).to(dtype), gradient


def _share(prediction_BMP: Tensor, reduction: str) -> float:
    """Of one number's error in the loss."""
    if reduction == "sum":
        return 1.0
    return 1 / prediction_BMP.numel() if prediction_BMP.numel() else torch.nan


def _stored_whole(prediction_BMP: Tensor) -> bool:
    """Whether `_share` waits for the backward pass: float16 ends at 6e-8, and a loss scaler comes only then."""
    return prediction_BMP.dtype == torch.float16


@_masked_loss.register_fake
def _(
    prediction_BMP: Tensor,
    images_BCHW: Tensor,
    ids_BM: Tensor,
    patch_size: int,
    norm_pix: bool,
    kind: str,
    reduction: str,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    loss = prediction_BMP.new_empty((), dtype=accumulation_dtype(prediction_BMP))
    return loss, prediction_BMP.new_empty(prediction_BMP.shape if with_gradient else 0)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    prediction, images, ids, *ctx.options, _ = inputs
    ctx.save_for_backward(output[1], prediction, images, ids)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    gradient, prediction, images, ids = ctx.saved_tensors
    if differentiated_again(grad):

        def definition(prediction: Tensor) -> Tensor:
            return masked_loss_reference(prediction, images, ids, *ctx.options)

        return *gradients_of(definition, (prediction,), (True,), (grad,)), *[None] * 7
    if _stored_whole(prediction):
        grad = grad * _share(prediction, ctx.options[-1])
    # Looking at a number of the CPU costs nothing; while a graph is traced there is none. A leaf would keep the tensor
    # and add to it.
    looks = type(grad) is Tensor and grad.device.type == "cpu"
    if not (looks and not prediction.is_leaf and grad == 1):
        # In the precision of the loss: in float16 this number itself might be 0.
        gradient = (gradient * grad.reshape(1)).to(gradient.dtype)
    return gradient, *[None] * 7


_masked_loss.register_autograd(_backward, setup_context=_save_for_backward)
