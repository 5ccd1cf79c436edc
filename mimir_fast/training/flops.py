"""Floating-point operations of a training step, and how much of what a device can do they are.

Matrix products, convolutions and attention of a step are counted by PyTorch's formulas, its attack included, on the
meta device: tensors there have shapes alone, so that it takes a second for any model. In double precision every layer
runs as PyTorch's own operations, for which there are formulas.

    MFU = FLOPs of a step / (seconds of a step · ranks · FLOPs a second at the peak of one device)

Chowdhery et al. (PaLM), arXiv 2204.02311, appendix B: what the model needs, so neither what activation checkpointing
computes again nor the estimators of dependence count. The peak is that of dense bf16 products, without sparsity.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from mimir_fast.data.batch import Batch
from mimir_fast.methods.registry import find_method, passes_of
from mimir_fast.models.classifier import build_classifier
from mimir_fast.models.masked_model import ModelConfig, build_masked_model
from mimir_fast.sizes import height_width

IMAGES = 4  # in the step that is counted: operations grow in proportion
CLASSES = 10

# Words of torch.cuda.get_device_name → bf16 FLOPs a second by the vendor's data sheet; the first that fit count.
PEAKS: Mapping[str, float] = {
    "GB200": 2.5e15, "B200": 2.25e15, "GH200": 989e12, "H200 NVL": 835e12, "H200": 989e12, "H100 NVL": 835e12,
    "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "A40": 149.7e12, "A30": 165e12, "L40S": 362e12, "L40": 181e12,
    "L4": 121e12, "MI325X": 1307e12, "MI300X": 1307e12, "MI250X": 191.5e12, "MI250": 181e12,
}  # fmt: skip


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


def flops_of_step(config: Any) -> float:
    """Of an optimiser step of a run, on average: attacks may come in every N-th step only, and batches be replayed.

    Args:
        config: a PretrainConfig or FinetuneConfig.
    Raises:
        ValueError: the attack grows while training goes on.
    """
    from torch.utils.flop_counter import flop_registry  # imports Triton

    size, channels = config.data.image_size, config.data.channels
    model: nn.Module
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        if isinstance(config.model, ModelConfig):
            entry = find_method("pretrain", config.method)
            model = build_masked_model(config.model, size, channels, CLASSES if entry.labels else 0)
        else:
            entry = find_method("finetune", config.method)
            model = build_classifier(config.model, size, CLASSES, channels)
    method: Any = entry.build(config.objective)
    samples = torch.arange(IMAGES)
    images = torch.zeros(IMAGES, channels, *height_width(size), dtype=torch.uint8)
    batch = Batch(*(t.to("meta") for t in (images, samples % CLASSES, samples, torch.zeros_like(samples))))
    model.double().train()
    attack = getattr(method.config, "attack", None)
    if getattr(attack, "ramp_steps", 0):
        raise ValueError("attack.ramp_steps: no number of steps is an average of the run; leave it at 0 here")
    period = getattr(attack, "every", 1) * getattr(method, "replays", 1)
    with _Counter(flop_registry) as counter, sdpa_kernel(SDPBackend.MATH):
        for step in range(period):
            (run,) = passes_of(method, model, [batch], seed=0, step=step)
            run()["loss"].backward()
    return counter.total / period * config.run.batch_size / IMAGES


def peak_flops(device: torch.device, *, bf16: bool) -> float | None:
    """FLOPs a second of a device at its peak; None where they are not known, and without bf16."""
    if device.type != "cuda" or not bf16:
        return None
    name = torch.cuda.get_device_name(device)
    if "MIG" in name:  # a part of a device
        return None
    # Whole words: an RTX A4000 is no A40.
    return next((peak for words, peak in PEAKS.items() if re.search(rf"\b{words}\b", name)), None)
