"""The other encoder families and methods: what does each cost beside what it replaces?

    aemim_step           an AEMIM step beside a MAE step of the same model: two streams and a feature attack
    convit_step          a MIMIR step of ConViT beside the authors' code (`--official PATH`), same weights and batch
    convnext_forward     the visible quarter through a masked ConvNeXt beside timm's whole images: masked convolution is
                         dense only where patches meet, so it should cost less than the plain one, not more
Shapes: B images, N patches, K kept.
"""

import copy
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks.authors import authors_provider
from benchmarks.case import Case, Provider, Size, finite, in_double, run_of
from benchmarks.patches import draw_ids
from benchmarks.step import TOLERANCE
from benchmarks.training import Step, build_model, method_step, on_doubles, random_batch
from mimir_fast.methods.aemim import Aemim, AemimConfig
from mimir_fast.methods.mae import Mae, MaeConfig
from mimir_fast.methods.mimir import Mimir, MimirConfig, apply_preset
from mimir_fast.models.masked_model import MaskedModel, ModelConfig, View
from mimir_fast.ops.patches import patchify_gather


def cases(device: torch.device, size: Size) -> Iterator[Case]:
    """Small images for `tiny`, the promises' 224² otherwise."""
    tiny = size == "tiny"
    side, batch = (32, 2) if tiny else (224, 16)
    for decoder in ("mae", "light") if size in ("full", "gpu") else ("mae",):
        yield aemim_case(device, side, batch, decoder, encoder="tiny" if tiny else "small")
    yield convit_case(device, side, batch, encoder="nano" if tiny else "small")
    yield convnext_case(device, side, batch, encoder="nano" if tiny else "tiny")


def aemim_case(device: torch.device, side: int, batch: int, decoder: Any, *, encoder: str) -> Case:
    """AEMIM and MAE on the same images."""

    def model_for(method: Mae) -> MaskedModel:
        config = ModelConfig(encoder=encoder, decoder=decoder, adapters=isinstance(method, Aemim))
        return build_model(config, side, device)

    def ours(name: str, method: Mae) -> Provider:
        exact = on_doubles(method_step(model_for(method).double(), method))
        return Provider(name, method_step(model_for(method), method), reference=exact)

    return Case(
        "aemim_step",
        {"encoder": encoder, "decoder": decoder, "image": side, "patch": 16, "batch": batch, "dtype": "fp32"},
        [ours("mimir_fast AEMIM", Aemim(AemimConfig())), ours("mimir_fast MAE", Mae(MaeConfig()))],
        baseline="mimir_fast MAE",
        make_inputs=partial(random_batch, batch, side),
        gate_inputs=partial(random_batch, 2, side),
        tolerance=(1e-4, 1e-3),  # of loss and gradient norm; 2e-5 was seen, with the large decoder
        items=batch,
        ratios={"AEMIM / MAE": ("mimir_fast AEMIM", "mimir_fast MAE")},
    )


def convit_case(device: torch.device, side: int, batch: int, *, encoder: str) -> Case:
    """MIMIR on ConViT: ours by its two presets, and the authors' code."""
    patch = 16 if side == 224 else 8
    model, pseudo = (
        build_model(ModelConfig(family="convit", encoder=encoder, patch_size=patch, positions=at), side, device)
        for at in ("true", "official")
    )
    config, official = (apply_preset(MimirConfig(), preset) for preset in ("paper", "official"))

    def exact(model: MaskedModel, config: MimirConfig) -> Step:
        return on_doubles(method_step(copy.deepcopy(model).double(), Mimir(config)))

    by_their_preset = method_step(pseudo, Mimir(official))
    theirs = authors_provider(
        "authors ConViT MIMIR", f"mae_convit_{encoder}", model, official, by_their_preset,
        unknown="theirs has no such model" if encoder == "nano" else "",
    )  # fmt: skip
    return Case(
        "convit_step",
        {"encoder": encoder, "image": side, "patch": patch, "batch": batch, "dtype": "fp32"},
        [
            Provider("mimir_fast ConViT MIMIR", method_step(model, Mimir(config))),
            Provider("mimir_fast ConViT MIMIR official", by_their_preset, reference=exact(pseudo, official),
                     note="the authors' pseudo-grid, own mask for the attack, nHSIC"),
            theirs,
        ],
        baseline="mimir_fast ConViT MIMIR official" if theirs.skip else theirs.name,
        make_inputs=partial(random_batch, batch, side),
        gate_inputs=partial(random_batch, min(batch, 4), side),
        reference=exact(model, config),
        tolerance=TOLERANCE["fp32"],
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
    model, exact = build_model(config, side, device).eval(), build_model(config, side, device).eval().double()
    exported = find_family("convnext").to_timm(model.encoder.state_dict(), config.architecture(side))
    module, _, name = exported.path.rpartition(".")
    plain = getattr(import_module(module), name)(**exported.arguments).to(device).eval()
    plain.load_state_dict(exported.tensors, strict=False)
    unit = model.patch_size

    @torch.no_grad()
    def masked(images: Tensor, keep: Tensor, model: MaskedModel = model) -> Tensor:
        return model(View(patchify_gather(images, keep, unit), keep), decode=False)

    @torch.no_grad()
    def dense(images: Tensor, keep: Tensor) -> Tensor:
        return plain.forward_features(images)

    def make_inputs(count: int) -> tuple[Tensor, Tensor]:
        images = random_batch(count, side).images.float() / 255
        return images, draw_ids(count, model.num_patches, max(1, model.num_patches // 4))

    return Case(
        "convnext_forward",
        {"encoder": encoder, "image": side, "unit": unit, "batch": batch, "kept": "1/4", "dtype": "fp32"},
        [
            Provider("mimir_fast masked ConvNeXt", run_of(masked)),
            Provider("timm ConvNeXt", run_of(dense), law=finite, note="all patches, no mask"),
        ],
        baseline="timm ConvNeXt",
        make_inputs=partial(make_inputs, batch),
        gate_inputs=partial(make_inputs, 2),
        reference=in_double(run_of(partial(masked, model=exact))),
        tolerance=1e-5,
        items=batch,
        ratios={"masked / plain": ("mimir_fast masked ConvNeXt", "timm ConvNeXt")},
    )
