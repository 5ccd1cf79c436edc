"""torch.compile: one graph for each situation that a run really meets.

One process compiles the whole model: embedding, encoder and decoder are one graph, across whose layers kernels are
fused. DDP and FSDP compile layer by layer: DDP sends gradients while the backward pass goes on, which one graph would
hand out at its end, and FSDP gathers a layer's parameters in front of it. MIMIR's step on one thread of a Xeon with
AMX, ViT-T of 12 layers at 32², against that without compiling: whole −5 % in fp32 and −15 % in bf16 after 80 to 95 s of
compiling; by layers +3 % and −3 % after 50 to 60 s (docs/performance.md).

torch gives up on a code after 8 variants: from then on it runs eagerly. A run needs more: attack (frozen) and training,
with and without gradients, whole and last short batches; and all layers of a class share their code, in encoder and
decoder, the decoder's last layer, and as many stages as a family has. So the limit is raised, and shapes are never
generalised (`dynamic=False`): a graph of symbols would be slower for all. Where the raised limit is reached all the
same, torch says so once for the code concerned.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mimir_fast.layers.borrowing import FrozenFlag

LIMIT = 128
"""Variants of one code. Four stages, shifted and not, in six modes, two batch sizes and two decoders are 96."""


def compile_modules(modules: Sequence[nn.Module], backend: str = "inductor") -> None:
    """Compile each in place, keeping its name and parameters: the layers of a model, or the model itself."""
    _cache_for_these_instructions()
    options: dict[str, Any] = {}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = LIMIT
    else:  # older: one limit for the process
        from torch._dynamo import config

        config.recompile_limit = max(config.recompile_limit, LIMIT)
    for module in modules:
        module.register_forward_pre_hook(FrozenFlag())
        module.compile(dynamic=False, backend=backend, **options)


def _cache_for_these_instructions() -> None:
    """Let PyTorch's cache of graphs tell processors apart.

    torch 2.14 leaves the instructions out of its keys: a graph of a process with AVX-512 computes wrong numbers in one
    without, and one with AVX2 does not compile in one without.
    """
    from torch.compiler import config

    found = {name for name, there in torch.cpu.get_capabilities().items() if there and name.startswith(("avx", "amx"))}
    instructions = "-".join(["mimir-fast", torch.backends.cpu.get_cpu_capability(), *sorted(found)])
    if instructions not in config.cache_key_tag:
        config.cache_key_tag += instructions
