"""A whole pre-training step: what does MIMIR cost beside MAE, and how much faster is it than the plain way?

Forward, attack, backward, gradient norm, AdamW, with the package's own methods, models and optimiser (learning rate 0,
so that the weights the gate saw are those the clock sees). By FLOPs a MIMIR step is 5/3 of a MAE step: an attack's
forward and input-backward on top of forward and backward.
Floor: 24 D² + 4 T D FLOPs a token and block, visible tokens in the encoder, all of them in the decoder.
Shapes: B images, N patches, K kept, P numbers a patch, T tokens, D width.
"""

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import plain_mimir
from benchmarks.apart import Apart
from benchmarks.authors import authors_step, why_not
from benchmarks.case import Case, Outputs, Provider, Size, generator
from mimir_fast.data.batch import Batch
from mimir_fast.methods.adv_mae import AdvMae
from mimir_fast.methods.mae import Mae
from mimir_fast.methods.mimir import Mimir, MimirConfig, apply_preset
from mimir_fast.models.attention import xformers_failure
from mimir_fast.models.families.vit import SIZES as ENCODERS
from mimir_fast.models.masked_model import DECODERS, DecoderName, MaskedModel, ModelConfig, build_masked_model
from mimir_fast.training.distributed import World, parallelize
from mimir_fast.training.optimizer import OptimizerConfig, build_optimizer

Losses = Callable[[MaskedModel, Batch], dict[str, Tensor]]
SEED, STEP = 0, 0

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
    cuda = device.type == "cuda"
    for setting in ON_GPU if cuda and size != "tiny" else SETTINGS[size]:
        yield case(device, setting, bf16=cuda, compile_too=cuda, both=not cuda)


