"""A function of tensors, recorded once as a CUDA graph and replayed: one launch in the place of some hundred.

A graph is work on fixed memory. Inputs are copied into it, results out of it, and what changes from call to call has to
be an input: the step number too, as a tensor on the device, so that each replay draws masks and noise of its own.
Weights are read where they lie: an optimiser that changes them in place is followed, shards that are gathered somewhere
else in each step are not. On other devices the function runs as it is, on the same memory.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WARM_UP = 3
"""Calls before the recording: kernels are compiled and chosen, workspaces are made."""

Function = Callable[..., Sequence[Tensor]]


class Replay:
    """The function, recorded for inputs of these shapes.

    Args:
        function: tensors → tensors, without looking at a number on the host.
        inputs: examples; all on one device.
    """

    def __init__(self, function: Function, inputs: Sequence[Tensor]) -> None:
        self._inputs = [tensor.clone() for tensor in inputs]
        self._function, self._device = function, inputs[0].device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._outputs: Sequence[Tensor] = ()
        if self._device.type == "cuda":
            self._record()

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The function's results for these inputs, in memory of their own."""
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given)
        if self._graph is None:
            return list(self._run())
        self._graph.replay()
        return [tensor.clone() for tensor in self._outputs]

    def _run(self) -> Sequence[Tensor]:
        device = self._device.type
        # Autocast keeps cast weights for the rest of its context: a graph would read them when they are long gone.
        with torch.autocast(
            device, torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device), cache_enabled=False
        ):
            return self._function(*self._inputs)

    def _record(self) -> None:
        aside = torch.cuda.Stream(self._device)
        aside.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                self._run()
        torch.cuda.current_stream(self._device).wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may go on: a loader's allocations are none of the graph's.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._outputs = self._run()
