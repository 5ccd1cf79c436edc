"""Large CPU buffers are kept by the process instead of being given back to the kernel at each free.

A training step allocates the same tensors every time. glibc serves those above 32 MiB with a fresh mapping, and the
kernel clears every page of it on first touch: at ViT-S, batch 16, a fifth of a step is page faults.
"""

import ctypes
import sys

# glibc's <malloc.h>
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_PAD = 256 << 20  # the heap grows by this much at once


def keep_large_buffers() -> bool:
    """Let malloc reuse what was freed, for the rest of the process. CUDA tensors are not concerned.

    Resident memory then stays at its peak between steps; the peak of a training step did not change. Until the heap has
    settled, which takes some ten calls, a buffer may still land on fresh pages. Only for glibc.

    Returns:
        True when the settings were taken.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    # -1 is the largest size_t: never trim
    return all([libc.mallopt(_MMAP_MAX, 0), libc.mallopt(_TRIM_THRESHOLD, -1), libc.mallopt(_TOP_PAD, _PAD)])
