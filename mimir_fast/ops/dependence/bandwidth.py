"""The squared distances D_ij = ‖x_i − x_j‖² a Gaussian kernel exp(−γ D) is made of, and its width γ.

The samples are centred first: distances do not change, but ‖x‖² is no longer large beside them, which saves digits.
γ comes from the paper, from the authors' code, or from the data (the median rule).
Shapes: N samples, flattened to D numbers each.
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from mimir_fast.ops._checks import check_choice, check_positive
from mimir_fast.ops._op import register_op
from mimir_fast.ops._precision import accumulation_dtype, full_precision
from mimir_fast.philox import Stream, random_bits

Bandwidth = Literal["paper", "reference", "median"]
BANDWIDTHS = ("paper", "reference", "median")
Sigma = float | tuple[float, float]
"""The width of both kernels, or (that of x, that of y)."""

# The median of N²/2 distances needs them all at once; beyond this many samples, that of a random subset is taken.
# Evenly spaced rows may all be of one class, where classes take turns.
MEDIAN_ROWS = 2048
# Of a centred panel of all samples, so that it stays in a cache.
PANEL_BYTES = 8 * 2**20
# Units in the last place that centring leaves of samples which are all the same.
ULPS = 8


def widths(sigma: Sigma) -> tuple[float, float]:
    """σ of x and σ of y.

    Raises:
        ValueError: not two, or one is not > 0.
    """
    pair = sigma if isinstance(sigma, (tuple, list)) else (sigma, sigma)
    if len(pair) != 2:
        raise ValueError(f"sigma must be a number, or one for x and one for y, got {sigma}")
    for width in pair:
        check_positive("sigma", width)
    return pair[0], pair[1]


def centered_rows(x_ND: Tensor, dtype: torch.dtype) -> Tensor:
    """x minus its mean over the samples, contiguous, in `dtype`."""
    x = x_ND.to(dtype)
    return (x - x.mean(dim=0, keepdim=True)).contiguous()


class Centered:
    """x minus its mean over the samples in `dtype`, a panel of its features at a time.

    A copy of all of x would be as large as x, and twice as large as one in 16 bits; small ones are copied once.
    """

    def __init__(self, x_ND: Tensor, dtype: torch.dtype):
        self.x, self.dtype = x_ND, dtype
        small = x_ND.numel() * dtype.itemsize <= PANEL_BYTES
        self._whole = centered_rows(x_ND, dtype) if small else None
        # PyTorch casts all of a tensor before it takes a mean in another dtype.
        means = [] if small else [x_ND[:, panel].to(dtype).mean(dim=0) for panel in self.panels()]
        self._mean = torch.cat(means) if means else x_ND.new_empty(0)

    def __len__(self) -> int:
        return self.x.shape[0]

    def panels(self) -> Iterator[slice]:
        """Features, as many at a time as fit into PANEL_BYTES for all samples; multiples of 64."""
        n, dim = self.x.shape
        wide = dim if self._whole is not None else max(64, PANEL_BYTES // (n * self.dtype.itemsize) // 64 * 64)
        for start in range(0, dim, wide):
            yield slice(start, min(start + wide, dim))

    def part(self, rows: slice, panel: slice) -> Tensor:
        """(I, P) samples `rows`, features `panel`; a view of a small x, else new."""
        if self._whole is not None:
            return self._whole[rows, panel]
        taken, mean = self.x[rows, panel], self._mean[panel]
        return taken - mean if taken.dtype == self.dtype else taken.to(self.dtype).sub_(mean)


def squared_distances(x_ND: Tensor) -> Tensor:
    """(N, N) squared distances in the dtype of x, ≥ 0, with a diagonal of exact zeros. The definition."""
    x = x_ND - x_ND.mean(dim=0, keepdim=True)
    gram = x @ x.mT
    norms = gram.diagonal()  # of the same product: its rounding cancels
    d2 = (norms[:, None] + norms[None, :] - 2 * gram).clamp_min(0)
    return d2 * (1 - torch.eye(x.shape[0], dtype=x.dtype, device=x.device))


def gamma(x_ND: Tensor, sigma: float, bandwidth: Bandwidth) -> Tensor:
    """The factor of −D in the exponent, a detached float64 scalar on the device of x; the host never waits for it.

    Args:
        sigma: kernel width of `paper` and `reference`; not used by `median`.
        bandwidth: `paper` 1/(2σ²); `reference` 1/(2σ²·D) with D features, as in the MIMIR authors' code;
            `median` 1/(2·median of the off-diagonal squared distances), Gretton et al. 2005's heuristic. Beyond
            `MEDIAN_ROWS` samples it is the median among that many, drawn as a function of N. A median below
            `median_floor` counts as that.
    """
    check_choice("bandwidth", bandwidth, BANDWIDTHS)
    if bandwidth == "median":
        return _gamma(_median_squared_distance(x_ND.detach()), median_floor(x_ND))
    check_positive("sigma", sigma)
    dim = x_ND.shape[1] if bandwidth == "reference" else 1
    return torch.full((), 1 / (2 * sigma**2 * dim), dtype=torch.float64, device=x_ND.device)


def gamma_or_later(x_ND: Tensor, sigma: float, bandwidth: Bandwidth) -> Tensor:
    """`gamma`, or an empty tensor where `pair_sums` finds it on its way: by the median rule of few samples."""
    if bandwidth == "median" and x_ND.shape[0] <= MEDIAN_ROWS:
        return x_ND.new_empty(0, dtype=torch.float64)
    return gamma(x_ND, sigma, bandwidth)


def gamma_of_median(d2_M: Tensor, floor: Tensor) -> Tensor:
    """The median rule's γ from the squared distances of all M pairs, each once: float64 scalar."""
    return _gamma(_of_rank(d2_M, (len(d2_M) - 1) // 2), floor)


def median_floor(x_ND: Tensor) -> Tensor:
    """What rounding makes of a squared distance of 0, ULPS² eps² times the mean of ‖x_i‖²: float64 scalar.

    At least 1e-30, so that γ is a float32.
    """
    dtype = accumulation_dtype(x_ND)
    norm = torch.linalg.vector_norm(x_ND.detach(), dtype=dtype).double()
    return ((ULPS * torch.finfo(dtype).eps * norm).square() / x_ND.shape[0]).clamp_min(1e-30)


def _of_rank(numbers: Tensor, rank: int) -> Tensor:
    """The number with `rank` others before it, as a float64 scalar."""
    # kthvalue is linear, but runs on a single block of a GPU; a radix sort there is faster, and waits for nothing.
    on_cpu = numbers.device.type == "cpu"
    return (numbers.kthvalue(rank + 1).values if on_cpu else numbers.sort().values[rank]).double()


def _gamma(median: Tensor, floor: Tensor) -> Tensor:
    return 1 / (2 * torch.maximum(median, floor))


def median_squared_distance_reference(x_ND: Tensor) -> Tensor:
    """The (lower) median of the squared distances between different samples: float64 scalar on the device of x.

    Of more than `MEDIAN_ROWS` samples that of so many, drawn as a function of N.
    """
    n = x_ND.shape[0]
    if n > MEDIAN_ROWS:
        first = torch.zeros(1, dtype=torch.int64, device=x_ND.device)
        drawn = random_bits(0, Stream.MEDIAN_ROWS, 0, first, n)[0].argsort(stable=True)[:MEDIAN_ROWS]
        x_ND, n = x_ND[drawn], MEDIAN_ROWS
    with full_precision(x_ND.device):
        d2 = squared_distances(x_ND.to(accumulation_dtype(x_ND))).flatten()
    # Each pair occurs twice, after the n zeros of the diagonal.
    return _of_rank(d2, n + (n * (n - 1) - 1) // 2)


@register_op("median_squared_distance", median_squared_distance_reference)
def _median_squared_distance(x_ND: Tensor) -> Tensor:
    return median_squared_distance_reference(x_ND)


@_median_squared_distance.register_fake
def _(x_ND: Tensor) -> Tensor:
    return x_ND.new_empty((), dtype=torch.float64)
