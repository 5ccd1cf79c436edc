"""The other encoder families and methods: what does each cost beside what it replaces?

    aemim_step           an AEMIM step beside a MAE step of the same model: two streams and a feature attack
    convit_step          a MIMIR step of ConViT beside the authors' code (`--official PATH`), same weights and batch
    convnext_forward     the visible quarter through a masked ConvNeXt beside timm's whole images: masked convolution is
                         dense only where patches meet, so it should cost less than the plain one, not more
Shapes: B images, N patches, K kept.
"""

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks.authors import authors_step, why_not
from benchmarks.case import Case, Outputs, Provider, Size
from benchmarks.step import as_double, optimizer_step, random_batch
from mimir_fast.data.batch import Batch
from mimir_fast.methods.aemim import Aemim, AemimConfig
from mimir_fast.methods.mae import Mae, MaeConfig
from mimir_fast.methods.mimir import Mimir, MimirConfig, apply_preset
from mimir_fast.models.masked_model import MaskedModel, ModelConfig, View, build_masked_model
from mimir_fast.ops.patches import patchify_gather
from mimir_fast.ops.random_masks import random_masks

SEED, STEP = 0, 0


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """Small images for `tiny`, the promises' 224² otherwise."""
    side, batch = (32, 2) if size == "tiny" else (224, 16)
    for decoder in ("mae",) if size != "full" else ("mae", "light"):
        yield aemim_case(device, side, batch, decoder, encoder="tiny" if size == "tiny" else "small")
    yield convit_case(device, side, batch, encoder="nano" if size == "tiny" else "small")
    yield convnext_case(device, side, batch, encoder="nano" if size == "tiny" else "tiny")


def build(config: ModelConfig, side: int, device: torch.device) -> MaskedModel:
    """The same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return build_masked_model(config, side).to(device)


def aemim_case(device: torch.device, side: int, batch: int, decoder: Any, *, encoder: str) -> Case:
    """AEMIM and MAE on the same images."""
    plain = build(ModelConfig(encoder=encoder, decoder=decoder), side, device)
    twofold = build(ModelConfig(encoder=encoder, decoder=decoder, adapters=True), side, device)
    aemim, mae = Aemim(AemimConfig()), Mae(MaeConfig())

    def run(model: MaskedModel, method: Any, *, exact: bool = False) -> Any:
        if exact:
            import copy

            model = copy.deepcopy(model).double()
        step = optimizer_step(model, lambda m, b: method(m, b, seed=SEED, step=STEP), bf16=False)
        return (lambda inputs: step(as_double(inputs))) if exact else step

    return Case(
        "aemim_step",
        {"encoder": encoder, "decoder": decoder, "image": side, "patch": 16, "batch": batch, "dtype": "fp32"},
        [
            Provider("mimir_fast AEMIM", run(twofold, aemim)),
            Provider("mimir_fast MAE", run(plain, mae), reference=run(plain, mae, exact=True)),
        ],
        baseline="mimir_fast MAE",
        make_inputs=lambda seed: random_batch(batch, side, device, seed),
        gate_inputs=lambda seed: random_batch(2, side, device, seed),
        reference=run(twofold, aemim, exact=True),
        tolerance=(1e-3, 5e-2),
        items=batch,
        ratios={"AEMIM / MAE": ("mimir_fast AEMIM", "mimir_fast MAE")},
    )


def convit_case(device: torch.device, side: int, batch: int, *, encoder: str) -> Case:
    """MIMIR on ConViT: ours by its two presets, and the authors' code."""
    patch = 16 if side == 224 else 8
    model = build(ModelConfig(family="convit", encoder=encoder, patch_size=patch), side, device)
    pseudo = build(ModelConfig(family="convit", encoder=encoder, patch_size=patch, positions="official"), side, device)
    config, official = (apply_preset(MimirConfig(), preset) for preset in ("paper", "official"))

    def ours(which: MaskedModel, config: MimirConfig) -> Any:
        method = Mimir(config)
        return optimizer_step(which, lambda m, b: method(m, b, seed=SEED, step=STEP), bf16=False)

    skip = why_not() or ("" if encoder != "nano" else "theirs has no such size")

    def rival() -> Any:
        if skip:
            return lambda inputs: ()
        step = authors_step(
            f"mae_convit_{encoder}", model.state_dict(), official, image_size=side, patch_size=patch, device=device,
            bf16=False,
        )  # fmt: skip
        return lambda inputs: step(inputs.images, inputs.labels)

    def same_loss(inputs: Batch, outputs: Outputs) -> str:
        wanted = float(ours(pseudo, official)(inputs)[0])
        found = float(outputs[0])
        return "" if abs(found - wanted) < 0.05 * wanted else f"a loss of {found:.3f}, ours is {wanted:.3f}"

    return Case(
        "convit_step",
        {"encoder": encoder, "image": side, "patch": patch, "batch": batch, "dtype": "fp32"},
        [
            Provider("mimir_fast ConViT MIMIR", ours(model, config)),
            Provider("mimir_fast ConViT MIMIR official", ours(pseudo, official), law=same_loss,
                     note="the authors' pseudo-grid, own mask for the attack, nHSIC"),
            Provider("authors ConViT MIMIR", rival(), law=same_loss, skip=skip, note="draws of their own"),
        ],
        baseline="mimir_fast ConViT MIMIR official" if skip else "authors ConViT MIMIR",
        make_inputs=lambda seed: random_batch(batch, side, device, seed),
        gate_inputs=lambda seed: random_batch(min(batch, 4), side, device, seed),
        reference=ours(model, config),
        tolerance=(1e-3, 2e-2),
        items=batch,
        ratios={
            "authors / ours": ("authors ConViT MIMIR", "mimir_fast ConViT MIMIR"),
            "authors / ours official": ("authors ConViT MIMIR", "mimir_fast ConViT MIMIR official"),
        },
    )  # fmt: skip


