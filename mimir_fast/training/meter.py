"""Means of the scalars since the last reading, speed, waiting and memory."""

import resource
import time

import torch
from torch import Tensor

from mimir_fast.data.loaders.base import Loader
from mimir_fast.world import mean_over_ranks


class Meter:
    """Only reading waits for the device."""

    def __init__(self, batch_size: int, world_size: int, loader: Loader) -> None:
        self.batch_size, self.world_size, self.loader = batch_size, world_size, loader
        self.restart()

    def restart(self) -> None:
        """Forget what was added: the next reading counts from now on."""
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._steps, self._since, self._waited = 0, time.perf_counter(), self.loader.wait_seconds

    def add(self, metrics: dict[str, Tensor]) -> None:
        """The scalars of one step; not each step has each of them, but all ranks have the same."""
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0) + value.float()
            self._counts[name] = self._counts.get(name, 0) + 1
        self._steps += 1

    def read(self, device: torch.device) -> dict[str, float]:
        """Means over the steps that had them since the last call and over all ranks, and bad files; collective."""
        skipped = torch.tensor(float(len(self.loader.skipped)), device=device)
        own = [total / self._counts[name] for name, total in self._sums.items()]
        *means, skipped_files = mean_over_ranks(torch.stack([*own, skipped])).tolist()
        elapsed = time.perf_counter() - self._since
        values = dict(zip(self._sums, means, strict=True))
        values["images_per_s"] = self._steps * self.batch_size / elapsed
        values["data_wait"] = (self.loader.wait_seconds - self._waited) / elapsed
        values["memory_gib"] = memory_bytes(device) / 2**30
        if skipped_files:
            values["skipped_files"] = round(skipped_files * self.world_size)
        self.restart()
        return values


def memory_bytes(device: torch.device) -> int:
    """Peak memory: of the allocator on CUDA, of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
