"""Exponential moving average of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mimir_fast.models.file_names import parameters_by_file_name


class Ema:
    """θ̄ ← decay·θ̄ + (1 − decay)·θ for every trainable parameter, kept in the parameter's own layout."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"ema_decay={decay}, wanted 0 < decay < 1 (or 0 to switch it off)")
        self.decay = decay
        self.parameters = {name: p for name, p in parameters_by_file_name(model) if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take one step towards the current weights."""
        torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name."""
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
        for name, parameter in self.parameters.items():
            kept = parameter.detach().clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(kept)
