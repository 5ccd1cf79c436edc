"""In which precision products are computed when the user leaves it to us."""

import time
from dataclasses import dataclass
from functools import cache

import torch

from mimir_fast.ops._products import multiply
from mimir_fast.training.run_config import Precision

WORTH_IT = 1.5  # bf16 changes results a little; it should pay
ROUNDS = 20
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
    if not multiplies_bf16():
        return Choice("fp32", "this processor has no bf16 products")
    ratio = bf16_speedup()
    return Choice("bf16" if ratio >= WORTH_IT else "fp32", f"bf16 products are {ratio:.1f}x as fast as fp32 here")


def multiplies_bf16() -> bool:
    """Whether the processor has instructions for it (AMX, AVX-512's bf16, Arm's); elsewhere bf16 is emulated."""
    known = torch.cpu.get_capabilities()
    return any(bool(present) for name, present in known.items() if "bf16" in name or name.startswith("amx"))


@cache
def bf16_speedup() -> float:
    """How much faster this processor multiplies bf16 matrices than fp32 ones (milliseconds of measuring, once).

    By turns, on one core and the fastest of each, because others may use the machine: two threads that wait for each
    other there take as long as a time slice of the scheduler, whatever they multiply.
    """
    m, k, n = _SHAPE
    a, b = torch.ones(m, k), torch.ones(n, k)
    pairs = ((a, b), (a.bfloat16(), b.bfloat16()))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for pair in pairs:
            multiply(*pair)  # makes the kernel
        fp32, bf16 = zip(*([_seconds(*pair) for pair in pairs] for _ in range(ROUNDS)), strict=True)
    finally:
        torch.set_num_threads(threads)
    return float(min(fp32) / min(bf16))


@torch.no_grad()
def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    start = time.perf_counter()
    multiply(a, b)
    return time.perf_counter() - start
