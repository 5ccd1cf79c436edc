"""An attack leaves no trace: it borrows the model and hands it back as it was.

Gradients go to the input only (`torch.autograd.grad` with one input skips every weight gradient), so the parameters'
`.grad` and DDP's hooks are never touched. FSDP2 reduces gradients in module hooks: its reduction is switched off
meanwhile. A compiled module would compute all weight gradients and throw them away, a third of the attack's time, unless the
parameters are frozen while the attack runs; that is done where the module is compiled.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, or the module itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def is_compiled(model: nn.Module) -> bool:
    """True when the module, or any part of it, runs through torch.compile."""
    return any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())


@contextmanager
def borrowed(model: nn.Module) -> Iterator[nn.Module]:
    """The bare module for use inside an attack; on leaving, everything is as before."""
    from torch.distributed.fsdp import FSDPModule

    module = unwrap(model)
    sharded = [m for m in module.modules() if isinstance(m, FSDPModule)]
    frozen = [p for p in module.parameters() if p.requires_grad] if is_compiled(module) and not sharded else []
    syncing = [m._get_fsdp_state()._fsdp_param_group for m in sharded]
    before = [group.reduce_grads if group is not None else True for group in syncing]
    for m in sharded:
        m.set_requires_gradient_sync(False, recurse=False)
    for p in frozen:
        p.requires_grad_(False)
    try:
        yield module
    finally:
        for p in frozen:
            p.requires_grad_(True)
        for m, flag in zip(sharded, before, strict=True):
            m.set_requires_gradient_sync(flag, recurse=False)
