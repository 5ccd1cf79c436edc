"""A rival in its own process: the same numbers, another process, and its failures reach us."""

import gc
import multiprocessing
import os

import pytest
import torch
from torch import Tensor

from benchmarks import apart
from benchmarks.apart import Apart


class Scaled:
    """A builder that can be found by name in the other process."""

    def __init__(self, factor: float) -> None:
        if factor == 0:
            raise ValueError("nothing to scale by")
        self.factor = factor

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if x.numel() == 0:
            raise ValueError("no numbers")
        return x * self.factor, torch.tensor(os.getpid()), torch.tensor(gc.isenabled())


def test_another_process_computes() -> None:
    rival = Apart(Scaled, factor=3.0)
    for _ in range(2):
        product, pid, collects = rival(torch.arange(4.0))
        assert product.tolist() == [0, 3, 6, 9]
        assert int(pid) == rival.pid != os.getpid()
        assert not collects  # not within a call, as here
    with pytest.raises(RuntimeError, match="no numbers"):
        rival(torch.empty(0))


def test_what_cannot_be_built_says_why() -> None:
    here, there = multiprocessing.Pipe()
    try:
        apart._serve(there, 1, Scaled, (), {"factor": 0.0})  # in this process, which has imported PyTorch already
    finally:
        gc.enable()
    failed, why = here.recv()
    assert failed and "nothing to scale by" in why  # as the failure of a call, which is raised above
