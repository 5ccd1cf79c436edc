"""A whole pre-training step: what does MIMIR cost beside MAE, and how much faster is it than the plain way?

Forward, attack, backward, gradient norm, AdamW, with the package's own methods, models and optimiser. By FLOPs a MIMIR
step is 5/3 of a MAE step: an attack's forward and input-backward on top of forward and backward.
Floor: 24 D² + 4 T D FLOPs a token and block, visible tokens in the encoder, all of them in the decoder.
Shapes: T tokens, D width.
"""

import copy
import os
from collections.abc import Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import plain_mimir
from benchmarks.authors import authors_provider
from benchmarks.case import Case, Outputs, Provider, Size
from benchmarks.products import Products, forward_shapes
from benchmarks.training import (
    SEED,
    STEP,
    Step,
    build_model,
    masked_flops,
    method_step,
    on_doubles,
    optimizer_step,
    random_batch,
    some_view,
)  # fmt: skip
from mimir_fast.data.batch import Batch
from mimir_fast.layers.attention import xformers_failure
from mimir_fast.methods.adv_mae import AdvMae
from mimir_fast.methods.mae import Mae
from mimir_fast.methods.mimir import Mimir, MimirConfig, apply_preset
from mimir_fast.methods.step import MaskedStep
from mimir_fast.models.masked_model import DecoderName, ModelConfig
from mimir_fast.training.distributed import World, parallelize

# Of (loss, gradient norm). The norm follows the signs of the attack's gradient, which make more of rounding than
# rounding is; but not much more: fp32 shows 4e-6 and bf16 0.01 at the most.
TOLERANCE = {"fp32": (1e-5, 1e-4), "bf16": (1e-3, 5e-2)}

# encoder, decoder, image side, patch, batch
Setting = tuple[str, DecoderName, int, int, int]
SETTINGS: dict[Size, list[Setting]] = {
    "tiny": [("tiny", "light", 32, 16, 2)],
    "quick": [("tiny", "light", 224, 16, 8)],
    "full": [("small", "light", 224, 16, 16), ("tiny", "light", 32, 2, 64)],
    "gpu": [
        ("small", "light", 224, 16, 256),
        ("base", "light", 224, 16, 256),
        ("base", "mae", 224, 16, 512),
        ("large", "light", 224, 16, 256),
    ],
}


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """fp32 on a CPU, with bf16 beside it; bf16, eager and compiled, on a GPU."""
    for setting in SETTINGS[size]:
        yield case(device, setting)


