"""The one door to the C++ kernels, `mimir_fast._C`.

The extension is built without torch, so tensors cross as addresses. Whoever calls `run` has made sure that each tensor
is on the CPU, of the dtype the kernel expects, and dense in the order the kernel walks (`dense` helps).
Kernels run on `torch.get_num_threads()` OpenMP threads: torch is imported first and its libgomp serves both, so there
is one pool of threads, not two that fight.

An install without a compiler has no `_C` (said once), and one built from older sources may lack a function: `has` says
what is there. `MIMIR_FAST_NATIVE=0` turns all of it off, which is how one compares with the PyTorch definitions, and
`MIMIR_FAST_CPU` (none, avx2, avx512, avx512-bf16 or amx) narrows the units that the kernels choose among, which is how
one tries what another processor would run.
While PyTorch transforms or records a call, a tensor's memory is not what the call is about: `transformed` says so.
"""

import os
import warnings
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


@cache
def library() -> ModuleType | None:
    """The extension module, or None if it was not built, does not load, or is turned off.

    Raises:
        ValueError: MIMIR_FAST_CPU names a unit that this processor lacks.
    """
    if os.environ.get("MIMIR_FAST_NATIVE", "1") == "0":
        return None
    try:
        from mimir_fast import _C
    except ImportError as error:
        warnings.warn(
            f"the C++ ops of mimir_fast are not there ({error}): PyTorch definitions run in their place, slower on a "
            "CPU. Install a compiler (apt-get install g++) and then mimir-fast again, or set MIMIR_FAST_NATIVE=0",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    if wanted := os.environ.get("MIMIR_FAST_CPU"):
        _C.use_unit(wanted)
    return _C


@cache
def has(function: str) -> bool:
    """Whether the extension offers this function."""
    return hasattr(library(), function)


def transformed() -> bool:
    """Whether PyTorch transforms or records this call: then only what it sees, its own operations, may compute.

    True inside torch.func (jvp, vmap, grad, …), forward-mode differentiation, torch.jit.trace, and ONNX or
    torch.export. Ops run their definitions then. torch.compile is not meant: it knows our ops.
    """
    return (
        forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
        or torch.compiler.is_exporting()
    )


# For torch.compile, which follows torch.func inside a graph: asked while it traces, the answer is a constant of the
# graph. (What torch.compiler.assume_constant_result does, but for its import of torch._dynamo: 1.5 s in every command.)
transformed._dynamo_marked_constant = True  # type: ignore[attr-defined]


def unit() -> str:
    """The widest instructions our kernels use here: none, avx2, avx512, avx512-bf16 or amx; empty without kernels."""
    return str(run("unit")) if has("unit") else ""


def run(function: str, *arguments: Any) -> Any:
    """Call a native function: tensors become addresses, None the null one, and the number of threads comes last.

    The tensors stay alive because `arguments` holds them until the call returns.

    Raises:
        TypeError: a tensor without dimensions, which is a number to its giver (such are sizes under torch.jit.trace)
            and would be an address to the kernel.
    """
    raw = [_address(function, a) if isinstance(a, Tensor) else 0 if a is None else a for a in arguments]
    return getattr(library(), function)(*raw, torch.get_num_threads())


def _address(function: str, tensor: Tensor) -> int:
    if not tensor.ndim:
        raise TypeError(f"{function}: a tensor without dimensions is no memory to work on: give a number, int(...)")
    return tensor.data_ptr()


def dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory without gaps or overlaps, in whatever order of dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
