"""The one seam through which all attention goes: the kernel that measured fastest here for these shapes.

`kernels.py` has the candidates, `choice.py` the stopwatch. MIMIR_FAST_ATTENTION pins one by name:
`sdpa`, `plain`, `native`, `xformers`, `cudnn`, `flash` or `efficient`; where the pinned one cannot run, `sdpa` does.
Shapes: B batch, T query tokens, S key tokens, H heads, E head dim.
"""

import operator
import os

import torch
from torch import Tensor

from mimir_fast._native import transformed
from mimir_fast.layers.choice import Seconds, fastest
from mimir_fast.layers.inspection import observed
from mimir_fast.layers.kernels import CANDIDATES, KERNELS, Situation
from mimir_fast.layers.kernels import xformers_failure as xformers_failure
from mimir_fast.layers.native_attention import native_attention_reference, native_self_attention
from mimir_fast.ops._precision import no_autocast

_chosen: dict[tuple[str, Situation], tuple[str, Seconds]] = {}


def attention(q_BTHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor) -> Tensor:
    """softmax(q kᵀ/√E) v, as (B, T, H, E)."""
    if transformed():  # by the definition, each operation of which PyTorch can transform and record
        with no_autocast(q_BTHE.device):
            return native_attention_reference(q_BTHE, k_BSHE, v_BSHE)
    return KERNELS[_kernel_for(q_BTHE, k_BSHE, v_BSHE)](q_BTHE, k_BSHE, v_BSHE)


def self_attention(qkv_BT3HE: Tensor) -> Tensor:
    """`attention` of q, k and v as a fused projection gives them, (B, T, H, E)."""
    q, k, v = qkv_BT3HE.unbind(2)
    if transformed():
        return attention(q, k, v)
    name = _kernel_for(q, k, v)
    return native_self_attention(qkv_BT3HE) if name == "native" else KERNELS[name](q, k, v)


def self_attention_kernel(device: torch.device, dtype: torch.dtype, T: int, H: int, E: int, backward: bool) -> str:
    """The name of the kernel `self_attention` takes for such tensors; not while torch.compile traces."""
    return _choice(device, dtype, T, T, H, E, backward, False)


def _kernel_for(q_BTHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor) -> str:
    """The name of the kernel for these tensors."""
    if not torch.compiler.is_compiling() and observed():
        return "plain"  # of operations that are counted: PyTorch's fused ones are not, on a CPU
    (_, T, H, E), S = q_BTHE.shape, k_BSHE.shape[1]
    backward = torch.is_grad_enabled() and (q_BTHE.requires_grad or k_BSHE.requires_grad or v_BSHE.requires_grad)
    if torch.compiler.is_compiling():
        # The kernel is a constant of the graph, and so are the lengths it follows from (`index`: not symbolic).
        lengths = operator.index(T), operator.index(S), operator.index(H), operator.index(E)
        return _constant_choice(q_BTHE.device, q_BTHE.dtype, *lengths, backward, True)
    return _choice(q_BTHE.device, q_BTHE.dtype, T, S, H, E, backward, False)


def attention_backend(device: torch.device, head_dim: int = 64) -> str:
    """The kernel MIMIR_FAST_ATTENTION pins for this device, or `fastest measured` when each shape finds its own.

    Args:
        head_dim: 64 in the papers' encoders; only xformers asks.
    Raises:
        ValueError: the variable has an unknown value.
        RuntimeError: xformers is pinned and does not work here.
    """
    wanted = _wanted()
    if wanted == "xformers" and (failure := xformers_failure(head_dim)) is not None:
        raise RuntimeError(f"MIMIR_FAST_ATTENTION=xformers, but it does not work here: {failure}")
    return "fastest measured" if wanted == "auto" else wanted


def attention_choices() -> list[str]:
    """One line for each situation met so far in this process: the kernel chosen, and the milliseconds of each."""
    lines = []
    for (_, situation), (name, seconds) in _chosen.items():
        times = ", ".join(f"{other} {1e3 * s:.3g}" for other, s in sorted(seconds.items(), key=lambda item: item[1]))
        lines.append(f"{situation}: {name}" + (f" (ms: {times})" if times else ""))
    return lines


def _choice(
    device: torch.device, dtype: torch.dtype, T: int, S: int, H: int, E: int, backward: bool, compiled: bool
) -> str:
    """The kernel's name; after the first call for a situation it is a look-up."""
    key = _wanted(), Situation(device, dtype, T, S, H, E, backward, compiled)
    if key not in _chosen:
        _chosen[key] = _decide(*key)
    return _chosen[key][0]


# For torch.compile: run while tracing, its answer becomes part of the graph.
_constant_choice = _choice
# What torch.compiler.assume_constant_result does, but for its import of torch._dynamo: 1.5 s in every command.
_choice._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _decide(wanted: str, situation: Situation) -> tuple[str, Seconds]:
    if wanted == "auto":
        return fastest(situation)
    attention_backend(situation.device, situation.head_dim)  # says so if xformers is demanded and broken
    pinned = next(c for c in CANDIDATES if c.name == wanted)
    return (wanted if pinned.takes(situation) else "sdpa"), {}


def _wanted() -> str:
    wanted = os.environ.get("MIMIR_FAST_ATTENTION", "auto")
    if wanted != "auto" and wanted not in KERNELS:
        raise ValueError(f"MIMIR_FAST_ATTENTION={wanted!r}, wanted one of auto, {', '.join(KERNELS)}")
    return wanted
