"""What pre-training on many GPUs would take, computed and not measured: `python -m benchmarks.plan`.

FLOPs of a step     5 forward passes an image: the attack's forward and input-backward, forward, backward (2)
compute             FLOPs / (share × peak), for a low and a high share of the bf16 peak
gradients           reduce-scatter in the node, all-reduce of the shards between nodes, all-gather in the node
optimiser           28 bytes a parameter (four numbers read, three written) over the memory's bandwidth
memory              16 bytes a parameter (fp32 weight, gradient, two moments), 2 for bf16 copies, activations of the
                    training pass: 38 vectors of 2-byte numbers a token and block
loading             images/s over what a core decodes, or times the bytes of a 256² uint8 image
"""

import argparse
from dataclasses import dataclass, fields
from functools import cache
from typing import cast

import torch

from benchmarks.training import ENCODERS, masked_flops
from mimir_fast.models.masked_model import DECODERS, DecoderName, ModelConfig, build_masked_model

GPUS = (8, 64, 512)
MODELS = (("small", "light"), ("base", "light"), ("large", "light"), ("base", "mae"))
SIDE, PATCH = 224, 16
VECTORS = 38  # kept for the backward pass, a token and block, when nothing is fused
RAW_BYTES = 3 * 256**2


@dataclass(frozen=True)
class Assumptions:
    """Everything that is not arithmetic; each is an option of the command line."""

    peak_tflops: float = 790.0
    """bf16 products of one GPU, dense: measured on one H200 (data sheet: 989)."""
    memory_gbps: float = 4300.0
    """GB/s of the GPU's memory, measured there too."""
    low_share: float = 0.45
    """Share of the peak a step reaches, at the worst."""
    high_share: float = 0.55
    """And at the best."""
    nvlink_gbps: float = 450.0
    """GB/s in one direction between the GPUs of a node."""
    ib_gbps: float = 50.0
    """GB/s in one direction between nodes, for each GPU (400 Gb/s)."""
    gpus_per_node: int = 8
    """GPUs that share NVLink."""
    batch: int = 4096
    """Global batch."""
    epochs: int = 800
    """Passes over the data."""
    images: int = 1_281_167
    """In the training set (ImageNet-1k)."""
    core_images: float = 394.0
    """JPEG images a second one CPU core decodes."""


@cache
def num_parameters(encoder: str, decoder: str) -> int:
    """Of the real model, built without memory."""
    with torch.device("meta"):
        config = ModelConfig(encoder=encoder, decoder=cast(DecoderName, decoder), patch_size=PATCH)
        return sum(p.numel() for p in build_masked_model(config, SIDE).parameters() if p.requires_grad)


def activation_bytes(encoder: str, decoder: str) -> float:
    """Of one image in the training pass; the attack's are freed before."""
    (width, depth, _), (decoder_width, decoder_depth, _) = ENCODERS[encoder], DECODERS[decoder]
    patches = (SIDE // PATCH) ** 2
    numbers = (patches // 4 + 1) * width * depth + (patches + 1) * decoder_width * decoder_depth
    return 2.0 * VECTORS * numbers


def all_reduce_s(num_bytes: float, gpus: int, given: Assumptions) -> float:
    """Bandwidth alone, no latency: rings in the nodes, then rings of one GPU a node for each shard."""
    inside = min(gpus, given.gpus_per_node)
    nodes = gpus / inside
    in_node = 2 * (inside - 1) / inside * num_bytes / (given.nvlink_gbps * 1e9)
    return in_node + 2 * (nodes - 1) / nodes * (num_bytes / inside) / (given.ib_gbps * 1e9)


def plan(encoder: str, decoder: str, gpus: int, given: Assumptions) -> dict[str, float | tuple[float, float]]:
    """One model on so many GPUs: a column of the table → its number or range."""
    each = given.batch / gpus
    step_flops = 5 * each * masked_flops(encoder, decoder, SIDE, PATCH)
    slow, fast = (step_flops / (share * given.peak_tflops * 1e12) for share in (given.low_share, given.high_share))
    parameters = num_parameters(encoder, decoder)
    gradients = all_reduce_s(4 * parameters, gpus, given)
    # DDP sends while the training pass runs backward, two fifths of the step; the fast case hides the least.
    exposed = max(0.0, gradients - 0.4 * fast)
    activations = each * activation_bytes(encoder, decoder)
    optimizer = 28 * parameters / (given.memory_gbps * 1e9)
    low, high = (each / (compute + exposed + optimizer) for compute in (slow, fast))
    hours = given.epochs * given.images / gpus / 3600
    return {
        "images a GPU": each,
        "compute, ms": (1e3 * fast, 1e3 * slow),
        "optimiser, ms": 1e3 * optimizer,
        "gradients, ms": 1e3 * gradients,
        "not hidden, ms": 1e3 * exposed,
        "GB, DDP": (18 * parameters + activations) / 1e9,
        "GB, FSDP": ((16 / gpus + 2) * parameters + activations) / 1e9,
        "images/s a GPU": (low, high),
        "JPEG cores a GPU": (low / given.core_images, high / given.core_images),
        "raw GB/s a GPU": (low * RAW_BYTES / 1e9, high * RAW_BYTES / 1e9),
        "hours": (hours / high, hours / low),
    }


def digits(value: float | tuple[float, float]) -> str:
    """Three significant digits, thousands apart; `low … high`."""
    if isinstance(value, tuple):
        return " … ".join(map(digits, value))
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"


def table(given: Assumptions) -> str:
    """Markdown: models × GPUs."""
    rows = {
        f"| ViT-{encoder[0].upper()}/{PATCH}, {decoder} | {gpus} |": plan(encoder, decoder, gpus, given)
        for encoder, decoder in MODELS
        for gpus in GPUS
    }
    columns = list(next(iter(rows.values())))
    head = [f"| model, decoder | GPUs | {' | '.join(columns)} |", "| --- " * (2 + len(columns)) + "|"]
    return "\n".join([*head, *(f"{name} {' | '.join(map(digits, p.values()))} |" for name, p in rows.items())])


def parse(arguments: list[str] | None = None) -> Assumptions:
    """The assumptions from the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.plan", description="Computed, not measured.")
    for field in fields(Assumptions):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    return Assumptions(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    print(table(parse()))
