"""The ways to compute softmax attention that `choice.py` may choose from.

    out = softmax(q kᵀ/√E) v

All take and give (B, T, H, E), run in the dtype of q whatever autocast says, and are differentiable.
Shapes: B batch, T query tokens, S key tokens, H heads, E head dim.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mimir_fast.layers.native_attention import native_attention, takes
from mimir_fast.ops._precision import no_autocast

Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


class Situation(NamedTuple):
    """Everything the fastest kernel depends on, beside the machine."""

    device: torch.device
    dtype: torch.dtype
    queries: int
    keys: int
    heads: int
    head_dim: int
    backward: bool
    """Whether gradients will be asked for."""
    compiled: bool
    """Whether torch.compile is tracing."""

    def __str__(self) -> str:
        precision = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}.get(
            self.dtype, str(self.dtype).removeprefix("torch.")
        )
        tokens = f"{self.queries}" if self.queries == self.keys else f"{self.queries} of {self.keys}"
        passes = "forward and backward" if self.backward else "forward"
        return (
            f"{self.device.type} {precision}, {tokens} tokens, {self.heads} heads of {self.head_dim}, "
            f"{passes}{', compiled' if self.compiled else ''}"
        )


@dataclass(frozen=True)
class Candidate:
    """A kernel and the situations it can be tried in. That it works there is found out by running it."""

    name: str
    run: Kernel
    takes: Callable[[Situation], bool]


def sdpa(q_BTHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor) -> Tensor:
    """PyTorch's scaled_dot_product_attention, by whichever kernel it takes."""
    q, k, v = (t.transpose(1, 2) for t in (q_BTHE, k_BSHE, v_BSHE))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def forced_sdpa(backend: SDPBackend, q_BTHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor) -> Tensor:
    """`sdpa` by one kernel of PyTorch's; its backward pass is that kernel's too."""
    with sdpa_kernel(backend):
        return sdpa(q_BTHE, k_BSHE, v_BSHE)


def plain(q_BTHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor) -> Tensor:
    """Two batched matrix products with a softmax (in fp32 inside) between: T·S numbers of memory a head.

    For the short sequences of a masked autoencoder often the fastest on a CPU.
    """
    (B, T, H, E), S = q_BTHE.shape, k_BSHE.shape[1]
    with no_autocast(q_BTHE.device):
        q = q_BTHE.transpose(1, 2).reshape(B * H, T, E)
        k, v = (t.transpose(1, 2).reshape(B * H, S, E) for t in (k_BSHE, v_BSHE))
        # alpha scales the accumulated sum: 1/√E is not rounded to the dtype first. Nothing is added (beta=0). Not k.mT,
        # which torch.onnx cannot export.
        scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=E**-0.5)
        out = torch.bmm(scores.softmax(dim=-1), v)
    return out.view(B, H, T, E).transpose(1, 2)


def xformers(q_BTHE: Tensor, k_BSHE: Tensor, v_BSHE: Tensor) -> Tensor:
    """xformers' memory_efficient_attention, by the kernel that it chooses."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(q_BTHE, k_BSHE, v_BSHE)


@cache
def xformers_failure(head_dim: int = 64) -> str | None:
    """Why xformers cannot be used here for heads of that many numbers, or None when it can."""
    if not torch.cuda.is_available():
        return "xformers has no attention operator for CPU"
    try:
        with torch.inference_mode(False), torch.enable_grad():  # whoever asks first may be evaluating
            q = torch.zeros(1, 8, 2, head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            xformers(q, q, q).sum().backward()
    except Exception as error:  # a broken binary fails in many ways; any of them means: not this one
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    return None


def _on_cuda(s: Situation) -> bool:
    return s.device.type == "cuda"


def _on_cuda_in_half(s: Situation) -> bool:
    return _on_cuda(s) and s.dtype in (torch.float16, torch.bfloat16)


# In order of preference: a later one has to be clearly faster than an earlier one (choice.MARGIN).
CANDIDATES = (
    Candidate("native", native_attention, lambda s: takes(s.device, s.dtype, s.head_dim)),
    Candidate("sdpa", sdpa, lambda s: True),
    # torch.compile cannot trace xformers, whose own heads and masks are Python objects.
    Candidate("xformers", xformers, lambda s: _on_cuda_in_half(s) and not s.compiled),
    Candidate("cudnn", partial(forced_sdpa, SDPBackend.CUDNN_ATTENTION), _on_cuda_in_half),
    Candidate("flash", partial(forced_sdpa, SDPBackend.FLASH_ATTENTION), _on_cuda_in_half),
    Candidate("efficient", partial(forced_sdpa, SDPBackend.EFFICIENT_ATTENTION), _on_cuda),
    Candidate("plain", plain, lambda s: True),
)
KERNELS: dict[str, Kernel] = {candidate.name: candidate.run for candidate in CANDIDATES}
