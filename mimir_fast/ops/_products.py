"""fp32 matrix products on a CPU by oneDNN, where the library to which PyTorch gives them is slower.

PyTorch's fp32 products go to MKL, which leaves half of the width of AVX-512 unused on processors that are not Intel's.
oneDNN, which PyTorch brings for convolutions, uses all of it: on an AMD Zen 5 a product takes less than half of the
time. The precision is the same (fp32 inputs, fp32 sums), the order of the sums is not, so last bits differ.

Shapes: X (M, K), W (N, K) as a linear layer has it.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_ONEDNN: Any = torch.backends.mkldnn
LARGE_PRODUCT = 2**22
"""Multiplications of a product that gains."""


@cache
def helps() -> bool:
    """Whether this is an AMD processor with AVX-512, and PyTorch has both MKL and oneDNN."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether x·Wᵀ, x (…, K), is a product that gains; never of one that has to be differentiated, or is looked at.

    What looks at operations, as FLOP counters do, knows PyTorch's own products. A lower precision that is allowed at
    this moment (`torch.set_float32_matmul_precision`, see `full_precision`) is PyTorch's business.
    """
    return (
        helps()
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and x.numel() * weight.shape[0] >= LARGE_PRODUCT
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and torch._C._len_torch_dispatch_stack() == 0
        and bool(_ONEDNN.enabled)
        and _ONEDNN.matmul.fp32_precision not in ("tf32", "bf16")
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·Wᵀ + b in fp32 by oneDNN, (…, N); x (…, K), b (N,). Has no gradient."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x·Wᵀ + b (M, N) by the faster library, into `out` where it is given."""
    if takes(x, weight):
        result = product(x, weight, bias)
        return result if out is None else out.copy_(result)
    if bias is not None:
        return torch.addmm(bias, x, weight.t(), out=out)
    return torch.mm(x, weight.t(), out=out)


def multiply_add(out: Tensor, x: Tensor, weight: Tensor, *, first: bool = False) -> Tensor:
    """`out` (M, N) += x·Wᵀ; `first`: whatever stands there does not count."""
    if takes(x, weight):
        result = product(x, weight)
        return out.copy_(result) if first else out.add_(result)
    # Not `addmm_`, which FlopCounterMode does not count.
    return torch.addmm(out, x, weight.t(), beta=0 if first else 1, out=out)
