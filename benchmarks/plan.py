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


@dataclass(frozen=True)
class Plan:
    """One row; times in seconds, sizes in GB (1e9 bytes), all for one GPU unless it says otherwise."""

    compute_s: tuple[float, float]
    optimizer_s: float
    gradients_s: float
    exposed_s: float
    ddp_gb: float
    fsdp_gb: float
    images_s: tuple[float, float]
    hours: tuple[float, float]


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


def plan(encoder: str, decoder: str, gpus: int, given: Assumptions) -> Plan:
    """One model on so many GPUs."""
    each = given.batch / gpus
    step_flops = 5 * each * masked_flops(encoder, decoder, SIDE, PATCH)
    compute = tuple(step_flops / (share * given.peak_tflops * 1e12) for share in (given.low_share, given.high_share))
    parameters = num_parameters(encoder, decoder)
    gradients = all_reduce_s(4 * parameters, gpus, given)
    # DDP sends while the training pass runs backward, two fifths of the step; the fast case hides the least.
    exposed = max(0.0, gradients - 0.4 * min(compute))
    activations = each * activation_bytes(encoder, decoder)
    optimizer = 28 * parameters / (given.memory_gbps * 1e9)
    rates = [given.batch / (seconds + exposed + optimizer) / gpus for seconds in compute]
    hours = [given.epochs * given.images / (rate * gpus) / 3600 for rate in rates]
    return Plan(
        compute_s=(compute[0], compute[1]), optimizer_s=optimizer, gradients_s=gradients,
        exposed_s=exposed,
        ddp_gb=(18 * parameters + activations) / 1e9,
        fsdp_gb=((16 / gpus + 2) * parameters + activations) / 1e9,
        images_s=(rates[0], rates[1]), hours=(hours[0], hours[1]),
    )  # fmt: skip


def span(values: tuple[float, float], scale: float = 1.0) -> str:
    """`low … high`, three digits each."""
    low, high = sorted(value * scale for value in values)
    return f"{digits(low)} … {digits(high)}"


def digits(value: float) -> str:
    """Three significant digits, thousands apart."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"


def table(given: Assumptions) -> str:
    """Markdown: models × GPUs."""
    rows = [
        "| model, decoder | GPUs | images a GPU | compute, ms | optimiser, ms | gradients, ms "
        "| not hidden, ms | GB, DDP | GB, FSDP | images/s a GPU | JPEG cores a GPU | raw GB/s a GPU | hours |",
        "| --- " * 13 + "|",
    ]
    for encoder, decoder in MODELS:
        for gpus in GPUS:
            p = plan(encoder, decoder, gpus, given)
            cells = [
                f"ViT-{encoder[0].upper()}/{PATCH}, {decoder}", str(gpus), f"{given.batch / gpus:g}",
                span(p.compute_s, 1e3), digits(p.optimizer_s * 1e3), digits(p.gradients_s * 1e3),
                digits(p.exposed_s * 1e3), digits(p.ddp_gb),
                digits(p.fsdp_gb), span(p.images_s), span(p.images_s, 1 / given.core_images),
                span(p.images_s, RAW_BYTES / 1e9), span(p.hours),
            ]  # fmt: skip
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def parse(arguments: list[str] | None = None) -> Assumptions:
    """The assumptions from the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.plan", description="Computed, not measured.")
    for field in fields(Assumptions):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    return Assumptions(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    print(table(parse()))
