"""torch.compile, layer by layer: one graph for each situation that a run really meets.

All layers of a class share their code, and torch gives up on a code after 8 variants: from then on it runs eagerly,
with a warning in a log that nobody reads. A run needs more: encoder and decoder, the decoder's last layer, attack
(frozen) and training, with and without gradients, whole and last short batches, and as many stages as a family has. So
the limit is raised, and shapes are never generalised (`dynamic=False`): a graph of symbols would be slower for all.
Where the raised limit is reached all the same, torch says so once for the code concerned.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

LIMIT = 128
"""Variants of one layer's code. Four stages, shifted and not, in six modes, two batch sizes and two decoders are 96."""


def compile_layers(layers: Sequence[nn.Module], backend: str = "inductor") -> None:
    """Compile each layer in place, keeping its name and parameters."""
    options: dict[str, Any] = {}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = LIMIT
    else:  # older: one limit for the process
        from torch._dynamo import config

        config.recompile_limit = max(config.recompile_limit, LIMIT)
    for layer in layers:
        layer.compile(dynamic=False, backend=backend, **options)
