"""Second derivatives of ops whose first ones are kernels."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mimir_fast.ops._precision import full_precision


def differentiate_twice(
    definition: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    grad_outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The backward pass of a backward pass, by automatic differentiation of the definition (dense, N×N memory).

    Args:
        definition: a differentiable function of `inputs`.
        grad_outputs: the gradients of its outputs, with which the first backward pass was run.
        cotangents: the gradients of what that pass returned, one for each input, None for zero.
    Returns:
        gradients for `inputs` and for `grad_outputs`.
    """
    with torch.enable_grad(), full_precision(inputs[0].device):
        leaves = [t.detach().requires_grad_() for t in inputs]
        seeds = [g.detach().requires_grad_() for g in grad_outputs]
        outputs = definition(*leaves)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        first = torch.autograd.grad(outputs, leaves, seeds, create_graph=True, allow_unused=True)
        pairs = [(f, c) for f, c in zip(first, cotangents, strict=True) if f is not None and c is not None]
        if not pairs:
            return [None] * len(leaves), [None] * len(seeds)
        firsts, given = zip(*pairs, strict=True)
        second = torch.autograd.grad(firsts, [*leaves, *seeds], given, allow_unused=True)
    return list(second[: len(leaves)]), list(second[len(leaves) :])
