"""An op: kernels behind `torch.library`, and the definition in plain PyTorch where the kernels cannot serve.

PyTorch has no forward mode for registered ops, and does not say so: `torch.func.jvp` of one is zero. Therefore, while
PyTorch transforms or records a call (`_native.transformed`), the definition runs in the op's place. PyTorch sees each
of its operations, so jvp, vmap, hessian, a traced graph and an exported one are right, for all ops by this one rule.

Higher derivatives follow the same rule: a backward pass that will itself be differentiated (`differentiated_again`)
takes the gradients of the definition, as a graph, which can be differentiated any number of times.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from mimir_fast._native import transformed
from mimir_fast.ops._precision import full_precision

P = ParamSpec("P")
R = TypeVar("R")


class Op(Generic[P, R]):
    """`mimir_fast::name`, to be called as its kernels' function is.

    Attributes:
        definition: a function of the same arguments and results (results that only a backward pass reads may be empty).
    """

    def __init__(self, name: str, kernels: Callable[P, R], definition: Callable[P, R], mutates_args: Iterable[str]):
        self.definition = definition
        self._registered = torch.library.custom_op(f"mimir_fast::{name}", kernels, mutates_args=mutates_args)
        self._dispatched: Callable[P, R] = getattr(torch.ops.mimir_fast, name).default

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.definition(*args, **kwargs) if transformed() else self._dispatched(*args, **kwargs)

    def register_fake(self, fake: Callable[P, R]) -> Callable[P, R]:
        """Decorator: the function that gives empty results of the right shapes and dtypes, for torch.compile."""
        self._registered.register_fake(fake)
        return fake

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """Set the backward pass, with the arguments of `torch.library.register_autograd`."""
        self._registered.register_autograd(backward, setup_context=setup_context)


def register_op(
    name: str, definition: Callable[P, R], *, mutates_args: Iterable[str] = ()
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Decorator of the function that runs the kernels: makes it the op `mimir_fast::name`."""
    return lambda kernels: Op(name, kernels, definition, mutates_args)


def differentiated_again(*grad_outputs: Tensor) -> bool:
    """Inside a backward pass: whether its gradients will be differentiated (`create_graph`) or transformed.

    Args:
        grad_outputs: several at once are stacked (`is_grads_batched`, vectorised jacobians), which only PyTorch's own
            operations can unstack.
    """
    stacked = any(torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grad_outputs)
    return stacked or torch.is_grad_enabled() or transformed()


def gradients_of(
    definition: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
    grad_outputs: Sequence[Tensor],
) -> list[Tensor | None]:
    """The gradients of a definition, as a graph where one is asked for; None where not needed.

    Args:
        inputs: as the forward pass saved them, with the graph they came from.
        needs: for each input, whether its gradient is needed.
        grad_outputs: the gradients of the outputs.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), full_precision(inputs[0].device):
        # A view of each, because one tensor may be given twice (HSIC(x, x)) and each place has its own gradient.
        inputs = [t.view_as(t) if needed else t for t, needed in zip(inputs, needs, strict=True)]
        wanted = [t for t, needed in zip(inputs, needs, strict=True) if needed]
        outputs = definition(*inputs)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        # An output may depend only on inputs whose gradient is not needed.
        pairs = [(out, grad) for out, grad in zip(outputs, grad_outputs, strict=True) if out.requires_grad]
        reached, seeds = [out for out, _ in pairs], [grad for _, grad in pairs]
        found = iter(torch.autograd.grad(reached, wanted, seeds, create_graph=create_graph, allow_unused=True))
    return [next(found) if needed else None for needed in needs]
