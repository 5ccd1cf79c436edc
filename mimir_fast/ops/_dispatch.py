"""Who computes an op: Triton, C++, or the definition in PyTorch. Every op asks here, in this order.

Devices are asked by name: what is neither `cuda` nor `cpu` (MPS, XPU, meta) runs the definition. So does an AMD GPU,
which ROCm calls `cuda`: no tile of ours was compiled for one.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from mimir_fast import _native


def runs_triton(*tensors: Tensor, any_dtype: bool = False) -> bool:
    """Whether `mimir_kernels` computes these: on an NVIDIA GPU from Ampere on with Triton, and not in float64.

    Args:
        any_dtype: the kernel only moves numbers, float64 ones too.
    """
    if any(tensor.device.type != "cuda" for tensor in tensors):
        return False
    if not any_dtype and any(tensor.dtype == torch.float64 for tensor in tensors):
        return False
    return _has_triton(tensors[0].device)


@cache
def _has_triton(device: torch.device) -> bool:
    """bfloat16 tensor cores, which `bf16x3` products need, came with compute capability 8.0."""
    nvidia = torch.version.hip is None
    return nvidia and find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (8, 0)


@contextmanager
def unless_too_large() -> Iterator[None]:
    """Launch Triton kernels in here and return their result: what follows runs if one of them does not fit this GPU.

    Tiles are made to fit each architecture (tests/kernels/aot_table.json). Another version of Triton may want more
    shared memory for them, and says so before it launches anything. We say it once.
    """
    from triton.runtime.errors import OutOfResources

    try:
        yield
    except OutOfResources as error:
        warnings.warn(
            f"a Triton kernel does not fit this GPU ({error}): PyTorch computes it, more slowly. Another version of "
            "triton may fit; `python -m mimir_kernels.aot` says which",
            RuntimeWarning,
            stacklevel=3,
        )


def runs_native(function: str, *tensors: Tensor, dtype: torch.dtype | None = torch.float32) -> bool:
    """Whether this C++ function computes these: all on the CPU, of one dtype (None: of any), and it was built.

    Not while PyTorch transforms or records the call.
    """
    if not _native.has(function) or _native.transformed():
        return False
    return all(tensor.device.type == "cpu" and (dtype is None or tensor.dtype == dtype) for tensor in tensors)
