"""Extra peak memory of a call: what it needs beside its inputs, outputs included.

On CUDA the allocator knows. On a CPU the kernel does: Linux keeps the high-water mark of a process's resident memory
and resets it on demand, so one call is measured exactly, without sampling and without a process of its own. What the
C library has kept from earlier calls is given back first (`malloc_trim`), or it would hide the next use of it.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from benchmarks.apart import Apart


def extra_peak_mb(call: Callable[[], object], device: torch.device, apart: "Apart | None" = None) -> float | None:
    """MiB above the level before the call, of this process or of the one that does the work; None without /proc."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        del outputs
        return (peak - before) / 2**20
    folder = Path("/proc") / ("self" if apart is None else str(apart.pid))
    try:
        (give_back if apart is None else apart.give_back)()
        (folder / "clear_refs").write_text("5")  # proc(5): reset the peak resident set size
        before = _status_kib(folder, "VmRSS")
        outputs = call()
        peak = _status_kib(folder, "VmHWM")
    except OSError:
        return None
    del outputs
    return max(0, peak - before) / 1024


def give_back() -> None:
    """Return free heap memory to the system."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # another C library keeps less, or says nothing
        return


def _status_kib(folder: Path, field: str) -> int:
    line = next(line for line in (folder / "status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])
