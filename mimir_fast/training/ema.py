"""Exponential moving average of the weights, and of the running statistics that belong to them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mimir_fast.models.file_names import parameters_by_file_name
from mimir_fast.training.statistics import running_statistics


class Ema:
    """θ̄ ← decay·θ̄ + (1 − decay)·θ for every trainable parameter, kept in the parameter's own layout.

    Means and variances of batch norms too: averaged weights under the statistics of other weights classify worse.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"ema_decay={decay}, wanted 0 < decay < 1 (or 0 to switch it off)")
        self.decay = decay
        self.tensors: dict[str, Tensor] = {n: p for n, p in parameters_by_file_name(model) if p.requires_grad}
        self.tensors |= {name: b for name, b in running_statistics(model) if b.is_floating_point()}
        self.average = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take one step towards the current weights."""
        torch._foreach_lerp_(list(self.average.values()), list(self.tensors.values()), 1 - self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by the tensors' names in files."""
        return self.average

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The averages in the weights' place meanwhile, whatever happens."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, tensor in self.tensors.items():
            kept = tensor.detach().clone()
            tensor.copy_(self.average[name])
            self.average[name].copy_(kept)
