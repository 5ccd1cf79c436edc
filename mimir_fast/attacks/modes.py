"""Borrow a model for an attack in the mode the attack wants, and hand it back untouched.

`borrowed` (no_trace.py) guards gradients and their synchronisation; this file adds what a forward pass itself changes:
train/eval flags, BatchNorm's running statistics and the global random state that dropout draws from.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from mimir_fast.attacks.no_trace import borrowed

AttackMode = Literal["eval", "train", "as_is"]


@contextmanager
def borrowed_in_mode(model: nn.Module, mode: AttackMode = "as_is") -> Iterator[nn.Module]:
    """The bare module, in eval mode, train mode or as it is; on leaving, everything is as before.

    BatchNorm in train mode normalises with the batch's own statistics, as the training step will, but its running
    statistics stand still. Dropout draws from a copy of the random state.
    """
    if mode not in ("eval", "train", "as_is"):
        raise ValueError(f"mode={mode!r}, wanted 'eval', 'train' or 'as_is'")
    with borrowed(model) as module:
        flags = [(m, m.training) for m in module.modules()]
        if mode != "as_is":
            module.train(mode == "train")
        tracking = [m for m in module.modules() if isinstance(m, _NormBase) and m.training and m.track_running_stats]
        for norm in tracking:
            norm.track_running_stats = False
        try:
            with torch.random.fork_rng(_cuda_devices(module)):
                yield module
        finally:
            for norm in tracking:
                norm.track_running_stats = True
            for m, training in flags:
                m.training = training


def _cuda_devices(module: nn.Module) -> list[int]:
    """The GPUs whose random state a forward pass could touch; forking all visible ones would be slow.

    While a CUDA graph is recorded the state cannot be asked for, and must not be drawn from.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return []
    return sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
