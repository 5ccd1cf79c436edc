"""In which precision estimators compute, whatever the model around them runs in."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is, else float32: the precision of distances and gradients (scalar sums are float64)."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def no_autocast(device: torch.device) -> torch.autocast:
    """Matrix products are in the dtype of their operands, though the model around runs under autocast."""
    return torch.autocast("cpu" if device.type == "meta" else device.type, enabled=False)  # meta tensors have none


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """`no_autocast`, and no TF32 or bfloat16 inside float32 products, though `set_float32_matmul_precision` allows it.

    A bias of 5e-4 in a distance is the size of what HSIC measures. PyTorch knows the permission per process only: where
    nobody gave it nothing is touched, and where somebody did, the last of all threads inside gives it back. While
    torch.compile traces (torch.func inside a graph) it is left alone: the graph runs later.
    """
    with no_autocast(device), nullcontext() if torch.compiler.is_compiling() else _withdrawn[device.type == "cuda"]:
        yield


class _Withdrawal:
    """The permission for reduced precision, taken away while anybody is inside."""

    def __init__(self, backend: Any) -> None:
        self._backend, self._lock, self._inside, self._before = backend, threading.Lock(), 0, "ieee"

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = self._backend.matmul.fp32_precision
                if self._before in ("tf32", "bf16"):
                    self._backend.matmul.fp32_precision = "ieee"
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside and self._before in ("tf32", "bf16"):
                self._backend.matmul.fp32_precision = self._before


_withdrawn = (_Withdrawal(torch.backends.mkldnn), _Withdrawal(torch.backends.cuda))
