"""What the questions about training share: seeded models, random batches, a whole optimiser step and its FLOPs.

Shapes: B images, N patches, K kept, P numbers a patch, T tokens, D width.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from benchmarks.case import Outputs
from mimir_fast.data.batch import Batch
from mimir_fast.layers.borrowing import training_pass
from mimir_fast.methods.mae import Mae
from mimir_fast.models.families.vit import SIZES as ENCODERS
from mimir_fast.models.masked_model import DECODERS, MaskedModel, ModelConfig, View, build_masked_model
from mimir_fast.training.optimizer import OptimizerConfig, build_optimizer, clip_gradients

SEED, STEP = 0, 0
Step = Callable[[Batch], Outputs]
Loss = Callable[[Batch], Tensor]
Model = TypeVar("Model", bound=nn.Module)


def seeded(build: Callable[[], Model], device: torch.device) -> Model:
    """The same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return build().to(device)


def build_model(config: ModelConfig, side: int, device: torch.device) -> MaskedModel:
    """A masked autoencoder for images of side × side pixels."""
    return seeded(lambda: build_masked_model(config, side), device)


def some_view(model: MaskedModel) -> View:
    """One image of which the model sees the first quarter, for what does not depend on the pixels."""
    weight = next(model.parameters())
    ids = torch.arange(model.num_patches, device=weight.device)[None]
    keep = model.num_patches // 4
    patches = weight.new_zeros(1, keep, model.patch_size**2 * model.channels)
    return View(patches, ids[:, :keep], ids[:, keep:])


def random_batch(batch: int, side: int, num_classes: int = 1) -> Batch:
    """uint8 images, as loaders give them."""
    images = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)
    samples = torch.randint(0, 2**40, (batch,))
    return Batch(images, torch.randint(0, num_classes, (batch,)), samples, torch.zeros_like(samples))


def optimizer_step(model: nn.Module, loss_of: Loss, *, bf16: bool = False, plain: bool = False) -> Step:
    """(loss, gradient norm) of a full step; the norm is measured and clips nothing, as in a training run by default.

    The learning rate is 0, so that the weights the gate saw are those the clock sees.

    Args:
        bf16: in autocast.
        plain: AdamW as it comes, instead of the package's fused one.
    """
    if plain:
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.05)
    else:
        optimizer = build_optimizer(model, OptimizerConfig())

    def run(batch: Batch) -> Outputs:
        with training_pass(model, reduces=True):
            with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=bf16):
                loss = loss_of(batch)
            loss.backward()
        norm = clip_gradients(model, None)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach().clone(), norm.detach().clone()

    return run


def method_step(model: MaskedModel, method: Mae, *, bf16: bool = False, plain: bool = False) -> Step:
    """`optimizer_step` of a pre-training method."""
    return optimizer_step(model, lambda b: method(model, b, seed=SEED, step=STEP)["loss"], bf16=bf16, plain=plain)


def on_doubles(step: Step) -> Step:
    """The same images as float64 in [0, 1]; the model of the step must be in float64."""
    return lambda batch: step(replace(batch, images=batch.images.double() / 255))


def block_flops(tokens: int, width: int, depth: int) -> float:
    """Of one sequence through so many transformer blocks, 2 for a multiplication and addition."""
    return float(depth * tokens * (24 * width**2 + 4 * tokens * width))


def masked_flops(encoder: str, decoder: str, side: int, patch: int, depth: int | None = None) -> float:
    """Forward pass of one image; what is padded or thrown away is not counted.

    Args:
        depth: of the encoder, where it is not its usual one.
    """
    num_patches, patch_dim = (side // patch) ** 2, 3 * patch**2
    num_keep = num_patches // 4
    width, usual_depth, _ = ENCODERS[encoder]
    decoder_width, decoder_depth, _ = DECODERS[decoder]
    return (
        2.0 * num_keep * patch_dim * width
        + block_flops(num_keep + 1, width, depth or usual_depth)
        + 2.0 * (num_keep + 1) * width * decoder_width
        + block_flops(num_patches + 1, decoder_width, decoder_depth)
        + 2.0 * (num_patches - num_keep) * decoder_width * patch_dim
    )
