"""The width of a Gaussian kernel exp(−γ D): γ by the paper, by the authors' code, or by the data.

Shapes: N samples, flattened to D numbers each.
"""

from typing import Literal

import torch
from torch import Tensor

from mimir_fast.ops._checks import check_choice, check_positive
from mimir_fast.ops._precision import accumulation_dtype, full_precision
from mimir_fast.ops.distances import squared_distances

Bandwidth = Literal["paper", "reference", "median"]
BANDWIDTHS = ("paper", "reference", "median")

# The median of N²/2 distances needs them all at once; beyond this many samples, that of evenly spaced rows is taken.
MEDIAN_ROWS = 2048


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
        return _gamma(_median_squared_distance(x_ND.detach()))
    check_positive("sigma", sigma)
    dim = x_ND.shape[1] if bandwidth == "reference" else 1
    return torch.full((), 1 / (2 * sigma**2 * dim), dtype=torch.float64, device=x_ND.device)


def gamma_or_later(x_ND: Tensor, sigma: float, bandwidth: Bandwidth) -> Tensor:
    """`gamma`, or an empty tensor under the median rule of so few samples that `pair_sums` has all distances anyway."""
    if bandwidth == "median" and x_ND.shape[0] <= MEDIAN_ROWS:
        return x_ND.new_empty(0, dtype=torch.float64)
    return gamma(x_ND, sigma, bandwidth)


def gamma_of_median(d2_M: Tensor) -> Tensor:
    """The median rule's γ from the squared distances of all M pairs, each once: float64 scalar."""
    return _gamma(_of_rank(d2_M, (len(d2_M) - 1) // 2))


def _of_rank(numbers: Tensor, rank: int) -> Tensor:
    """The number with `rank` others before it, as a float64 scalar."""
    # kthvalue is linear, but runs on a single block of a GPU; a radix sort there is faster, and waits for nothing.
    on_cpu = numbers.device.type == "cpu"
    return (numbers.kthvalue(rank + 1).values if on_cpu else numbers.sort().values[rank]).double()


def _gamma(median: Tensor) -> Tensor:
    return 1 / (2 * median.clamp_min(1e-12))


@torch.library.custom_op("mimir_fast::median_squared_distance", mutates_args=())
def _median_squared_distance(x_ND: Tensor) -> Tensor:
    """The (lower) median of the squared distances between different samples: float64 scalar on the device of x."""
    n = x_ND.shape[0]
    if n > MEDIAN_ROWS:
        rows = torch.arange(MEDIAN_ROWS, device=x_ND.device) * n // MEDIAN_ROWS
        x_ND, n = x_ND[rows], MEDIAN_ROWS
    with full_precision(x_ND.device):
        d2 = squared_distances(x_ND.to(accumulation_dtype(x_ND))).flatten()
    # Each pair occurs twice, after the n zeros of the diagonal.
    return _of_rank(d2, n + (n * (n - 1) - 1) // 2)


@_median_squared_distance.register_fake
def _(x_ND: Tensor) -> Tensor:
    return x_ND.new_empty((), dtype=torch.float64)
