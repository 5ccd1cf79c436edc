"""An attack leaves no trace: it borrows the model and hands it back as it was.

Gradients go to the input only, so the parameters' `.grad` and DDP's hooks are never touched. `torch.autograd.grad` with
one input makes PyTorch's own layers skip every weight gradient, but ops that compute several gradients at once
(ops/bf16_layers.py) look at the parameters, so these are frozen while the attack runs. FSDP2 works in module hooks: its
reduction is switched off meanwhile, and the parameters are gathered once, for all steps of the attack and for the
training pass that follows; they are its own, and stay as they are.

A compiled block needs help to be frozen: torch 2.11 compiles for frozen weights but does not guard on it, and would use
the attack's graph for training as well, where no weight would get a gradient. A block that can be frozen has an
attribute `frozen` that its forward branches on, which is guarded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mimir_fast.ops.bf16_kernels import weights_stay


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, or the module itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def freezable_blocks(model: nn.Module) -> list[Any]:
    """The compiled modules that can be frozen: those with the attribute `frozen`."""
    compiled = [m for m in model.modules() if getattr(m, "_compiled_call_impl", None) is not None]
    return [m for m in compiled if hasattr(m, "frozen")]


@contextmanager
def borrowed(model: nn.Module) -> Iterator[nn.Module]:
    """The bare module for use inside an attack; on leaving, everything is as before."""
    from torch.distributed.fsdp import FSDPModule

    module = unwrap(model)
    lent = getattr(module, "lent", False)  # to an attack around this one: what that has taken, that gives back
    sharded = [] if lent else [m for m in module.modules() if isinstance(m, FSDPModule)]
    blocks = [block for block in freezable_blocks(module) if not block.frozen]
    frozen = [p for part in (blocks if sharded or lent else [module]) for p in part.parameters() if p.requires_grad]
    if sharded:
        _gather(module, sharded)
    _freeze(blocks, frozen, True)
    try:
        with weights_stay():
            yield module
    finally:
        _freeze(blocks, frozen, False)
        if sharded:
            _give_back(module, sharded)


def _gather(root: Any, sharded: list[Any]) -> None:
    """Whole parameters on every rank, all at once, that stay through backward passes; gradients are not reduced."""
    root.lent = True
    root.set_requires_gradient_sync(False)
    root.set_reshard_after_backward(False)
    root.set_reshard_after_forward(False)
    for handle in [m.unshard(async_op=True) for m in sharded]:
        if handle is not None:
            handle.wait()


def _give_back(root: Any, sharded: list[Any]) -> None:
    """FSDP's own ways again. In a training step the parameters stay, elsewhere the next reader may want new ones."""
    root.lent = False
    training_pass = getattr(root, "training_pass", None)
    root.set_requires_gradient_sync(training_pass is None or training_pass)
    root.set_reshard_after_backward(True)
    root.set_reshard_after_forward(True)
    root.set_reshard_after_forward(False, recurse=False)  # fully_shard's default for a root
    if training_pass is None:
        for m in sharded:
            m.reshard()


def _freeze(blocks: list[Any], parameters: list[nn.Parameter], frozen: bool) -> None:
    for block in blocks:
        block.frozen = frozen
    for parameter in parameters:
        parameter.requires_grad_(not frozen)
