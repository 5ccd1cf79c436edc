"""A step's own matrix products, and the rate at which this machine computes them one after the other.

The ceiling of `ceilings.py` is one large square product; those of a small model's step are smaller and run at another
rate, so a record of a step says what part of both rates it reaches. The list comes from the model itself: each product
of its forward pass, and for each the two of a backward pass. By `torch.mm`, or the library that is faster here
(`mimir_fast/ops/_products.py`), in the precision of the record.
Shapes: x (M, K) inputs, w (N, K) weights, g (M, N) gradients of the outputs.
"""

import timeit
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils import benchmark
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.ceilings import DTYPES
from benchmarks.disturbance import undisturbed
from mimir_fast.ops._products import multiply

SAMPLE_S = 0.03  # a product; a step has some fifty different ones


@dataclass(frozen=True)
class Products:
    """The matrix products of a step.

    Attributes:
        shapes: (M, K, N) → how often one forward pass computes x wᵀ.
        passes: how often a step goes through them to compute outputs x wᵀ, input gradients g w, weight gradients gᵀ x.
    """

    shapes: Counter[tuple[int, int, int]]
    passes: tuple[int, int, int]

    def tflops(self, precision: str, device: torch.device) -> tuple[float, float]:
        """FLOPs of all of them over the seconds of all of them; and the largest share that other work took of one."""
        measured = {shape: product_seconds(*shape, precision, device) for shape in self.shapes}
        work_s = [
            (count * times, 2 * m * k * n, one_s)
            for (m, k, n), count in self.shapes.items()
            for times, one_s in zip(self.passes, measured[m, k, n][0], strict=True)
        ]
        rate = sum(often * flops for often, flops, _ in work_s) / sum(often * s for often, _, s in work_s) / 1e12
        return rate, max(share for _, share in measured.values())


def forward_shapes(forward: Callable[[], object], batch: int) -> Counter[tuple[int, int, int]]:
    """`Products.shapes` of a batch.

    Args:
        forward: a forward pass of one image in float64, where no product is hidden in a fused op.
    """
    shapes: Counter[tuple[int, int, int]] = Counter()

    def mm(x: torch.Size, wt: torch.Size, *_: Any, **__: Any) -> int:
        shapes[(batch * x[0], x[1], wt[1])] += 1
        return 0

    def addmm(bias: torch.Size, x: torch.Size, wt: torch.Size, *_: Any, **__: Any) -> int:
        return mm(x, wt)

    watched = {torch.ops.aten.mm: mm, torch.ops.aten.addmm: addmm}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=watched):
        forward()
    return shapes


@cache
def product_seconds(
    m: int, k: int, n: int, precision: str, device: torch.device
) -> tuple[tuple[float, float, float], float]:
    """Of x wᵀ, g w and gᵀ x, medians, and the share that other work took; measured once a process."""
    rng = torch.Generator(device)
    x, w, g = (torch.randn(s, device=device, generator=rng).to(DTYPES[precision]) for s in ((m, k), (n, k), (m, n)))
    return undisturbed(lambda: (_seconds(x, w.mT), _seconds(g, w), _seconds(g.mT, x)))


def _seconds(a: Tensor, b: Tensor) -> float:
    calls = 10 if a.is_cuda else 1  # the wait for a GPU's queue is long beside one product
    clock = timeit.Timer(partial(multiply, a, b.mT), timer=benchmark.timer)
    clock.timeit(calls)
    repeats = SAMPLE_S / clock.timeit(calls)
    return median(clock.repeat(max(5, min(200, round(repeats))), calls)) / calls
