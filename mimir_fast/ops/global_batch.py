"""Estimators over the global batch: what one process would compute on the samples of all of them.

A dependence estimator is not a mean over samples, so averaging its per-rank values is not its value on the global
batch. Here every rank gathers the samples, computes the *same* scalar, and keeps the gradient of its own samples only,
multiplied by the number of ranks: the averaging of DDP and FSDP then turns Σ_r ∂L/∂x_r · ∂x_r/∂θ into itself. So no
collective is needed in the backward pass (one fewer than the textbook reduce-scatter). `global_hsic.py` shares the work
of computing that scalar, too.

Every rank must hold equally many samples. Before a gather they tell each other how many, host to host: with unequal
ones a backend aborts, hangs or mixes them up. They do so in every call, since a rank that remembered its last batch
would not answer the one whose batch is another.
Shapes: n samples of this rank, R ranks, N = R·n samples of the global batch.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mimir_fast import _native
from mimir_fast.ops._checks import check_tensors


def group_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of ranks in `group` (default: all); 1 when torch.distributed is not initialised."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def all_gather(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """(R·n, …), without gradient: the tensors of all ranks along the first dimension, in rank order."""
    gathered = x.new_empty((group_size(group) * x.shape[0], *x.shape[1:]))
    dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
    return gathered


def check_same_shapes(group: dist.ProcessGroup | None = None, /, **tensors: Tensor) -> None:
    """Compare shapes and dtypes of what the ranks hold. Collective; 0.2 ms of a CPU on two ranks of a host.

    CPU tensors carry it, so that no GPU is waited for; a group that has no backend for them is not compared, nor is
    what PyTorch compiles, transforms or records.

    Raises:
        ValueError: on every rank, when they differ; names the first two ranks that do and what they hold.
    """
    if torch.compiler.is_compiling() or _native.transformed() or "cpu" not in dist.get_backend_config(group):
        return
    described = torch.tensor([[_description(t) for t in tensors.values()]])
    for name, *ranks in zip(tensors, *all_gather(described, group).tolist(), strict=True):
        other = next((rank for rank, description in enumerate(ranks) if description != ranks[0]), 0)
        if other:
            raise ValueError(
                f"{name} must have the same shape and dtype on every rank, got {_words(ranks[0])} on rank 0 and "
                f"{_words(ranks[other])} on rank {other}: give each as many samples (drop_last=True in a DataLoader)"
            )


_DTYPES = sorted({str(d) for d in vars(torch).values() if isinstance(d, torch.dtype)})
_DIMENSIONS = 8  # told one by one; the sizes of those behind are multiplied


def _description(x: Tensor) -> list[int]:
    """Ten numbers: dtype, number of dimensions, their sizes."""
    sizes = [*x.shape[: _DIMENSIONS - 1], math.prod(x.shape[_DIMENSIONS - 1 :])]
    return [_DTYPES.index(str(x.dtype)), x.dim(), *sizes, *[1] * (_DIMENSIONS - len(sizes))]


def _words(description: Sequence[int]) -> str:
    dtype, dimensions, *sizes = description
    return f"{_DTYPES[dtype].removeprefix('torch.')} {tuple(sizes[:dimensions])}"


class _GatherBatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.rank, ctx.num_ranks, ctx.num_local = dist.get_rank(group), group_size(group), x.shape[0]
        return all_gather(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.narrow(0, ctx.rank * ctx.num_local, ctx.num_local) * ctx.num_ranks, None


def gather_batch(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The samples of all ranks, concatenated along the batch in rank order.

    Args:
        x: (n, …), the same shape and dtype on every rank, which is compared.
        group: the ranks taking part; all by default. Without torch.distributed, or alone, x is returned as it is.
    Returns:
        (R·n, …). Its gradient to x is this rank's slice times R, which is right when every rank computes the same loss
        from the result and gradients of parameters are *averaged* over the ranks, as DDP and FSDP do. First order only.
    Raises:
        TypeError: x is no tensor.
        ValueError: x is a scalar, or has another shape or dtype on another rank.

    Example:
        >>> loss = reconstruction + 1e-5 * hsic(gather_batch(images), gather_batch(latents))
    """
    check_tensors(x=x)
    if group_size(group) == 1:
        return x
    check_same_shapes(group, x=x)  # first: a rank with another shape waits for this one
    if x.dim() == 0:
        raise ValueError("x must be (n, ...) with a batch dimension, got a scalar: use x[None]")
    gathered: Tensor = _GatherBatch.apply(x, group)
    return gathered
