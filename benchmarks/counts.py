"""What a training step would ask of a GPU, counted without one: `python -m benchmarks.counts`.

`operators.py` sees each operator of the step, on tensors that have shapes and no numbers.

launches   operators that compute: views and allocations launch nothing. A library may need two kernels for one
bytes      each operator reads its operands and writes its results once
FLOPs      of products and attention, by the formulas of torch.utils.flop_counter
syncs      reading a number on the host fails on the meta device, so a step that was counted has none
fused      what is left after the fusions of an ideal compiler: operators that are no products, attention or sums over
           samples become one kernel with those that feed them, unless a product lies between
roofline   the sum over kernels of max(FLOPs / rate, bytes / bandwidth): no step of these kernels is faster

`--write` puts the tables into docs/performance.md and the counts into predictions.json; a test holds them there.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.operators import BANDWIDTH, FLOPS, META, Call, Key, Recorder, meta_batch, record, total
from benchmarks.predictions import FILE
from mimir_fast.methods.classification import ClassificationConfig
from mimir_fast.methods.mimir import Mimir, MimirConfig, apply_preset
from mimir_fast.methods.pgd import Pgd
from mimir_fast.models.classifier import ClassifierConfig, build_classifier
from mimir_fast.models.masked_model import ModelConfig, build_masked_model
from mimir_fast.training.optimizer import OptimizerConfig, build_optimizer

BATCH, SIDE, CLASSES = 256, 224, 1000
# FLOPs a second of attention on an H100 as its authors published them for long sequences (arXiv:2407.08608): at 197
# tokens neither is reached.
FLASH_2, FLASH_3 = 350e12, 600e12
PAGE = Path(__file__).parents[1] / "docs/performance.md"
BEGIN, END = "<!-- made by python -m benchmarks.counts --write -->", "<!-- to here -->"


def mimir_step(encoder: str) -> tuple[nn.Module, Recorder]:
    """A pre-training step of the paper's method with the light decoder."""
    with META:
        model = build_masked_model(ModelConfig(encoder=encoder, patch_size=16), SIDE)
    method = Mimir(apply_preset(MimirConfig(), "paper"))
    return model, record(lambda: method(model, meta_batch(BATCH, SIDE), seed=0, step=0)["loss"])


def pgd_step(encoder: str) -> tuple[nn.Module, Recorder]:
    """A fine-tuning step with PGD-10."""
    with META:
        model = build_classifier(ClassifierConfig(encoder=encoder, patch_size=16, drop_path=0.0), SIDE, CLASSES).train()
    config = ClassificationConfig()
    method = Pgd(replace(config, attack=replace(config.attack, num_steps=10)))
    return model, record(lambda: method(model, meta_batch(BATCH, SIDE), seed=0, step=0)["loss"])


STEPS = {"MIMIR": (mimir_step, 1), "PGD-10": (pgd_step, 10)}
"""Name → the step, and how often its attack goes through the model."""
ENCODERS = {"ViT-S/16": "small", "ViT-B/16": "base", "ViT-L/16": "large"}


