"""Floating-point operations of a training step: by them, budgets are equal whatever machine and load are.

Matrix products, convolutions and attention are counted while a step runs, its attack included, by PyTorch's formulas.
In double precision every layer runs as PyTorch's own operations, for which there are some.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from mimir_fast.data.batch import Batch
from mimir_fast.methods.registry import find_method, passes_of
from mimir_fast.models.classifier import build_classifier
from mimir_fast.models.masked_model import build_masked_model
from mimir_fast.sizes import height_width
from mimir_fast.training.finetuning import FinetuneConfig
from mimir_fast.training.pretraining import PretrainConfig

IMAGES = 4  # in the step that is counted: operations grow in proportion
CLASSES = 10


class _Counter(TorchDispatchMode):
    """torch's FlopCounterMode without its names of modules, whose hooks do not take gradients to the input alone."""

    def __init__(self, formulas: Mapping[Any, Any]) -> None:
        super().__init__()
        self.formulas, self.total = formulas, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (formula := self.formulas.get(func._overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def flops_of_step(config: PretrainConfig | FinetuneConfig) -> float:
    """Of an optimiser step of a run, on average: attacks may come in every N-th step only, and batches be replayed.

    Raises:
        ValueError: the attack grows while training goes on.
    """
    from torch.utils.flop_counter import flop_registry  # imports Triton

    size, channels = config.data.image_size, config.data.channels
    model: nn.Module
    if isinstance(config, PretrainConfig):
        entry = find_method("pretrain", config.method)
        model = build_masked_model(config.model, size, channels, CLASSES if entry.labels else 0)
    else:
        entry = find_method("finetune", config.method)
        model = build_classifier(config.model, size, CLASSES, channels)
    method: Any = entry.build(config.objective)
    samples = torch.arange(IMAGES)
    images = torch.randint(256, (IMAGES, channels, *height_width(size)), dtype=torch.uint8)
    batch = Batch(images, samples % CLASSES, samples, torch.zeros_like(samples))
    model.double().train()
    if getattr(method.config.attack, "ramp_steps", 0):
        raise ValueError("attack.ramp_steps: no number of steps is an average of the run; leave it at 0 here")
    period = getattr(method.config.attack, "every", 1) * getattr(method, "replays", 1)
    with _Counter(flop_registry) as counter, sdpa_kernel(SDPBackend.MATH):
        for step in range(period):
            (run,) = passes_of(method, model, [batch], seed=0, step=step)
            run()["loss"].backward()
    return counter.total / period * config.run.batch_size / IMAGES
