"""Running statistics of batch norms: state of a run that no gradient reaches.

They are treated as the weights are. A skipped step leaves them as they were; ranks keep one and the same, the mean of
what each has seen; the moving average of the weights has theirs beside it (ema.py); and what is computed again in a
backward pass is not counted twice (layers/norms.py). How much the means of ranks differ is not in the mean of their
variances: batches are not synchronised.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from mimir_fast.models.file_names import file_name


def running_statistics(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name in files, buffer) of every batch norm: means and variances, and counters of batches (int64)."""
    for prefix, module in model.named_modules():
        if isinstance(module, _NormBase):
            for name, buffer in module.named_buffers(recurse=False):
                yield file_name(model, f"{prefix}.{name}"), buffer


class StatisticsGuard:
    """Keeps running statistics sound over the optimiser steps of a run. Does nothing for models without."""

    def __init__(self, model: nn.Module) -> None:
        self._buffers = [buffer for _, buffer in running_statistics(model)]
        self._averaged = [buffer for buffer in self._buffers if buffer.is_floating_point()]
        self._before = [buffer.clone() for buffer in self._buffers]

    def before_step(self) -> None:
        """Remember them."""
        if self._buffers:
            torch._foreach_copy_(self._before, self._buffers)

    @torch.no_grad()
    def after_step(self, finite: Tensor) -> None:
        """As before where the step was skipped, else the mean over ranks. Collective.

        Args:
            finite: 0-d bool, false where the step was skipped; on the model's device.
        """
        for buffer, before in zip(self._buffers, self._before, strict=True):
            torch.where(finite, buffer, before, out=buffer)
        if self._averaged and dist.is_initialized():
            whole = torch.cat([buffer.flatten() for buffer in self._averaged])
            dist.all_reduce(whole)
            whole /= dist.get_world_size()
            pieces = whole.split([buffer.numel() for buffer in self._averaged])
            for buffer, piece in zip(self._averaged, pieces, strict=True):
                buffer.copy_(piece.view_as(buffer))
