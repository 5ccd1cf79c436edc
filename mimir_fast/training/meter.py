"""Means of the scalars since the last reading, speed, waiting and memory.

A step takes as long as its slowest rank, so of times and memory the largest of all ranks counts. They travel in the one
reduction of a reading: a sum in which each rank fills places of its own, and zeros elsewhere.
"""

import resource
import time

import torch
from torch import Tensor

from mimir_fast.data.loaders.base import Loader
from mimir_fast.world import World, mean_over_ranks


class Meter:
    """Only reading waits for the device."""

    def __init__(self, batch_size: int, world: World, loader: Loader) -> None:
        self.batch_size, self.world, self.loader = batch_size, world, loader
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

    def read(self) -> dict[str, float]:
        """Means over the steps that had them since the last call and over all ranks, and what follows; collective.

        step_s: seconds a step took on the slowest rank. images_per_s: of all ranks, at that pace. data_wait: the share
        of the time for which the rank that waited longest for data did so; with several ranks, data_wait_rank is its
        number. memory_gib: the most that a rank has held. skipped_files: unreadable ones, of all ranks, if any.
        """
        device, ranks = self.world.device, self.world.size
        own = torch.stack([total / self._counts[name] for name, total in self._sums.items()])
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # until then the steps have been queued, not made
        elapsed = time.perf_counter() - self._since
        waited = self.loader.wait_seconds - self._waited
        mine = [elapsed / self._steps, waited / elapsed, memory_bytes(device) / 2**30, float(len(self.loader.skipped))]
        places = torch.zeros(ranks, len(mine), device=device)
        places[self.world.rank] = torch.tensor(mine, device=device)
        together = mean_over_ranks(torch.cat([own, places.flatten()])).cpu()
        each = together[len(own) :].view(ranks, -1) * ranks
        step_s, data_wait, memory, _ = each.amax(dim=0).tolist()
        values = dict(zip(self._sums, together.tolist(), strict=False))
        values |= {"step_s": step_s, "images_per_s": self.batch_size / step_s, "data_wait": data_wait}
        if ranks > 1:
            values["data_wait_rank"] = int(each[:, 1].argmax())
        values["memory_gib"] = memory
        if skipped_files := round(each[:, 3].sum().item()):
            values["skipped_files"] = skipped_files
        self.restart()
        return values


def memory_bytes(device: torch.device) -> int:
    """Peak memory: of the allocator on CUDA, of the process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
