"""A whole pre-training step: what does MIMIR cost beside MAE, and how much faster is it than the plain way?

Forward, attack, backward, gradient norm, AdamW, with the package's own methods, models and optimiser. By FLOPs a MIMIR
step is 5/3 of a MAE step: an attack's forward and input-backward on top of forward and backward.
Floor: 24 D² + 4 T D FLOPs a token and block, visible tokens in the encoder, all of them in the decoder.
Shapes: T tokens, D width.
"""

import copy
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import plain_mimir
from benchmarks.apart import Apart
from benchmarks.authors import authors_step, why_not
from benchmarks.case import Case, Outputs, Provider, Size
from benchmarks.products import Products, forward_shapes
from benchmarks.training import (
    SEED,
    STEP,
    Run,
    build_model,
    masked_flops,
    method_step,
    on_doubles,
    optimizer_step,
    random_batch,
    some_view,
)  # fmt: skip
from mimir_fast.data.batch import Batch
from mimir_fast.methods.adv_mae import AdvMae
from mimir_fast.methods.mae import Mae, MaskedMethod
from mimir_fast.methods.mimir import Mimir, MimirConfig, apply_preset
from mimir_fast.models.attention import xformers_failure
from mimir_fast.models.masked_model import DecoderName, MaskedModel, ModelConfig
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
}
ON_GPU: list[Setting] = [
    ("small", "light", 224, 16, 256),
    ("base", "light", 224, 16, 256),
    ("base", "mae", 224, 16, 512),
    ("large", "light", 224, 16, 256),
]


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """fp32 on a CPU, with bf16 beside it; bf16, eager and compiled, on a GPU."""
    for setting in ON_GPU if device.type == "cuda" and size != "tiny" else SETTINGS[size]:
        yield case(device, setting)


def case(device: torch.device, setting: Setting) -> Case:
    """MIMIR and MAE, ours and plain, on the same batch."""
    encoder, decoder, side, patch_size, batch = setting
    config, official = (apply_preset(MimirConfig(), preset) for preset in ("paper", "official"))
    build = partial(build_model, ModelConfig(encoder=encoder, patch_size=patch_size, decoder=decoder), side, device)
    model, exact = build(), build().double()
    paper, mae = Mimir(config), Mae(config)
    forward = batch * masked_flops(encoder, decoder, side, patch_size)
    products = forward_shapes(lambda: exact(some_view(exact)), batch)
    # A MAE step's; MIMIR's attack is a forward and an input-backward more.
    of_mae = {"flops": 3 * forward, "products": Products(products, (1, 1, 1))}
    cuda = device.type == "cuda"
    main = "bf16" if cuda else "fp32"

    def plain(batch: Batch) -> Tensor:
        draws = paper.draw(model, batch, seed=SEED, step=STEP)
        return plain_mimir.losses(model, batch.images, draws, config)["loss"]

    def provider(
        name: str, method: MaskedMethod, precision: str = main, model: MaskedModel = model, **more: Any
    ) -> Provider:
        """Ours; held against the same method in float64."""
        name += "" if precision == main else f", {precision}"
        step = more.pop("run", None) or method_step(
            model, method, bf16=precision == "bf16", plain=more.pop("plain", False)
        )
        reference = None if method is paper else on_doubles(method_step(exact, method))
        more |= of_mae if method is mae else {}
        return Provider(name, step, TOLERANCE[precision], precision, reference=reference, **more)

    def four(precision: str) -> list[Provider]:
        by_hand = optimizer_step(model, plain, bf16=precision == "bf16", plain=True)
        return [
            provider("mimir_fast MIMIR", paper, precision),
            provider("mimir_fast MIMIR official", Mimir(official), precision,
                     note="own mask for the attack, whole images, nHSIC"),
            provider("mimir_fast MAE", mae, precision),
            provider("plain MIMIR", paper, precision, run=by_hand,
                     note="all patches embedded, all predicted, whole-image attack, HSIC on the host"),
        ]  # fmt: skip

    providers = four(main) + rivals(model, setting, official, device, of_mae)
    ratios = {
        "MIMIR / MAE": ("mimir_fast MIMIR", "mimir_fast MAE"),
        "official / MAE": ("mimir_fast MIMIR official", "mimir_fast MAE"),
        "authors / ours": ("authors MIMIR", "mimir_fast MIMIR"),
        "authors / ours official": ("authors MIMIR", "mimir_fast MIMIR official"),
    }
    if cuda:
        providers += [
            provider("mimir_fast adv-MAE", AdvMae(config), note="no mutual information"),
            provider("mimir_fast MIMIR, SDPA", paper, run=with_sdpa(method_step(model, paper, bf16=True)),
                     note="forward passes through SDPA where xformers would run", skip=xformers_failure() or ""),
            provider("mimir_fast MIMIR", paper, "fp32"),
            provider("mimir_fast MIMIR, unfused AdamW", paper, plain=True),
        ]  # fmt: skip
        fast = copy.deepcopy(model)
        parallelize(fast, "single", World(0, 1, device), bf16=True, compiled=True)
        for name, method in (("MIMIR", paper), ("MAE", mae)):
            providers.append(provider(f"mimir_fast {name} compiled", method, model=fast))
        ratios["MIMIR / MAE, compiled"] = ("mimir_fast MIMIR compiled", "mimir_fast MAE compiled")
    else:
        providers += four("bf16")
        ratios["authors fp32 / ours bf16"] = ("authors MIMIR", "mimir_fast MIMIR, bf16")
        ratios["authors bf16 / ours bf16"] = ("authors MIMIR, bf16", "mimir_fast MIMIR, bf16")
        ratios["MIMIR / MAE, bf16"] = ("mimir_fast MIMIR, bf16", "mimir_fast MAE, bf16")
    return Case(
        "pretrain_step",
        {"encoder": encoder, "decoder": decoder, "image": side, "patch": patch_size, "batch": batch, "dtype": main},
        providers,
        baseline="plain MIMIR",
        make_inputs=lambda seed: random_batch(batch, side, device, seed),
        gate_inputs=lambda seed: random_batch(min(batch, 16), side, device, seed),
        reference=on_doubles(method_step(exact, paper)),
        tolerance=TOLERANCE[main],
        flops=5 * forward,
        products=Products(products, (2, 2, 1)),
        precision=main,
        items=batch,
        ratios=ratios,
    )


