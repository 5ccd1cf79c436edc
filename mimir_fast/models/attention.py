"""The one seam through which all attention goes.

On CUDA xformers' `memory_efficient_attention` where it really works: its own binary often does not load on a current
torch, and its kernels differ in what they take, so a small call for each head dim finds out. On the CPU a kernel of
ours for the small heads of the light decoder. PyTorch's scaled_dot_product_attention everywhere else.
Shapes: B batch, T query tokens, S key tokens, H heads, E head dim.
"""

import os
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from mimir_fast.ops import small_head_attention

_CHOICES = ("auto", "xformers", "sdpa")


@cache
def xformers_failure(head_dim: int = 64) -> str | None:
    """Why xformers cannot be used here for heads of that many numbers, or None when it can."""
    if not torch.cuda.is_available():
        return "xformers has no attention operator for CPU"
    try:
        from xformers.ops import memory_efficient_attention

        with torch.inference_mode(False), torch.enable_grad():  # whoever asks first may be evaluating
            q = torch.zeros(1, 8, 2, head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            memory_efficient_attention(q, q, q).sum().backward()
    except Exception as error:  # a broken binary fails in many ways; any of them means SDPA
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    return None


def attention_backend(device: torch.device, head_dim: int = 64) -> str:
    """`xformers` or `sdpa`: what `attention` runs on this device. MIMIR_FAST_ATTENTION=auto|xformers|sdpa overrides.

    Args:
        head_dim: 64 in the papers' encoders.
    Raises:
        ValueError: the variable has another value.
        RuntimeError: xformers is demanded and does not work.
    """
    wanted = os.environ.get("MIMIR_FAST_ATTENTION", "auto")
    if wanted not in _CHOICES:
        raise ValueError(f"MIMIR_FAST_ATTENTION={wanted!r}, wanted one of {', '.join(_CHOICES)}")
    if wanted == "sdpa" or (wanted == "auto" and device.type != "cuda"):
        return "sdpa"
    failure = xformers_failure(head_dim)
    if failure is None:
        return "xformers"
    if wanted == "xformers":
        raise RuntimeError(f"MIMIR_FAST_ATTENTION=xformers, but it does not work here: {failure}")
    return "sdpa"


def attention(q_BTHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor) -> Tensor:
    """softmax(q kᵀ/√E) v, as (B, T, H, E)."""
    # xformers has no fp32 tensor-core kernel worth having and none for double: those go to SDPA.
    eager_half = q_BTHE.dtype in (torch.float16, torch.bfloat16) and not torch.compiler.is_compiling()
    if eager_half and attention_backend(q_BTHE.device, q_BTHE.shape[-1]) == "xformers":
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(q_BTHE, k_BSHE, v_BSHE)
    if small_head_attention.takes(q_BTHE, k_BSHE, v_BSHE):
        return small_head_attention.small_head_attention(q_BTHE, k_BSHE, v_BSHE)
    out = F.scaled_dot_product_attention(q_BTHE.transpose(1, 2), k_BSHE.transpose(1, 2), v_BSHE.transpose(1, 2))
    return out.transpose(1, 2)
