"""A model on loan to an attack, which leaves no trace on it.

Gradients go to the input only, so the parameters' `.grad` and DDP's hooks are never touched. `torch.autograd.grad` with
one input makes PyTorch's own layers skip every weight gradient, but fused layers, which compute several gradients at
once, look at the parameters: these are frozen meanwhile. Train or eval flags, BatchNorm's running statistics and the
random state that dropout draws from are given back as they were.

FSDP2 works in module hooks: its reduction is switched off meanwhile, and the parameters are gathered once, for all
steps of the attack and for the training pass that follows; they are FSDP's own, and are not frozen. So an attack has to
know of the training pass around it, and of an attack around it: both are noted here, per thread, and not on the model.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from mimir_fast.layers._bf16 import weights_stay

GUARDS_FROZEN = torch.__version__ >= "2.14"
"""Whether torch.compile tells graphs of frozen weights from those of training; 2.11 does not, 2.12 and 2.13 were not
tried."""
AttackMode = Literal["eval", "train", "as_is"]


class _TrainingPass(NamedTuple):
    model: nn.Module
    reduces: bool


class _Notes(threading.local):
    """What goes on in this thread, the innermost last."""

    def __init__(self) -> None:
        self.passes: list[_TrainingPass] = []
        self.borrowed: list[nn.Module] = []


_notes = _Notes()


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, or the module itself."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextmanager
def training_pass(model: nn.Module, reduces: bool) -> Iterator[None]:
    """Around the attack, forward and backward pass of a micro-batch. No weight changes meanwhile.

    Args:
        model: as the loop calls it, bare, in DDP or sharded by FSDP2.
        reduces: gradients are averaged over ranks in this pass; else they only accumulate.
    """
    from torch.distributed.fsdp import FSDPModule

    with ExitStack() as stack:
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(reduces)
        elif isinstance(model, DistributedDataParallel) and not reduces:
            stack.enter_context(model.no_sync())
        _notes.passes.append(_TrainingPass(model, reduces))
        stack.callback(_notes.passes.pop)
        stack.enter_context(weights_stay())
        yield


@contextmanager
def borrowed(model: nn.Module, mode: AttackMode = "as_is") -> Iterator[nn.Module]:
    """The bare module, in eval mode, train mode or as it is; on leaving, everything is as before.

    BatchNorm in train mode normalises with the batch's own statistics, as the training step will, but its running
    statistics stay as they are. Dropout draws from a copy of the random state. May be nested, in one thread: two
    threads that borrow one model would give back each other's changes.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in ("eval", "train", "as_is"):
        raise ValueError(f"mode={mode!r}, wanted 'eval', 'train' or 'as_is'")
    loan = _Loan(unwrap(model))
    with ExitStack() as stack:
        stack.callback(loan.give_back)
        loan.take(mode)
        stack.enter_context(torch.random.fork_rng(_cuda_devices(loan.module)))
        stack.enter_context(weights_stay())
        yield loan.module


class _Loan:
    """What was changed on a module, so that it can be given back."""

    def __init__(self, module: nn.Module) -> None:
        from torch.distributed.fsdp import FSDPModule

        self.module = module
        self._nested = any(module is other for other in _notes.borrowed)
        shards = [m for m in module.modules() if isinstance(m, FSDPModule)]
        # To an attack around this one: what that has gathered or frozen, that gives back.
        self._gathered: list[Any] = [] if self._nested else shards
        compiled = {m: frozen_flags(m) for m in module.modules()}
        compiled = {m: flags for m, flags in compiled.items() if any(not flag.frozen for flag in flags)}
        self._flags = [flag for flags in compiled.values() for flag in flags]
        parts = list(compiled) if shards or self._nested else [module]
        apart = _trained_as_they_are(module)
        self._frozen = [p for part in parts for p in part.parameters() if p.requires_grad and p not in apart]
        self._modes = [(m, m.training) for m in module.modules()]
        self._norms: list[Any] = []

    def take(self, mode: AttackMode) -> None:
        _notes.borrowed.append(self.module)
        if self._gathered:
            self._gather()
        self._freeze(True)
        if mode != "as_is":
            self.module.train(mode == "train")
        norms = [m for m in self.module.modules() if isinstance(m, _NormBase)]
        self._norms = [m for m in norms if m.training and m.track_running_stats]
        for norm in self._norms:
            norm.track_running_stats = False

    def give_back(self) -> None:
        for norm in self._norms:
            norm.track_running_stats = True
        for m, training in self._modes:
            m.training = training
        self._freeze(False)
        if self._gathered:
            self._scatter()
        _notes.borrowed.pop()

    def _freeze(self, frozen: bool) -> None:
        for flag in self._flags:
            flag.frozen = frozen
        for parameter in self._frozen:
            parameter.requires_grad_(not frozen)

    def _gather(self) -> None:
        """Whole parameters on every rank, all at once, that stay through backward passes; nothing is reduced."""
        root: Any = self.module
        root.set_requires_gradient_sync(False)
        root.set_reshard_after_backward(False)
        root.set_reshard_after_forward(False)
        for handle in [m.unshard(async_op=True) for m in self._gathered]:
            if handle is not None:
                handle.wait()

    def _scatter(self) -> None:
        """FSDP's own ways again. In a training pass parameters stay; elsewhere the next reader may want new ones."""
        root: Any = self.module
        around = next((p for p in reversed(_notes.passes) if p.model is root), None)
        root.set_requires_gradient_sync(around is None or around.reduces)
        root.set_reshard_after_backward(True)
        root.set_reshard_after_forward(True)
        root.set_reshard_after_forward(False, recurse=False)  # fully_shard's default for a root
        if around is None:
            for m in self._gathered:
                m.reshard()


class FrozenFlag:
    """Forward pre-hook of a compiled module: torch.compile keeps separate graphs for training and for attacks.

    torch 2.11 compiles for frozen weights but does not guard on it, and would use the attack's graph for training as
    well, where no weight would get a gradient. It guards on what a hook branches on.
    """

    def __init__(self) -> None:
        self.frozen = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self.frozen:
            pass


def frozen_flags(module: nn.Module) -> list[FrozenFlag]:
    """Those of a module itself, one where it was compiled."""
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, FrozenFlag)]


def _trained_as_they_are(module: nn.Module) -> set[nn.Parameter]:
    """Weights that an attack must not freeze: of compiled modules, where torch.compile would not notice.

    torch 2.11 takes the attack's graph for the training that follows, and no weight gets a gradient; of layers that are
    compiled one by one in spite of their `FrozenFlag`. Their gradients are computed in vain then.
    """
    if GUARDS_FROZEN or frozen_flags(module):
        return set()
    from torch._dynamo.eval_frame import OptimizedModule

    compiled = (m for m in module.modules() if m._compiled_call_impl is not None or isinstance(m, OptimizedModule))
    return {p for m in compiled for p in m.parameters()}


def _cuda_devices(module: nn.Module) -> list[int]:
    """The GPUs whose random state a forward pass could touch; forking all visible ones would be slow.

    While a CUDA graph is recorded the state cannot be asked for, and must not be drawn from.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return []
    return sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