def with_sdpa(step: Run) -> Run:
    """The same with every attention through `scaled_dot_product_attention`."""

    def run(batch: Batch) -> Outputs:
        with patch.dict(os.environ, MIMIR_FAST_ATTENTION="sdpa"):
            return step(batch)

    return run


def rivals(
    model: MaskedModel, setting: Setting, config: MimirConfig, device: torch.device, of_mae: dict[str, Any]
) -> list[Provider]:
    """The authors' own MIMIR and MAE steps, from a checkout the user names; `of_mae` is said of the latter."""
    encoder, decoder, side, patch, _ = setting
    skip = why_not() or ("" if decoder == "light" and encoder != "nano" else "theirs has no such model")
    if skip:
        return [Provider("authors MIMIR", lambda inputs: (), skip=skip)]
    theirs = f"mae_vit_{'ti' if encoder == 'tiny' else encoder}_dec128d2b"

    def provider(name: str, adversarial: bool, precision: str) -> Provider:
        step = authors_step(
            theirs, model.state_dict(), config, image_size=side, patch_size=patch, device=device,
            bf16=precision == "bf16", adversarial=adversarial,
        )  # fmt: skip
        ours = method_step(model, Mimir(config) if adversarial else Mae(config))
        apart = step if isinstance(step, Apart) else None
        note = "their public code, own draws" + (", in its own process" if apart else "")
        more = {} if adversarial else of_mae
        return Provider(name, step, precision=precision, law=same_loss(ours), note=note, process=apart, **more)

    main = "bf16" if device.type == "cuda" else "fp32"
    found = [provider("authors MIMIR", True, main), provider("authors MAE", False, main)]
    return found if main == "bf16" else [*found, provider("authors MIMIR, bf16", True, "bf16")]


def same_loss(ours: Run) -> Callable[[Batch, Outputs], str]:
    """The law of a step with draws of its own: its loss is that of `ours` within 5 %."""

    def law(inputs: Batch, outputs: Outputs) -> str:
        wanted, found = float(ours(inputs)[0]), float(outputs[0])
        return "" if abs(found - wanted) < 0.05 * wanted else f"a loss of {found:.3f}, ours is {wanted:.3f}"

    return law