def case(device: torch.device, setting: Setting, *, bf16: bool, compile_too: bool, both: bool = False) -> Case:
    """MIMIR and MAE, ours and plain, on the same batch.

    Args:
        both: the fp32 providers' equals in bf16 autocast too.
    """
    encoder, decoder, side, patch_size, batch = setting
    config = apply_preset(MimirConfig(), "paper")
    official = apply_preset(MimirConfig(), "official")
    model = build_model(setting, device)
    exact = copy.deepcopy(model).double()
    paper = Mimir(config)

    def mimir(model: MaskedModel, batch: Batch) -> dict[str, Tensor]:
        return paper(model, batch, seed=SEED, step=STEP)

    def mae(model: MaskedModel, batch: Batch) -> dict[str, Tensor]:
        return Mae(config)(model, batch, seed=SEED, step=STEP)

    def mimir_official(model: MaskedModel, batch: Batch) -> dict[str, Tensor]:
        return Mimir(official)(model, batch, seed=SEED, step=STEP)

    def plain(model: MaskedModel, batch: Batch) -> dict[str, Tensor]:
        draws = paper.draw(model, batch, seed=SEED, step=STEP)
        return plain_mimir.losses(model, batch.images, draws, config)

    def make_inputs(seed: int) -> Batch:
        return random_batch(batch, side, device, seed)

    def in_double(losses: Losses) -> Callable[[Batch], Outputs]:
        return lambda inputs: optimizer_step(exact, losses, bf16=False)(as_double(inputs))

    in_bf16 = (2e-2, 0.1)  # of loss and gradient norm; signed gradients make more of rounding than rounding is
    tolerance = in_bf16 if bf16 else (1e-3, 2e-2)
    step = optimizer_step(model, mimir, bf16=bf16)
    mae_flops = 3.0 * batch * forward_flops(setting)
    providers = [
        Provider("mimir_fast MIMIR", step),
        Provider("mimir_fast MIMIR official", optimizer_step(model, mimir_official, bf16=bf16),
                 reference=in_double(mimir_official), note="own mask for the attack, whole images, nHSIC"),
        Provider("mimir_fast MAE", optimizer_step(model, mae, bf16=bf16), reference=in_double(mae), flops=mae_flops),
        Provider("plain MIMIR", optimizer_step(model, plain, bf16=bf16, fused=False),
                 note="all patches embedded, all predicted, whole-image attack, HSIC on the host"),
    ]  # fmt: skip
    ratios = {
        "MIMIR / MAE": ("mimir_fast MIMIR", "mimir_fast MAE"),
        "official / MAE": ("mimir_fast MIMIR official", "mimir_fast MAE"),
    }
    providers += rivals(model, setting, official, bf16=bf16, both=both)
    ratios["authors / ours"] = ("authors MIMIR", "mimir_fast MIMIR")
    ratios["authors / ours official"] = ("authors MIMIR", "mimir_fast MIMIR official")
    if both:
        providers += [
            Provider("mimir_fast MIMIR, bf16", optimizer_step(model, mimir, bf16=True), in_bf16, "bf16"),
            Provider(
                "mimir_fast MIMIR official, bf16",
                optimizer_step(model, mimir_official, bf16=True),
                in_bf16,
                "bf16",
                reference=in_double(mimir_official),
            ),
            Provider(
                "mimir_fast MAE, bf16",
                optimizer_step(model, mae, bf16=True),
                in_bf16,
                "bf16",
                reference=in_double(mae),
                flops=mae_flops,
            ),
            Provider("plain MIMIR, bf16", optimizer_step(model, plain, bf16=True, fused=False), in_bf16, "bf16"),
        ]
        ratios["authors fp32 / ours bf16"] = ("authors MIMIR", "mimir_fast MIMIR, bf16")
        ratios["authors bf16 / ours bf16"] = ("authors MIMIR, bf16", "mimir_fast MIMIR, bf16")
        ratios["MIMIR / MAE, bf16"] = ("mimir_fast MIMIR, bf16", "mimir_fast MAE, bf16")
    if device.type == "cuda":
        providers += ablations(model, mimir, config, bf16=bf16, in_double=in_double)
    if compile_too:
        fast = build_model(setting, device)
        fast.load_state_dict(model.state_dict())
        parallelize(fast, "single", World(0, 1, device), bf16=bf16, compiled=True)
        providers.append(Provider("mimir_fast MIMIR compiled", optimizer_step(fast, mimir, bf16=bf16)))
        providers.append(
            Provider(
                "mimir_fast MAE compiled",
                optimizer_step(fast, mae, bf16=bf16),
                reference=in_double(mae),
                flops=mae_flops,
            )
        )
        ratios["MIMIR / MAE, compiled"] = ("mimir_fast MIMIR compiled", "mimir_fast MAE compiled")
    return Case(
        "pretrain_step",
        {
            "encoder": encoder, "decoder": decoder, "image": side, "patch": patch_size, "batch": batch,
            "dtype": "bf16" if bf16 else "fp32",
        },
        providers,
        baseline="plain MIMIR",
        make_inputs=make_inputs,
        gate_inputs=lambda seed: random_batch(min(batch, 16), side, device, seed),
        reference=in_double(mimir),
        tolerance=tolerance,
        flops=5.0 * batch * forward_flops(setting),
        precision="bf16" if bf16 else "fp32",
        items=batch,
        ratios=ratios,
    )  # fmt: skip


def ablations(
    model: MaskedModel, mimir: Losses, config: MimirConfig, *, bf16: bool,
    in_double: Callable[[Losses], Callable[[Batch], Outputs]],
) -> list[Provider]:  # fmt: skip
    """The eager step with one thing changed each."""

    def without_mi(model: MaskedModel, batch: Batch) -> dict[str, Tensor]:
        return AdvMae(config)(model, batch, seed=SEED, step=STEP)

    def with_sdpa(model: MaskedModel, batch: Batch) -> dict[str, Tensor]:
        with patch.dict(os.environ, MIMIR_FAST_ATTENTION="sdpa"):
            return mimir(model, batch)

    return [
        Provider("mimir_fast adv-MAE", optimizer_step(model, without_mi, bf16=bf16), reference=in_double(without_mi),
                 note="no mutual information"),
        Provider("mimir_fast MIMIR, SDPA", optimizer_step(model, with_sdpa, bf16=bf16),
                 note="forward passes through SDPA where xformers would run", skip=xformers_failure() or ""),
        Provider("mimir_fast MIMIR, fp32", optimizer_step(model, mimir, bf16=False)),
        Provider("mimir_fast MIMIR, unfused AdamW", optimizer_step(model, mimir, bf16=bf16, fused=False)),
    ]  # fmt: skip