def optimizer_kernels(model: nn.Module) -> list[Call]:
    """The gradients' norm and fused AdamW: PyTorch's multi-tensor kernels, so many tensors and blocks a launch."""
    kernels = []
    groups = [group["params"] for group in build_optimizer(model, OptimizerConfig()).param_groups]
    for name, parameters, tensors, bytes_each in [
        ("norm", list(model.parameters()), 110, 4),
        *(("adamw", parameters, 36, 28) for parameters in groups),
    ]:
        blocks = sum(-(-p.numel() // 65_536) for p in parameters)
        launches = max(-(-len(parameters) // tensors), -(-blocks // 320))
        size = bytes_each * sum(p.numel() for p in parameters) // launches
        kernels += [Call(name, {(0, 0): size}, {}, 0, True, 0) for _ in range(launches)]
    return kernels


def count(name: str) -> dict[str, Any]:
    """What predictions.json holds of a step, such as `MIMIR ViT-S/16`: counts and the gains they promise, in ms."""
    step, model_name = name.split(" ")
    run, passes = STEPS[step]
    model, recorder = run(ENCODERS[model_name])
    after = optimizer_kernels(model)
    eager, kernels = recorder.calls + after, recorder.fused() + after
    fused = total(kernels)
    forward = fused.flops * passes / (2 * passes + 3)  # an attack's pass is a forward and a backward of the same FLOPs
    attention = sum(call.flops for call in kernels if "attention" in call.name)
    saved = {
        "fuse": total(eager).seconds - fused.seconds,
        "neighbours": once_read(kernels) / BANDWIDTH,
        "fp8": forward / FLOPS / 2,
        "attention": attention * (1 / FLASH_2 - 1 / FLASH_3),
        "casts": repeated_casts(recorder.calls) / BANDWIDTH,
    }
    return {
        "eager": total(eager).rounded(),
        "fused": fused.rounded(),
        "uploads": recorder.uploads,
        "gains_ms": {gain: round(1e3 * seconds, 1) for gain, seconds in saved.items()},
    }


def once_read(kernels: Sequence[Call]) -> int:
    """Bytes written by a kernel for one other alone, a product on one side and none on the other, and read by it."""
    readers: dict[Key, list[Call]] = defaultdict(list)
    for kernel in kernels:
        for key in kernel.reads:
            readers[key].append(kernel)
    alone = ((k, size, readers[key]) for k in kernels for key, size in k.writes.items() if len(readers[key]) == 1)
    return sum(2 * size for kernel, size, (reader,) in alone if bool(kernel.flops) != bool(reader.flops))


def repeated_casts(calls: Sequence[Call]) -> int:
    """Bytes of casting what was cast before: the attack's weights, which autocast does not keep."""
    seen: set[Key] = set()
    moved = 0
    for call in calls:
        if call.name == "_to_copy":
            moved += (sum(call.reads.values()) + sum(call.writes.values())) * (call.reads.keys() <= seen)
            seen |= call.reads.keys()
    return moved


GAINS = {
    "fuse": ("`--compile`: one kernel for norms, GELU, sums and casts between two products", "last bits"),
    "neighbours": ("norm in front of a product, GELU and residual sum behind it, by its own kernel", "last bits"),
    "fp8": ("the attack's forward products in fp8 (torchao), at twice the rate", "signs of the attack: opt-in"),
    "attention": ("attention at FlashAttention 3's or cuDNN's rate instead of FlashAttention 2's", "last bits"),
    "casts": ("the attack keeps its bf16 weights for all its steps", "nothing"),
}


def tables(counts: dict[str, Any]) -> str:
    """The part of docs/performance.md that is made here."""
    lines = [
        "| step | launches | GB moved | TFLOP | roofline, ms | fused: launches | GB | roofline, ms |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in counts.items():
        eager, fused = found["eager"], found["fused"]
        numbers = [*eager.values(), fused["launches"], fused["GB"], fused["ms"]]
        lines.append(f"| {name} | {' | '.join(f'{number:,}' for number in numbers)} |")
    shown = [name for name in counts if "ViT-B" in name]
    lines += ["", f"| could save, ms | {' | '.join(shown)} | what it changes |", "| --- " * (len(shown) + 2) + "|"]
    for gain in sorted(GAINS, key=lambda gain: -sum(counts[name]["gains_ms"][gain] for name in shown)):
        words, changes = GAINS[gain]
        lines.append(f"| {words} | {' | '.join(str(counts[name]['gains_ms'][gain]) for name in shown)} | {changes} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables, and write them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counts", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.name} and {FILE.name}")
    options = parser.parse_args(arguments)
    counts = {f"{step} {model}": count(f"{step} {model}") for step in STEPS for model in ENCODERS}
    print(tables(counts))
    if options.write:
        # Shares are written by hand, one a line; the counts follow them.
        before, known, _ = FILE.read_text().partition(',\n  "step_counts"')
        before = before if known else before.rstrip().removesuffix("}").rstrip()
        rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(found)}" for name, found in counts.items())
        FILE.write_text(f'{before},\n  "step_counts": {{\n{rows}\n  }}\n}}\n')
        before, _, after = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(f"{before}{BEGIN}\n\n{tables(counts)}\n\n{END}{after.partition(END)[2]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
