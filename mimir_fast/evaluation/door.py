"""A look at a model before it is evaluated: once, on two images, with gradient.

What would end in an error inside the first attack is refused here in one line, and what is no tensor of logits in fp32
becomes one. Whether the logits are those of the data's classes is asked by `sanity.inspect_model`.

Shapes: B images, C channels, H × W pixels, K classes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from mimir_fast.evaluation.measure import strict_fp32
from mimir_fast.evaluation.sanity import answer
from mimir_fast.evaluation.wrappers import AsLogits, logits_of
from mimir_fast.layers.borrowing import borrowed


def at_the_door(model: nn.Module, images: Tensor, attacked: bool = True) -> tuple[nn.Module, list[str]]:
    """(the model, wrapped where its answer is no fp32 tensor; what the reader of its numbers must know of that).

    Args:
        images: (B, C, H, W) float in [0, 1].
        attacked: it will be, so it must give gradients.
    Raises:
        ValueError: it does not take such images, or gives no gradient with respect to them.
    """
    with strict_fp32(images.device), borrowed(model, "eval") as module:
        x = images.clone().requires_grad_()
        with torch.enable_grad():
            output = answer(module, x)
            logits, where = logits_of(output)
            if not isinstance(logits, Tensor):
                return model, []  # refused with its shape by inspect_model
            moves = not attacked or bool(_gradient(logits, x).any())
    notes = [f"Judged by {where}."] if where else []
    if logits.dtype != torch.float32:
        notes.append(
            f"The model answers in {_word(logits.dtype)}: its logits are cast to float32 after rounding, which hides "
            "small gradients; robustness may be overestimated."
        )
    if not moves:
        notes.append("The gradient with respect to the images is zero on a first look: gradient attacks may not move.")
    return (AsLogits(model) if where or logits.dtype != torch.float32 else model), notes


def _gradient(logits: Tensor, x: Tensor) -> Tensor:
    if not logits.dtype.is_floating_point:
        raise ValueError(
            f"the model returns {_word(logits.dtype)}, wanted logits: floating-point scores of the classes"
        )
    gradient = None
    try:
        if logits.requires_grad:
            (gradient,) = torch.autograd.grad(logits.float().logsumexp(-1).sum(), x, allow_unused=True)
    except RuntimeError as error:
        raise ValueError(
            f"the gradient of the model with respect to its images fails ({_first_line(error)}): if it is in a wrapper "
            "of Fabric, Accelerate or an exporter, give the module inside"
        ) from error
    if gradient is None:
        raise ValueError(
            "the model gives no gradient with respect to its images, so no attack can climb: it runs under "
            "torch.no_grad() or torch.inference_mode(), detaches, or is quantised. Take that out, or judge the float "
            "model it was made of"
        )
    return gradient


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first_line(error: Any) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:160]
