"""May a fused path read the weights of these modules in place of calling them?

Only where a call would do nothing else: the module is exactly of the class whose forward pass the fused path computes,
and nothing is attached to it. LoRA, quantisation and other wrappers are of another class, as are parametrised modules;
pruning, weight norm and activation hooks hang on the module; a compiled or replaced `forward` is seen as well. And only
where nobody looks at the single operations: neither a tracer nor a FLOP counter, nor forward-mode or functorch's
transforms, which custom kernels do not know.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from mimir_fast._native import transformed

_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {nn.Linear: nn.Linear.forward, nn.Conv2d: nn.Conv2d.forward}
_CALL = nn.Module.__call__
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = [getattr(torch_module, f"_global{name}") for name in _HOOKS]

calls: Counter[str] = Counter()
"""How often each fused path was taken in this process, by precision and name, such as `fp32 block`."""

Module = TypeVar("Module", bound=type[nn.Module])


def fusible(kind: Module) -> Module:
    """Class decorator: a fused path computes what `forward` does; subclasses are other classes."""
    _FORWARDS[kind] = kind.forward
    return kind


def is_plain(kind: type[nn.Module], *modules: nn.Module) -> bool:
    """Whether calling these would be `kind.forward` of their parameters and nothing else."""
    return (
        kind.forward is _FORWARDS.get(kind)
        and kind.__call__ is _CALL
        and not any(_acts(hook) for hooks in _GLOBAL_HOOKS for hook in hooks.values())
        and all(type(m) is kind and not _has_attachments(m) for m in modules)
    )


def _acts(global_hook: Any) -> bool:
    """FLOP counters only note which module is running: their total is that of the operations which run without them."""
    return type(getattr(global_hook, "__self__", None)).__module__ != "torch.utils.module_tracker"


def _has_attachments(module: nn.Module) -> bool:
    own = module.__dict__
    return "forward" in own or own.get("_compiled_call_impl") is not None or any(own[hooks] for hooks in _HOOKS)


def observed() -> bool:
    """Whether somebody looks at the operations of this call: then they must be PyTorch's."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._len_torch_dispatch_stack() > 0 or transformed()  # modes: FlopCounterMode, fake tensors
