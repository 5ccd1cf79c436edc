"""How do time and memory grow: of a MIMIR step with batch, tokens and depth, of HSIC with the number of samples?

    python -m benchmarks growth --output FILE.jsonl --plot FILE.png     a picture and a table of exponents

One quantity is changed, the others stay. An exponent of 1 is linear growth, 2 quadratic. Beside each stands that of the
FLOPs: where time grows more slowly than they do, fixed costs are still being paid off.
Shapes: B images, T patches of an image (a quarter of them visible), N samples.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import linear_regression

import torch

from benchmarks.case import Case, Provider, Size, in_double
from benchmarks.hsic import both_gradients, eager, image_like
from benchmarks.record import Record
from benchmarks.step import TOLERANCE
from benchmarks.training import ENCODERS, masked_flops, method_step, on_doubles, random_batch, seeded
from mimir_fast.methods.mimir import Mimir, MimirConfig, apply_preset
from mimir_fast.models.decoder import Decoder
from mimir_fast.models.families.vit import VitEncoder
from mimir_fast.models.masked_model import DECODERS, MaskedModel
from mimir_fast.ops.hsic import hsic, hsic_reference

AXES = {
    "growth_batch": ("batch", "images"),
    "growth_tokens": ("patches", "patches an image"),
    "growth_depth": ("depth", "encoder blocks"),
    "growth_hsic": ("N", "samples"),
}
PATCH = 16
# Batches, image sides, depths, samples; the middle of each range is the others' fixed value.
Values = tuple[list[int], list[int], list[int], list[int]]
FULL: Values = ([2, 4, 8, 16, 32, 64], [112, 224, 320, 448, 640, 896], [3, 6, 12, 24, 48], [512, 2048, 8192])
VALUES: dict[Size, Values] = {
    "tiny": ([2, 4], [32, 64], [2, 4], [16, 32]),
    "quick": ([2, 4, 8, 16, 32], [112, 224, 320, 448], [3, 6, 12, 24], [256, 512, 1024, 2048, 4096]),
    "full": FULL,
    "gpu": FULL,
}


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """A ViT-T step from its smallest to its largest, then HSIC of images and latents of 768 numbers."""
    batches, sides, depths, samples = VALUES[size]
    batch, side, depth = (4, 32, 2) if size == "tiny" else (8, 224, 12)
    for value in batches:
        yield step_case(device, "growth_batch", batch=value, side=side, depth=depth)
    for value in sides:
        yield step_case(device, "growth_tokens", batch=batch // 2, side=value, depth=depth)
    for value in depths:
        yield step_case(device, "growth_depth", batch=batch, side=side, depth=value)
    for value in samples:
        yield hsic_case(value, 768)


def step_case(device: torch.device, name: str, *, batch: int, side: int, depth: int) -> Case:
    """A MIMIR step by the paper's preset, ViT-T/16 with the light decoder and `depth` encoder blocks."""
    method = Mimir(apply_preset(MimirConfig(), "paper"))

    def provider(precision: str) -> Provider:
        step = method_step(of_depth(depth, side, device), method, bf16=precision == "bf16")
        return Provider(f"mimir_fast {precision}", step, TOLERANCE[precision], precision)

    return Case(
        name,
        {"batch": batch, "patches": (side // PATCH) ** 2, "depth": depth, "encoder": "tiny"},
        [provider("fp32"), provider("bf16")],
        baseline="mimir_fast fp32",
        make_inputs=partial(random_batch, batch, side),
        gate_inputs=partial(random_batch, 2, side),
        reference=on_doubles(method_step(of_depth(depth, side, device).double(), method)),
        flops=5.0 * batch * masked_flops("tiny", "light", side, PATCH, depth),
        items=batch,
    )


def of_depth(depth: int, side: int, device: torch.device) -> MaskedModel:
    """A ViT-T of so many blocks."""
    width, _, heads = ENCODERS["tiny"]

    def build() -> MaskedModel:
        encoder = VitEncoder(width, depth, heads, image_size=side, patch_size=PATCH)
        return MaskedModel(encoder, Decoder(encoder, *DECODERS["light"]))

    return seeded(build, device)


def hsic_case(n: int, width: int) -> Case:
    """Forward and backward, beside eager PyTorch's N×N matrices."""
    return Case(
        "growth_hsic",
        {"N": n, "Dx": width, "Dy": width},
        [Provider("mimir_fast", both_gradients(hsic)), Provider("eager", both_gradients(eager))],
        baseline="eager",
        make_inputs=partial(image_like, n, width, width),
        gate_inputs=partial(image_like, min(n, 1024), width, width),
        reference=in_double(both_gradients(hsic_reference)),
        tolerance=1e-4,
        flops=6.0 * n * n * width,
        items=n,
    )


def lines(cases: Sequence[Sequence[Record]]) -> dict[tuple[str, str], list[Record]]:
    """(case, provider) → its records, smallest first."""
    found: dict[tuple[str, str], list[Record]] = {}
    for record in (r for case in cases for r in case if r.case in AXES and r.ms):
        found.setdefault((record.case, record.impl), []).append(record)
    return {key: sorted(group, key=place) for key, group in found.items() if len(group) > 1}


def place(record: Record) -> float:
    """Where on its axis."""
    return float(record.params[AXES[record.case][0]])


def measured(record: Record) -> tuple[float, float]:
    """Milliseconds, and MiB beside weights and inputs; NaN where they are not known."""
    return record.ms["median"], record.peak_mem_mb or math.nan


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """a of y ∝ xᵃ, by least squares through the logarithms."""
    return linear_regression([*map(math.log, xs)], [*map(math.log, ys)]).slope


def table(cases: Sequence[Sequence[Record]]) -> str:
    """The exponents in Markdown: over the whole range, and between its two largest points."""
    rows = ["| against | | from … to | FLOPs | time | time, at the end | memory |", "| --- " * 7 + "|"]
    for (case, impl), records in lines(cases).items():
        xs, flops = [place(r) for r in records], [r.flops for r in records]
        ms, memory = zip(*map(measured, records), strict=True)
        exponents = exponent(xs, flops), exponent(xs, ms), exponent(xs[-2:], ms[-2:]), exponent(xs, memory)
        cells = " | ".join(f"{value:.2f}" for value in exponents)
        rows.append(f"| {AXES[case][1]} | {impl} | {xs[0]:.0f} … {xs[-1]:.0f} | {cells} |")
    return "\n".join(rows)


def draw(cases: Sequence[Sequence[Record]], path: Path) -> None:
    """Time above, memory below, one column an axis, both logarithmic; the dotted lines are linear growth."""
    from matplotlib.figure import Figure

    from benchmarks.plot import COMPILED, OTHERS, OURS, certificate

    colours = {"mimir_fast": OURS, "mimir_fast fp32": OURS, "mimir_fast bf16": COMPILED, "eager": OTHERS}
    groups = lines(cases)
    figure = Figure(figsize=(10, 5.5), dpi=160, layout="constrained")
    columns = list(dict.fromkeys(case for case, _ in groups))
    axes = figure.subplots(2, len(columns), squeeze=False, sharex="col")
    for (case, impl), records in groups.items():
        column = columns.index(case)
        xs = [place(r) for r in records]
        for row, ys in enumerate(zip(*map(measured, records), strict=True)):
            axis = axes[row][column]
            axis.plot(xs, ys, "o-", ms=4, color=colours[impl], label=impl)
            axis.plot(xs, [ys[0] * x / xs[0] for x in xs], ":", lw=1, color=colours[impl])
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks(xs, [f"{x:.0f}" for x in xs], fontsize=7)
            axis.tick_params(axis="y", labelsize=7)
            axis.minorticks_off()
            axis.grid(color="0.9")
            axis.spines[["top", "right"]].set_visible(False)
        axes[1][column].set_xlabel(AXES[case][1], fontsize=9)
        axes[0][column].legend(frameon=False, fontsize=7)
    axes[0][0].set_ylabel("milliseconds", fontsize=9)
    axes[1][0].set_ylabel("MiB beside the weights", fontsize=9)
    figure.supxlabel(certificate([r for group in groups.values() for r in group]), fontsize=7, color="0.4")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    print(table(cases))
