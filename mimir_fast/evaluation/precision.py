"""Evaluation runs in true fp32: no autocast, no TF32.

An attack climbs on tiny differences of the loss; rounding them away looks like robustness (gradient masking).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def strict_fp32(device: torch.device) -> Iterator[None]:
    """fp32 matmuls and convolutions without TF32 or autocast; the settings come back on leaving."""
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn
