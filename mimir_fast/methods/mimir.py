"""MIMIR: adversarial masked autoencoding that pays for I(x + δ, z) (arXiv 2312.04960).

    loss = MSE(clean masked patches, reconstruction) + λ·I(adversarial image, latent)

Two presets set everything in which paper and authors' code differ: `paper` and `official`.
Shapes: B images, N patches, K kept, P numbers a patch, T = 1 + K tokens, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from mimir_fast.data.batch import Batch
from mimir_fast.layers.borrowing import borrowed
from mimir_fast.methods import registry
from mimir_fast.methods.adv_mae import AdvMae, AdvMaeConfig
from mimir_fast.methods.mutual_information import MutualInformationConfig, mutual_information
from mimir_fast.methods.registry import MethodEntry, Pass, Preset, register
from mimir_fast.methods.step import MaskedStep
from mimir_fast.models.masked_model import MaskedModel, View
from mimir_fast.ops.patches import every_patch, patchify_gather
from mimir_fast.philox import Stream


@dataclass
class MimirConfig(AdvMaeConfig):
    """adv-MAE's options and the penalty."""

    mi: MutualInformationConfig = field(default_factory=MutualInformationConfig)

    @property
    def needs_even_ranks(self) -> str:
        """The global estimate gathers the batches of all ranks."""
        return "mi.scope=global" if self.mi.scope == "global" else ""

    def derived(self, micro_batch: int, accum_iter: int, ranks: int) -> dict[str, int]:
        """{"penalty_images": m}, the images of one estimate of the penalty; {} without a penalty."""
        if self.mi.estimator == "none" or not self.mi.weight:
            return {}
        accumulated, everywhere = self.mi.accumulated, self.mi.scope == "global"
        images = micro_batch * (accum_iter if accumulated else 1) * (ranks if everywhere else 1)
        return {"penalty_images": images}

    def check_batches(self, micro_batch: int, accum_iter: int, ranks: int) -> str:
        """Says what `mi` in the log is, and on how many images it is estimated, on which its strength depends (≥ 2)."""
        images = self.derived(micro_batch, accum_iter, ranks).get("penalty_images")
        if images is None:
            return ""
        if images < 2:
            raise ValueError(
                f"mi.estimator={self.mi.estimator} compares images with each other, but {ranks} ranks x {accum_iter} "
                "accumulation steps leave it one: use a larger --batch_size, a smaller --accum_iter, --mi.accumulated, "
                "or --mi.scope global"
            )
        whole = self.mi.accumulated or accum_iter == 1
        hint = "" if whole else " (--mi.accumulated: on all of a step)"
        return f"penalty: {self.mi.weight:g} times mi, estimated on {images} images{hint}"


def apply_preset(config: Any, preset: str) -> Any:
    """`config` with the points in which paper and authors' code differ set as `paper` or `official` has them.

    Raises:
        ValueError: another preset, or a method without that attack.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}: wanted paper or official")
    if not isinstance(config, AdvMaeConfig):
        raise ValueError(
            f"--preset {preset} is about the attack and the penalty of mimir and adv_mae: leave it out here"
        )
    attack, mi = PRESETS[preset]
    config = replace(config, attack=replace(config.attack, **attack))
    return replace(config, mi=replace(config.mi, **mi)) if isinstance(config, MimirConfig) else config


# name: (attack, mi)
PRESETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "paper": (
        {"mask": "shared", "target": "clean"},
        {"estimator": "hsic", "bandwidth": "auto", "sigma": 5.0, "inputs": "noisy", "tokens": "sorted"},
    ),
    "official": (
        {"mask": "fresh", "target": "adversarial"},
        {"estimator": "nhsic", "bandwidth": "reference", "sigma": 5.0, "inputs": "adversarial", "tokens": "shuffled"},
    ),
}


AUTHORS_BATCH = {"cifar10": 128, "imagenet": 512}
"""Images of one GPU in the authors' scripts, of which there are four; each GPU estimates the penalty on its own. They
published no script for Tiny-ImageNet."""


def authors_batch(options: Any, data: str) -> int | None:
    """Images on which the authors estimated the penalty of these options, or None."""
    return AUTHORS_BATCH.get(data) if isinstance(options, MimirConfig) else None


class Mimir(AdvMae):
    """adv-MAE with the mutual-information penalty."""

    config: MimirConfig

    def __init__(self, config: MimirConfig) -> None:
        super().__init__(config)
        self.token_order = "shuffled" if config.mi.tokens == "shuffled" else "sorted"

    def losses(self, step: MaskedStep) -> dict[str, tuple[float, Tensor]]:
        """Reconstruction, and "mi": the estimate before λ."""
        if self.config.mi.estimator == "none":
            return super().losses(step)
        latent = step.bare.visible(step.latent, step.mask.keep)
        if step.estimate is None:
            estimate = self.estimate(step, self.image_side(step), latent)
        else:  # of all micro-batches, with the gradient to this one's latent
            value, gradient = step.estimate
            inner = (gradient * latent.float()).sum()
            estimate = value + inner - inner.detach()
        return super().losses(step) | {"mi": (self.config.mi.weight, estimate)}

    def estimate(self, step: MaskedStep, image: Tensor, latent: Tensor) -> Tensor:
        """The estimate before λ, a scalar, from image sides (B, N, P) and latents (B, T, D) of visible patches."""
        return mutual_information(self.config.mi, image, latent, step.bare.encoder.num_prefix)

    def passes(self, model: nn.Module, batches: Sequence[Batch], *, seed: int, step: int) -> list[Pass]:
        """The training passes of a step. With `mi.accumulated` the estimate is taken first, on all latents together.

        Its gradient is handed to each pass (gradient caching: Gao et al., arXiv 2101.06983), whose graph is then the
        only one in memory. Micro-batches of other sizes count by their images, as in the loop.
        """
        steps = [MaskedStep(model, batch, seed, step) for batch in batches]
        mi = self.config.mi
        if not mi.accumulated or mi.estimator == "none" or len(steps) == 1:
            return [partial(self.run, one) for one in steps]
        latents = []
        for one in steps:
            self.prepare(one)
            with borrowed(model) as module, torch.no_grad():
                bare = cast(MaskedModel, module)
                latents.append(bare.visible(bare(View(one.visible, *one.mask), decode=False), one.mask.keep).float())
        latent = torch.cat(latents).requires_grad_()
        with torch.enable_grad():
            value = self.estimate(steps[0], torch.cat([self.image_side(one) for one in steps]), latent)
        gradients = torch.autograd.grad(value, latent)[0].split([len(one.visible) for one in steps])
        for one, gradient in zip(steps, gradients, strict=True):
            one.estimate = value.detach(), gradient * (len(latent) / len(gradient))
        return [partial(self.finish, one) for one in steps]

    def image_side(self, step: MaskedStep) -> Tensor:
        """(B, N, P), what the estimate compares: positions aligned between images, as distances demand."""
        images, p, visible = step.batch.images, step.bare.patch_size, step.visible
        inputs, attack = self.config.mi.inputs, self.config.attack
        if inputs in ("adversarial", "noisy") and step.whole is not None:
            return step.whole
        every = every_patch(images, p)
        if inputs == "noisy" and attack.random_start:
            _, image = step.noisy_patches(every, attack.eps, Stream.MASKED_NOISE)
        else:
            image = patchify_gather(images, every, p)  # fresh memory, so it may be written into
        if inputs == "clean":
            return image
        if inputs == "visible":
            image.zero_()
        return image.scatter_(1, step.mask.keep.unsqueeze(-1).expand_as(visible), visible)


register(MethodEntry("mimir", "pretrain", MimirConfig, Mimir, "MIMIR"))
registry.PRESETS.add("paper", Preset("paper", partial(apply_preset, preset="paper"), AdvMaeConfig))
registry.PRESETS.add(
    "official",
    Preset(
        "official", partial(apply_preset, preset="official"), AdvMaeConfig, positions="official",
        micro_batch=authors_batch, exact=True,
    ),
)  # fmt: skip