def rivals(model: MaskedModel, setting: Setting, config: MimirConfig, *, bf16: bool, both: bool) -> list[Provider]:
    """The authors' own MIMIR and MAE steps, from a checkout the user names."""
    encoder, decoder, side, patch, _ = setting
    skip = why_not() or ("" if decoder == "light" and encoder != "nano" else "theirs has no such model")
    if skip:
        return [Provider("authors MIMIR", lambda inputs: (), skip=skip)]
    name = f"mae_vit_{'ti' if encoder == 'tiny' else encoder}"

    def provider(label: str, adversarial: bool, bf16: bool = bf16) -> Provider:
        step = authors_step(
            f"{name}_dec128d2b", model.state_dict(), config, image_size=side, patch_size=patch,
            device=next(model.parameters()).device, bf16=bf16, adversarial=adversarial,
        )  # fmt: skip

        def same_loss(inputs: Batch, outputs: Outputs) -> str:
            method = Mimir(config) if adversarial else Mae(config)
            wanted = float(method(model, inputs, seed=SEED, step=STEP)["loss"].detach())
            found = float(outputs[0])
            return "" if abs(found - wanted) < 0.05 * wanted else f"a loss of {found:.3f}, ours is {wanted:.3f}"

        run = lambda inputs: step(inputs.images, inputs.labels)  # noqa: E731
        note = "their public code, draws of their own" + (", in its own process" if isinstance(step, Apart) else "")
        process = step if isinstance(step, Apart) else None
        return Provider(label, run, precision="bf16" if bf16 else "fp32", law=same_loss, note=note, process=process)

    found = [provider("authors MIMIR", True), provider("authors MAE", False)]
    return [*found, provider("authors MIMIR, bf16", True, bf16=True)] if both else found


def build_model(setting: Setting, device: torch.device) -> MaskedModel:
    """The same weights at every call."""
    encoder, decoder, side, patch, _ = setting
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return build_masked_model(ModelConfig(encoder=encoder, patch_size=patch, decoder=decoder), side).to(device)


def random_batch(batch: int, side: int, device: torch.device, seed: int) -> Batch:
    """uint8 images, as loaders give them."""
    images = torch.empty(batch, 3, side, side, dtype=torch.uint8, device=device)
    samples = torch.arange(batch, device=device) + 1000 * seed
    images.random_(0, 256, generator=generator(device, seed))
    return Batch(images, torch.zeros_like(samples), samples, torch.zeros_like(samples))


def as_double(batch: Batch) -> Batch:
    """The same images as float64 in [0, 1]."""
    return Batch(batch.images.double() / 255, batch.labels, batch.samples, batch.epochs)


def optimizer_step(model: MaskedModel, losses: Losses, *, bf16: bool, fused: bool = True) -> Callable[[Batch], Outputs]:
    """(loss, gradient norm) of a full step."""
    optimizer = build_optimizer(model, OptimizerConfig()) if fused else plain_adamw(model)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def autocast(batch: Batch) -> AbstractContextManager[object]:
        return torch.autocast(batch.images.device.type, torch.bfloat16) if bf16 else nullcontext()

    def run(batch: Batch) -> Outputs:
        with autocast(batch):
            loss = losses(model, batch)["loss"]
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, float("inf"))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach().clone(), norm.detach().clone()

    return run


def plain_adamw(model: MaskedModel) -> torch.optim.Optimizer:
    """AdamW as it comes."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, weight_decay=0.05)


def forward_flops(setting: Setting) -> float:
    """Of one image, 2 for a multiplication and addition; what is padded or thrown away is not counted."""
    encoder, decoder, side, patch, _ = setting
    num_patches, patch_dim = (side // patch) ** 2, 3 * patch**2
    num_keep = num_patches // 4

    def blocks(tokens: int, width: int, depth: int) -> float:
        return float(depth * tokens * (24 * width**2 + 4 * tokens * width))

    width, depth, _ = ENCODERS[encoder]
    decoder_width, decoder_depth, _ = DECODERS[decoder]
    return (
        2.0 * num_keep * patch_dim * width
        + blocks(num_keep + 1, width, depth)
        + 2.0 * (num_keep + 1) * width * decoder_width
        + blocks(num_patches + 1, decoder_width, decoder_depth)
        + 2.0 * (num_patches - num_keep) * decoder_width * patch_dim
    )