def convnext_case(device: torch.device, side: int, batch: int, *, encoder: str) -> Case:
    """The visible quarter through ours, everything through ours and through timm's."""
    from mimir_fast.models.families import find_family

    stem = 4 if side == 224 else 2
    config = ModelConfig(family="convnext", encoder=encoder, patch_size=stem)
    model = build(config, side, device).eval()
    exported = find_family("convnext").to_timm(model.encoder.state_dict(), config.architecture(side))
    module, _, name = exported.path.rpartition(".")
    plain = getattr(import_module(module), name)(**exported.arguments).to(device).eval()
    plain.load_state_dict(exported.tensors, strict=False)
    unit, N = model.patch_size, model.num_patches

    @torch.no_grad()
    def masked(inputs: tuple[Tensor, Tensor]) -> Outputs:
        images, keep = inputs
        return (model(View(patchify_gather(images, keep, unit), keep), decode=False),)

    @torch.no_grad()
    def dense(inputs: tuple[Tensor, Tensor]) -> Outputs:
        return (plain.forward_features(inputs[0]),)

    def make_inputs(seed: int, count: int = batch) -> tuple[Tensor, Tensor]:
        images = random_batch(count, side, device, seed).images.float() / 255
        return images, random_masks(torch.arange(count, device=device), N, max(1, N // 4), seed=seed, step=0)[0]

    def finite(inputs: Any, outputs: Outputs) -> str:
        return "" if bool(outputs[0].isfinite().all()) else "not finite"

    return Case(
        "convnext_forward",
        {"encoder": encoder, "image": side, "unit": unit, "batch": batch, "kept": "1/4", "dtype": "fp32"},
        [
            Provider("mimir_fast masked ConvNeXt", masked),
            Provider("timm ConvNeXt", dense, law=finite, note="all patches, no mask"),
        ],
        baseline="timm ConvNeXt",
        make_inputs=make_inputs,
        gate_inputs=lambda seed: make_inputs(seed, 2),
        reference=masked,
        tolerance=1e-5,
        items=batch,
        ratios={"masked / plain": ("mimir_fast masked ConvNeXt", "timm ConvNeXt")},
    )
