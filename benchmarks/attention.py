"""Which attention is fastest at the lengths of a masked autoencoder: 50 tokens in the encoder, 197 in the decoder?

All sequences are equal in length, so packing gains nothing; at 50 tokens a kernel with 128-token tiles computes six
times what is needed. Floor: 4 T² E FLOPs a head forward and 10 T² E with the backward pass, or reading q, k, v once.
Shapes: B images, T tokens, H heads, E head dim, as (B, T, H, E), the layout of `mimir_fast.layers.attention`.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks.case import Case, Provider, Size, in_double, run_of
from benchmarks.ceilings import DTYPES
from mimir_fast.layers.attention import attention, xformers_failure
from mimir_fast.layers.kernels import forced_sdpa, plain, sdpa, xformers

# B, T, H, E: encoders S and B on visible tokens, MAE's decoder, the light decoder
SHAPES: dict[Size, list[tuple[int, int, int, int]]] = {
    "tiny": [(2, 5, 2, 8)],
    "quick": [(16, 50, 6, 64), (16, 197, 16, 8)],
    "full": [(64, 50, 6, 64), (64, 50, 12, 64), (16, 197, 16, 32), (64, 197, 16, 8)],
    "gpu": [(512, 50, 6, 64), (512, 50, 12, 64), (512, 50, 16, 64), (512, 197, 16, 32), (512, 197, 16, 8)],
}
BACKENDS = {"math": SDPBackend.MATH, "flash": SDPBackend.FLASH_ATTENTION}
ON_CUDA = {"mem-efficient": SDPBackend.EFFICIENT_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
both_ways = partial(run_of, wanted=(0, 1, 2), above=3)


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """Forward and backward, in the precisions of training on this device."""
    cuda = device.type == "cuda"
    backends = BACKENDS | (ON_CUDA if cuda else {})
    for shape in SHAPES[size]:
        for precision in ("bf16",) if cuda else ("fp32", "bf16"):
            yield case(shape, precision, backends)


def case(shape: tuple[int, int, int, int], precision: str, backends: dict[str, SDPBackend]) -> Case:
    """Attention of one shape, by all kernels."""
    (B, T, H, E), dtype = shape, DTYPES[precision]

    def make_inputs() -> list[Tensor]:
        *qkv, grad = (torch.randn(shape).to(dtype) for _ in range(4))
        return [*(t.requires_grad_() for t in qkv), grad]

    return Case(
        "attention_fwd_bwd",
        {"B": B, "T": T, "H": H, "E": E, "dtype": str(dtype).removeprefix("torch.")},
        [
            Provider("mimir_fast", both_ways(attention)),
            Provider("SDPA, as it chooses", both_ways(sdpa)),
            Provider("plain products", both_ways(plain)),
            *(Provider(f"SDPA {name}", both_ways(partial(forced_sdpa, backend))) for name, backend in backends.items()),
            Provider("xformers", both_ways(xformers), skip=xformers_failure() or ""),
        ],
        baseline="SDPA, as it chooses",
        make_inputs=make_inputs,
        reference=in_double(both_ways(definition)),
        tolerance=1e-5 if precision == "fp32" else 2e-2,
        flops=14.0 * B * H * T * T * E,
        bytes=float(dtype.itemsize * B * T * H * E * 8),
        precision=precision,
        items=B,
    )


def definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition of attention, softmax(q kᵀ/√E) v."""
    weights = torch.einsum("bthe,bshe->bhts", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("bhts,bshe->bthe", weights, v)
