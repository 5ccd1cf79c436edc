"""HSIC, forward and backward: time and memory of the N×N problem.

Floor: half of each Gram matrix (it is symmetric) forward, and one product C X for each gradient: N²(D_x + D_y) +
2 N²(D_x + D_y) FLOPs; bytes are the inputs and gradients alone. Eager PyTorch computes whole Gram matrices and two
products for each gradient, and keeps some ten N×N matrices for the backward pass.
Beyond the sizes at which that fits, the rival is eager PyTorch in row blocks with activation checkpointing.
Shapes: N samples, D features, I rows of a block.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.case import Case, Outputs, Provider, Run, Size, compiled, in_double, run_of
from mimir_fast.ops.dependence.bandwidth import gamma
from mimir_fast.ops.hsic import hsic, hsic_from_sums, hsic_reference

SIGMA = 5.0
# The authors' formula loses its digits by construction; it is timed all the same, being what is replaced. Seen: 4e-4.
INEXACT = 1e-2
Pair = tuple[Tensor, Tensor]
FACTORS = 32

# N, D_x, D_y: training sizes, then one at which N×N does not fit
SIZES: dict[Size, list[tuple[int, int, int]]] = {
    "tiny": [(24, 40, 16)],
    "quick": [(512, 3072, 768), (2048, 768, 768)],
    "full": [(4096, 768, 768)],
    "gpu": [(512, 150528, 38400), (2048, 150528, 38400), (4096, 150528, 38400), (4096, 768, 768)],
}
LARGE: dict[Size, list[tuple[int, int, int]]] = {
    "tiny": [(70, 16, 16)],
    "quick": [],
    "full": [(32768, 128, 128)],
    "gpu": [(65536, 768, 768)],
}
both_gradients = partial(run_of, wanted=(0, 1))  # (value, ∂x, ∂y)


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """fp32: batches of images and their latents."""
    for n, d_x, d_y in SIZES[size]:
        yield training_case(device, n, d_x, d_y)
    for n, d_x, d_y in LARGE[size]:
        yield large_case(device, n, d_x, d_y)


def image_like(n: int, d_x: int, d_y: int) -> Pair:
    """x (N, D_x) in [0, 1] and y (N, D_y), leaves that require gradients, like the estimators' real inputs.

    x is a smooth mixture of a few factors around mid-grey plus pixel noise, cut to [0, 1] as images are; y is a
    non-linear function of the same factors. With σ = 5 the off-diagonal kernel of x lies near 0.998, which is what
    costs `exp` its digits. Random normal data would hide that.
    """
    factors = torch.randn(n, FACTORS)
    x = torch.addmm(torch.randn(n, d_x), factors, torch.randn(FACTORS, d_x), beta=0.05, alpha=0.25 / FACTORS**0.5)
    y = torch.addmm(torch.randn(n, d_y), factors, torch.randn(FACTORS, d_y), beta=0.1, alpha=FACTORS**-0.5)
    return x.add_(0.5).clamp_(0, 1).requires_grad_(), y.tanh_().requires_grad_()


def eager(x_ND: Tensor, y_ND: Tensor) -> Tensor:
    """HSIC as a careful person writes it in PyTorch: centred inputs, one product, expm1, fp32."""
    k, l_ = minus_one(x_ND), minus_one(y_ND)
    k = k - k.mean(0, keepdim=True)
    l_ = l_ - l_.mean(0, keepdim=True)
    return (k * l_.mT).sum() / len(k) ** 2


def minus_one(x_ND: Tensor, rows: slice | None = None) -> Tensor:
    """K − 1, (N, N), or the rows of it."""
    x = x_ND - x_ND.mean(0, keepdim=True)
    norms = x.square().sum(1)
    left, left_norms = (x, norms) if rows is None else (x[rows], norms[rows])
    squared = left_norms[:, None] + norms - 2 * left @ x.mT
    return torch.expm1(squared.clamp_min(0) * (-1 / (2 * SIGMA**2 * x.shape[1])))


def authors(x_ND: Tensor, y_ND: Tensor) -> Tensor:
    """The authors' formula: Gram matrices with exp on the host, a centring matrix, three N×N×N products."""
    k, l_ = gram_on_host(x_ND), gram_on_host(y_ND)
    h = torch.eye(len(k)) - 1 / len(k)
    return ((k @ h) * (l_ @ h).mT).mean()


def gram_on_host(x_ND: Tensor) -> Tensor:
    """K (N, N) the authors' way: squared distances from uncentred products, exp, off the device."""
    products = x_ND @ x_ND.mT
    norms = products.diagonal()
    return torch.exp(-(norms[:, None] + norms - 2 * products) / (2 * SIGMA**2 * x_ND.shape[1])).cpu()


