"""In which precision products are computed when the user leaves it to us."""

import time
from dataclasses import dataclass
from functools import cache

import torch

from mimir_fast.ops._products import multiply
from mimir_fast.training.run_config import Precision

WORTH_IT = 2.0  # bf16 changes results a little; it should pay
_SHAPE = (800, 384, 1536)  # tokens, width, hidden width of a small ViT


@dataclass(frozen=True)
class Choice:
    """The precision of a run, fp32 or bf16, and the reason in words."""

    name: str
    reason: str

    @property
    def bf16(self) -> bool:
        """True where forward passes run under bf16 autocast."""
        return self.name == "bf16"


def choose_precision(wanted: Precision, device: torch.device, *, parity: bool, recorded: str | None) -> Choice:
    """What `auto` stands for here.

    Args:
        parity: the run promises the authors' numbers, so `auto` is fp32.
        recorded: what the checkpoint that is gone on from was trained in.
    """
    if wanted != "auto":
        return Choice(wanted, "as asked for")
    if recorded is not None:
        return Choice(recorded, "as before")
    if parity:
        return Choice("fp32", "preset of the authors' numbers; --precision bf16 is faster")
    if device.type == "cuda":
        return Choice("bf16", "CUDA")
    ratio = bf16_speedup()
    return Choice("bf16" if ratio >= WORTH_IT else "fp32", f"bf16 products are {ratio:.1f}x as fast as fp32 here")


@cache
def bf16_speedup() -> float:
    """How much faster this processor multiplies bf16 matrices than fp32 ones (0.1 s of measuring, once)."""
    m, k, n = _SHAPE
    a, b = torch.ones(m, k), torch.ones(k, n)
    slow = _seconds(a, b)
    return slow / _seconds(a.bfloat16(), b.bfloat16(), at_most=3 * slow)


@torch.no_grad()
def _seconds(a: torch.Tensor, b: torch.Tensor, at_most: float = float("inf")) -> float:
    """The fastest of several, because others may use the machine; where bf16 is emulated, one too slow is enough."""
    multiply(a, b.t())  # makes the kernel
    times: list[float] = []
    while len(times) < 8 and (not times or times[-1] < at_most):
        start = time.perf_counter()
        multiply(a, b.t())
        times.append(time.perf_counter() - start)
    return min(times)