def case(device: torch.device, setting: Setting) -> Case:
    """MIMIR and MAE, ours, plain and the authors', on the same batch."""
    encoder, decoder, side, patch_size, batch = setting
    config, official = (apply_preset(MimirConfig(), preset) for preset in ("paper", "official"))
    build = partial(build_model, ModelConfig(encoder=encoder, patch_size=patch_size, decoder=decoder), side, device)
    model, exact = build(), build().double()
    paper, by_their_preset, mae = Mimir(config), Mimir(official), Mae(config)
    cuda = device.type == "cuda"
    main = "bf16" if cuda else "fp32"
    forward = batch * masked_flops(encoder, decoder, side, patch_size)
    products = forward_shapes(lambda: exact(some_view(exact)), batch)
    # MIMIR's attack is a forward and an input-backward more.
    of_mae = {"flops": 3 * forward, "products": Products(products, (1, 1, 1))}

    def ours(name: str, method: Mae, precision: str, step: Step | None = None, **more: Any) -> Provider:
        """Held against the same method in float64."""
        step = step or method_step(model, method, bf16=precision == "bf16")
        reference = None if method is paper else on_doubles(method_step(exact, method))
        more |= of_mae if method is mae else {}
        return Provider(
            in_precision(name, precision), step, TOLERANCE[precision], precision, reference=reference, **more
        )

    def in_precision(name: str, precision: str) -> str:
        return name if precision == main else f"{name}, {precision}"

    def plain(batch: Batch) -> Tensor:
        return plain_mimir.losses(MaskedStep(model, batch, SEED, STEP), config)["loss"]

    def four(precision: str) -> list[Provider]:
        by_hand = optimizer_step(model, plain, bf16=precision == "bf16", plain=True)
        return [
            ours("mimir_fast MIMIR", paper, precision),
            ours("mimir_fast MIMIR official", by_their_preset, precision,
                 note="own mask for the attack, whole images, nHSIC"),
            ours("mimir_fast MAE", mae, precision),
            ours("plain MIMIR", paper, precision, by_hand,
                 note="all patches embedded, all predicted, whole-image attack, HSIC on the host"),
        ]  # fmt: skip

    def authors(precision: str, *, adversarial: bool = True) -> Provider:
        method, more = (by_their_preset, {}) if adversarial else (mae, of_mae)
        return authors_provider(
            in_precision(f"authors {'MIMIR' if adversarial else 'MAE'}", precision),
            f"mae_vit_{'ti' if encoder == 'tiny' else encoder}_dec128d2b", model, official, method_step(model, method),
            bf16=precision == "bf16", adversarial=adversarial,
            unknown="" if decoder == "light" else "theirs has no such decoder", **more,
        )  # fmt: skip

    providers = [*four(main), authors(main), authors(main, adversarial=False)]
    ratios = {
        "MIMIR / MAE": ("mimir_fast MIMIR", "mimir_fast MAE"),
        "official / MAE": ("mimir_fast MIMIR official", "mimir_fast MAE"),
        "authors / ours": ("authors MIMIR", "mimir_fast MIMIR"),
        "authors / ours official": ("authors MIMIR", "mimir_fast MIMIR official"),
    }
    if cuda:
        bf16 = partial(method_step, bf16=True)
        fast = copy.deepcopy(model)
        parallelize(fast, "single", World(0, 1, device), bf16=True, compiled=True)
        providers += [
            ours("mimir_fast adv-MAE", AdvMae(config), "bf16", note="no mutual information"),
            ours("mimir_fast MIMIR, SDPA", paper, "bf16", with_sdpa(bf16(model, paper)),
                 note="forward passes through SDPA where xformers would run", skip=xformers_failure() or ""),
            ours("mimir_fast MIMIR", paper, "fp32"),
            ours("mimir_fast MIMIR, unfused AdamW", paper, "bf16", bf16(model, paper, plain=True)),
            ours("mimir_fast MIMIR compiled", paper, "bf16", bf16(fast, paper)),
            ours("mimir_fast MAE compiled", mae, "bf16", bf16(fast, mae)),
        ]  # fmt: skip
        ratios["MIMIR / MAE, compiled"] = ("mimir_fast MIMIR compiled", "mimir_fast MAE compiled")
    else:
        providers += [*four("bf16"), authors("bf16")]
        ratios["authors fp32 / ours bf16"] = ("authors MIMIR", "mimir_fast MIMIR, bf16")
        ratios["authors bf16 / ours bf16"] = ("authors MIMIR, bf16", "mimir_fast MIMIR, bf16")
        ratios["MIMIR / MAE, bf16"] = ("mimir_fast MIMIR, bf16", "mimir_fast MAE, bf16")
    return Case(
        "pretrain_step",
        {"encoder": encoder, "decoder": decoder, "image": side, "patch": patch_size, "batch": batch, "dtype": main},
        providers,
        baseline="plain MIMIR",
        make_inputs=partial(random_batch, batch, side),
        gate_inputs=partial(random_batch, min(batch, 16), side),
        reference=on_doubles(method_step(exact, paper)),
        flops=5 * forward,
        products=Products(products, (2, 2, 1)),
        precision=main,
        items=batch,
        ratios=ratios,
    )


def with_sdpa(step: Step) -> Step:
    """The same with every attention through `scaled_dot_product_attention`."""

    def run(batch: Batch) -> Outputs:
        with patch.dict(os.environ, MIMIR_FAST_ATTENTION="sdpa"):
            return step(batch)

    return run