def in_blocks(x_ND: Tensor, y_ND: Tensor, block: int = 1024) -> Tensor:
    """`eager` in row blocks, each computed again in the backward pass: O(N·block) memory."""

    def rows_of(x_ND: Tensor, y_ND: Tensor, start: int) -> Outputs:
        rows = slice(start, start + block)
        k, l_ = minus_one(x_ND, rows), minus_one(y_ND, rows)
        return (k * l_).sum(dtype=torch.float64), k.sum(1, dtype=torch.float64), l_.sum(1, dtype=torch.float64)

    n = len(x_ND)
    parts: list[Any] = [checkpoint(rows_of, x_ND, y_ND, i, use_reentrant=False) for i in range(0, n, block)]
    s = torch.stack([part[0] for part in parts]).sum()
    r, q = torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts])
    return (s - 2 / n * (r * q).sum() + r.sum() * q.sum() / n**2) / n**2


def training_case(device: torch.device, n: int, d_x: int, d_y: int) -> Case:
    """All N×N matrices at once."""
    rivals = [
        Provider("eager", both_gradients(eager)),
        Provider("torch.compile(eager)", both_gradients(compiled(eager))),
        Provider("definition", both_gradients(hsic_reference), note="sums in float64"),
        Provider(
            "authors' formula", both_gradients(authors), tolerance=INEXACT,
            note="inexact by construction: exp in fp32 near 1, products of pixels that are not centred",
        ),
    ]  # fmt: skip
    ours = [Provider("mimir_fast", both_gradients(hsic))]
    if device.type == "cuda":
        ours.append(Provider("mimir_fast, Gram by cuBLAS", library_gram, note="the same split, batched products"))
        bf16, tf32 = both_gradients(compiled(bf16_gram)), with_tf32(both_gradients(compiled(eager)))
        rivals.append(Provider("torch.compile, bf16 cuBLAS", bf16, tolerance=2e-2, note="bf16 after centring"))
        rivals.append(Provider("torch.compile, tf32 cuBLAS", tf32, tolerance=1e-3, note="tf32 after centring"))
    return Case(
        "hsic_fwd_bwd",
        {"N": n, "Dx": d_x, "Dy": d_y, "dtype": "fp32"},
        [*ours, *rivals],
        baseline="eager",
        make_inputs=partial(image_like, n, d_x, d_y),
        reference=in_double(both_gradients(hsic_reference)),
        tolerance=(1e-5, 1e-4, 1e-4),
        flops=3.0 * n * n * (d_x + d_y),
        bytes=8.0 * n * (d_x + d_y),
        items=n,
    )


def library_gram(inputs: Pair) -> Outputs:
    """Our kernels around cuBLAS' products: if this is within a tenth, our Gram kernel is not worth its lines."""
    from mimir_kernels import pair_sums
    from mimir_kernels.gram import gram_by_library

    x_ND, y_ND = (t.detach() for t in inputs)
    gammas = gamma(x_ND, SIGMA, "reference"), gamma(y_ND, SIGMA, "reference")
    s, r, q, k, l_, *_ = pair_sums.forward(x_ND, y_ND, *gammas, True, gram=gram_by_library)
    value = hsic_from_sums(s.requires_grad_(), r.requires_grad_(), q.requires_grad_(), "biased")
    grad_s, grad_r, grad_q = torch.autograd.grad(value, (s, r, q))
    return value.detach(), *pair_sums.backward(grad_s, grad_r, grad_q, x_ND, y_ND, *gammas, k, l_, True, True)


def bf16_gram(x_ND: Tensor, y_ND: Tensor) -> Tensor:
    """`eager` on the tensor cores: what a compiled cuBLAS formulation can do best."""
    with torch.autocast(x_ND.device.type, torch.bfloat16):
        return eager(x_ND, y_ND)


def with_tf32(run: Run) -> Run:
    """The same with cuBLAS allowed to round operands to tf32."""

    def rounded(inputs: Pair) -> Outputs:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            return run(inputs)
        finally:
            torch.set_float32_matmul_precision(before)

    return rounded


def large_case(device: torch.device, n: int, d_x: int, d_y: int) -> Case:
    """More samples than N×N matrices have room for: eager PyTorch would keep about ten, 40 GiB at 32,768 samples."""
    return Case(
        "hsic_large_fwd_bwd",
        {"N": n, "Dx": d_x, "Dy": d_y, "dtype": "fp32"},
        [
            Provider("mimir_fast", both_gradients(hsic)),
            Provider("eager in blocks, checkpointed", both_gradients(in_blocks)),
        ],
        baseline="eager in blocks, checkpointed",
        make_inputs=partial(image_like, n, d_x, d_y),
        # A CPU takes minutes for the definition; a GPU is judged at full size, where indices exceed 32 bits.
        gate_inputs=None if device.type == "cuda" else partial(image_like, n // 4, d_x, d_y),
        reference=in_double(both_gradients(in_blocks)),
        tolerance=(1e-5, 1e-4, 1e-4),
        flops=3.0 * n * n * (d_x + d_y),
        bytes=8.0 * n * (d_x + d_y),
        items=n,
    )
