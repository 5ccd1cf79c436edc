"""The two ceilings of this machine, measured: bytes a second of a large copy, FLOPs a second of a large product.

No version of anything runs faster than max(flops / matmul rate, bytes / copy bandwidth): the roofline, which is also
what each record predicts before it is measured. On random data: a product of zeros runs 13 % faster on an H200.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from torch.utils.benchmark import Timer

from benchmarks.disturbance import undisturbed
from mimir_fast.ops._products import multiply

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True)
class Ceilings:
    """Rates of one device.

    Attributes:
        copy_gbps: bytes read plus bytes written by a copy, in GB/s.
        tflops: matmul rate by precision.
        disturbed: the largest share of the time that other work took from one of them.
    """

    copy_gbps: float
    tflops: dict[str, float] = field(default_factory=dict)
    disturbed: float = 0.0

    def floor_ms(self, flops: float, bytes_: float, precision: str) -> float:
        """The roofline: no version runs faster."""
        rate = self.tflops.get(precision, self.tflops["fp32"])
        return max(flops / (rate * 1e9), bytes_ / (self.copy_gbps * 1e6))


@cache
def measure(device: torch.device, *, tiny: bool = False) -> Ceilings:
    """Measure once a process; half a second on a CPU."""
    cuda = device.type == "cuda"
    count = 2**20 if tiny else 2**31 if cuda else 2**28
    side = 256 if tiny else 8192 if cuda else 1536
    source = torch.empty(count, dtype=torch.uint8, device=device).random_(generator=torch.Generator(device))
    target = torch.empty_like(source)
    copy_s, copy_lost = undisturbed(lambda: _seconds(lambda: target.copy_(source)))
    tflops, shares = {}, [copy_lost]
    for name, dtype in DTYPES.items():
        n = side // 2 if name == "fp64" else side
        a, b = (torch.randn(n, n, device=device, generator=torch.Generator(device)).to(dtype) for _ in range(2))
        product_s, share = undisturbed(partial(_seconds, partial(multiply, a, b.mT)))
        tflops[name] = 2 * n**3 / product_s / 1e12
        shares.append(share)
    return Ceilings(2 * count / copy_s / 1e9, tflops, max(shares))


def _seconds(run: Callable[[], object]) -> float:
    """Median of a call; torch's timer warms up, and waits for a GPU."""
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=0.1).median)
