"""Extra peak memory of a call: what it needs beside its inputs, outputs included.

On CUDA the allocator knows. On a CPU the kernel does: Linux keeps the high-water mark of a process's resident memory
and resets it on demand, so one call is measured exactly, without sampling and without a process of its own. What the
C library has kept from earlier calls is given back first (`malloc_trim`), or it would hide the next use of it.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch


def extra_peak_mb(call: Callable[[], object], device: torch.device, process: int | None = None) -> float | None:
    """MiB above the level before the call, of this process or another; None where it cannot be known (no /proc)."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        del outputs
        return (peak - before) / 2**20
    folder = Path("/proc") / str(process or "self")
    try:
        _give_back()
        (folder / "clear_refs").write_text("5")  # proc(5): reset the peak resident set size
        before = _status_kib(folder, "VmRSS")
        outputs = call()
        peak = _status_kib(folder, "VmHWM")
    except OSError:
        return None
    del outputs
    return max(0, peak - before) / 1024


def _give_back() -> None:
    """Return free heap memory to the system."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # another C library keeps less, or says nothing
        return


def _status_kib(folder: Path, field: str) -> int:
    line = next(line for line in (folder / "status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])
