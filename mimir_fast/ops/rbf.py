"""Gaussian kernels the numerically careful way: what all dependence estimators of this package are made of.

    D_ij = ‖x_i − x_j‖²      K_ij = exp(−γ D_ij)      stored: K − 1 = expm1(−γ D)

Two ideas. The samples are centred first: distances do not change, but ‖x‖² no longer dwarfs them. And 1 is never
added: with the authors' σ off-diagonal entries lie around 0.9996, centring removes the 1 anyway, and keeping it would
leave three digits of the mantissa to the rest.
Shapes: N samples, flattened to D numbers each; suffixes name the dimensions.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from mimir_fast.ops._checks import values_are_checked

Bandwidth = Literal["paper", "reference", "median"]
BANDWIDTHS = ("paper", "reference", "median")

# The median of N²/2 distances needs them all at once; beyond this many samples, that of evenly spaced rows is taken.
MEDIAN_ROWS = 2048


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is, else float32: the precision of distances and gradients (scalar sums are float64)."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def as_samples(x: Tensor, y: Tensor, *, minimum: int = 2) -> tuple[Tensor, Tensor]:
    """x (N, …) and y (N, …) as (N, D_x) and (N, D_y), after refusing what no estimator could use.

    Args:
        minimum: the least N the estimator is defined for.
    Raises:
        TypeError: not floating-point tensors.
        ValueError: different numbers of samples or devices, too few samples, no features.
    """
    for name, t in (("x", x), ("y", y)):
        if not isinstance(t, Tensor):
            raise TypeError(f"wanted {name} as a torch.Tensor (N, ...), got {type(t).__name__}")
        if not t.is_floating_point():
            raise TypeError(f"wanted floating-point {name}, got {t.dtype}: convert it, e.g. {name}.float() / 255")
        if t.dim() == 0:
            raise ValueError(f"wanted {name} of shape (N, ...), got a scalar")
        if t.shape[0] and not t[0].numel():
            raise ValueError(f"wanted at least one feature per sample, got {name} of shape {tuple(t.shape)}")
    if x.shape[0] != y.shape[0]:
        raise ValueError(
            f"wanted the same number of samples in x and y (row i of both is sample i), "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if x.device != y.device:
        raise ValueError(f"wanted x and y on one device, got {x.device} and {y.device}: move one with .to(...)")
    if x.shape[0] < minimum:
        raise ValueError(f"wanted at least {minimum} samples, got N={x.shape[0]}")
    return x.reshape(x.shape[0], -1), y.reshape(y.shape[0], -1)


def check_choice(name: str, given: str, choices: Sequence[str]) -> None:
    """Raises ValueError listing the choices if `given` is none of them."""
    if given not in choices:
        raise ValueError(f"wanted {name} as one of {', '.join(map(repr, choices))}, got {given!r}")


def check_positive(name: str, value: float) -> None:
    """Raises ValueError unless value > 0 (NaN is refused too)."""
    if not value > 0:
        raise ValueError(f"wanted {name} > 0, got {value}")


def must_be_finite(sums: Tensor, **samples: Tensor) -> None:
    """Refuse NaN and Inf in the samples, at the price of looking at sums they went into instead.

    On CUDA this would make the host wait, so there it happens only under MIMIR_FAST_DEBUG=1.
    """
    if values_are_checked(sums) and not bool(sums.isfinite().all()):
        bad = [name for name, t in samples.items() if not bool(t.isfinite().all())]
        where = f"found NaN or Inf in {' and '.join(bad)}" if bad else "the distances overflow float32"
        raise ValueError(f"wanted finite samples, {where}: look at what produced them (learning rate, loss scale)")


def centered_rows(x_ND: Tensor, dtype: torch.dtype) -> Tensor:
    """x minus its mean over the samples, contiguous, in `dtype`. Any shift is exact for distances; the mean is best."""
    x = x_ND.to(dtype)
    return (x - x.mean(dim=0, keepdim=True)).contiguous()


def squared_distances(x_ND: Tensor) -> Tensor:
    """(N, N) squared Euclidean distances in the dtype of x, ≥ 0, diagonal exactly 0. The definition."""
    x = x_ND - x_ND.mean(dim=0, keepdim=True)
    gram = x @ x.mT
    norms = gram.diagonal()  # of the same product: its rounding cancels
    d2 = (norms[:, None] + norms[None, :] - 2 * gram).clamp_min(0)
    return d2 * (1 - torch.eye(x.shape[0], dtype=x.dtype, device=x.device))


def rbf_minus_one_reference(x_ND: Tensor, gamma: float | Tensor) -> Tensor:
    """(N, N) K − 1. The definition, differentiable any number of times."""
    return torch.expm1(-gamma * squared_distances(x_ND))


def gamma(x_ND: Tensor, sigma: float, bandwidth: Bandwidth) -> Tensor:
    """The factor of −D in the exponent, a detached float64 scalar on the device of x; the host never waits for it.

    Args:
        sigma: kernel width of `paper` and `reference`; not used by `median`.
        bandwidth: `paper` 1/(2σ²); `reference` 1/(2σ²·D) with D features, as in the MIMIR authors' code;
            `median` 1/(2·median of the off-diagonal squared distances), Gretton et al. 2005's heuristic. Beyond
            `MEDIAN_ROWS` samples it is the median among that many evenly spaced ones.
    """
    check_choice("bandwidth", bandwidth, BANDWIDTHS)
    if bandwidth == "median":
        return 1 / (2 * median_squared_distance(x_ND).clamp_min(1e-12))
    check_positive("sigma", sigma)
    dim = x_ND.shape[1] if bandwidth == "reference" else 1
    return torch.full((), 1 / (2 * sigma**2 * dim), dtype=torch.float64, device=x_ND.device)


@torch.no_grad()
def median_squared_distance(x_ND: Tensor) -> Tensor:
    """The (lower) median of the squared distances between different samples: float64 scalar on the device of x."""
    n = x_ND.shape[0]
    if n > MEDIAN_ROWS:
        rows = torch.arange(MEDIAN_ROWS, device=x_ND.device) * n // MEDIAN_ROWS
        x_ND, n = x_ND[rows], MEDIAN_ROWS
    with no_autocast(x_ND.device):
        d2 = squared_distances(x_ND.to(accumulation_dtype(x_ND))).flatten()
    # Each pair occurs twice, after the n zeros of the diagonal.
    rank = n + (n * (n - 1) - 1) // 2
    # kthvalue is linear, but runs on a single block of a GPU; a radix sort there is faster, and waits for nothing.
    median = d2.sort().values[rank] if d2.is_cuda else d2.kthvalue(rank + 1).values
    return median.double()


def no_autocast(device: torch.device) -> torch.autocast:
    """Matrix products are in the dtype of their operands, though the model around runs under autocast."""
    return torch.autocast(device.type, enabled=False)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """`no_autocast`, and no TF32 or bfloat16 inside float32 products, though `set_float32_matmul_precision` allows it.

    A bias of 5e-4 in a distance is the size of what HSIC measures. For the bodies of ops: it sets a global for a while,
    which `torch.compile` would not trace.
    """
    backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    before = backend.matmul.fp32_precision
    backend.matmul.fp32_precision = "ieee"
    try:
        with no_autocast(device):
            yield
    finally:
        backend.matmul.fp32_precision = before


def triton_takes(*tensors: Tensor) -> bool:
    """Whether the kernels of `mimir_kernels` compute these: on an Ampere GPU or newer, with float32 accumulation."""
    device = tensors[0].device
    return device.type == "cuda" and accumulation_dtype(*tensors) == torch.float32 and _runs_triton(device)


@cache
def _runs_triton(device: torch.device) -> bool:
    """bfloat16 tensor cores, which `bf16x3` products need, came with compute capability 8.0."""
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def laplacian_product(weights_NN: Tensor, x_ND: Tensor) -> Tensor:
    """Σ_j W_ij (x_i − x_j) as (N, D) for symmetric W: the gradient of any function of distances has this form."""
    return weights_NN.sum(dim=1, keepdim=True) * x_ND - weights_NN @ x_ND


def differentiate_twice(
    definition: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    grad_outputs: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The backward pass of a backward pass, by automatic differentiation of the definition (dense, N×N memory).

    Args:
        definition: a differentiable function of `inputs`.
        grad_outputs: the gradients of its outputs, with which the first backward pass was run.
        cotangents: the gradients of what that pass returned, one for each input, None for zero.
    Returns:
        gradients for `inputs` and for `grad_outputs`.
    """
    with torch.enable_grad(), full_precision(inputs[0].device):
        leaves = [t.detach().requires_grad_() for t in inputs]
        seeds = [g.detach().requires_grad_() for g in grad_outputs]
        outputs = definition(*leaves)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        first = torch.autograd.grad(outputs, leaves, seeds, create_graph=True, allow_unused=True)
        pairs = [(f, c) for f, c in zip(first, cotangents, strict=True) if f is not None and c is not None]
        if not pairs:
            return [None] * len(leaves), [None] * len(seeds)
        firsts, given = zip(*pairs, strict=True)
        second = torch.autograd.grad(firsts, [*leaves, *seeds], given, allow_unused=True)
    return list(second[: len(leaves)]), list(second[len(leaves) :])
