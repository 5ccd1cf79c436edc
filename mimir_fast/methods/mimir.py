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
from mimir_fast.layers.borrowing import borrowed, frozen_flags, unwrap
from mimir_fast.methods import registry
from mimir_fast.methods.adv_mae import AdvMae, AdvMaeConfig
from mimir_fast.methods.mutual_information import MutualInformationConfig, derangement, mutual_information
from mimir_fast.methods.penalty_share import PenaltyShare
from mimir_fast.methods.registry import MethodEntry, Pass, Preset, register
from mimir_fast.methods.step import Losses, MaskedStep
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
        if not self.mi.acts:
            return {}
        accumulated, everywhere = self.mi.accumulated, self.mi.scope == "global"
        images = micro_batch * (accum_iter if accumulated else 1) * (ranks if everywhere else 1)
        return {"penalty_images": images}

    def check_model(self, model: nn.Module) -> None:
        """Raises ValueError also where no gradient goes to the latent, of which the penalty should have a share."""
        super().check_model(model)
        bare = cast(MaskedModel, unwrap(model))
        trains = bare.full_length or any(p.requires_grad for p in bare.encoder.parameters())
        if self.mi.share and self.mi.acts and not trains:
            raise ValueError("mi.share is of the gradient to the encoder, of which nothing trains: leave out --freeze")

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
        if self.mi.pairing == "permuted" and micro_batch * (accum_iter if self.mi.accumulated else 1) < 2:
            raise ValueError("mi.pairing=permuted exchanges images of a rank, and there is one: more --batch_size")
        whole = self.mi.accumulated or accum_iter == 1
        hint = "" if whole else " (--mi.accumulated: on all of a step)"
        strength = f"{self.mi.weight:g} times mi"
        if self.mi.share:
            strength = f"mi at {self.mi.share:g} of the reconstruction's gradient"
        if self.mi.pairing == "permuted":
            hint = f" that are permuted{hint}"
        return f"penalty: {strength}, estimated on {images} images{hint}"


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
        self.controller = PenaltyShare(config.mi.share)
        self.token_order = "shuffled" if config.mi.tokens == "shuffled" else "sorted"

    def losses(self, step: MaskedStep) -> Losses:
        """Reconstruction, and "mi": the estimate before λ."""
        losses, mi = super().losses(step), self.config.mi
        if mi.estimator == "none":
            return losses
        if mi.share and step.estimate is None:
            leaf = step.latent.detach().float().requires_grad_()
            with torch.enable_grad():
                value = self.estimate([step], step.bare.visible(leaf, step.mask.keep))
            step.estimate = value.detach(), torch.autograd.grad(value, leaf)[0]
        if step.estimate is None:
            return losses | {"mi": (mi.weight, self.estimate([step], step.bare.visible(step.latent, step.mask.keep)))}
        value, gradient = step.estimate
        weight: float | Tensor = mi.weight
        if mi.share:
            weight = self.controller.watch(losses["reconstruction"][1], step.latent, gradient)
            step.log |= {"mi_weight": weight, "mi_share": self.controller.shown(step.latent.device)}
        inner = (gradient * step.latent.float()).sum()
        return losses | {"mi": (weight, value + inner - inner.detach())}

    def estimate(self, steps: Sequence[MaskedStep], latent: Tensor) -> Tensor:
        """The estimate before λ, a scalar, on the images of these micro-batches and their latents (B, T, D) of visible
        patches."""
        image = torch.cat([self.image_side(one) for one in steps]) if len(steps) > 1 else self.image_side(steps[0])
        if self.config.mi.pairing == "permuted":
            samples = torch.cat([one.batch.samples for one in steps])
            image = image[derangement(samples, seed=steps[0].seed, step=steps[0].number)]
        return mutual_information(self.config.mi, image, latent, steps[0].bare.encoder.num_prefix)

    def __call__(self, model: nn.Module, batch: Batch, *, seed: int, step: int) -> dict[str, Tensor]:
        """{"loss": scalar, …} of a step that has one micro-batch."""
        (run,) = self.passes(model, [batch], seed=seed, step=step)
        return run()

    def passes(self, model: nn.Module, batches: Sequence[Batch], *, seed: int, step: int) -> list[Pass]:
        """The training passes of a step. With `mi.accumulated` the estimate is taken first, on all latents together.

        Its gradient is handed to each pass (gradient caching: Gao et al., arXiv 2101.06983), whose graph is then the
        only one in memory. Micro-batches of other sizes count by their images, as in the loop.

        Raises:
            ValueError: `mi.share` and a model compiled as a whole, whose gradients at the latent nobody sees.
        """
        steps = [MaskedStep(model, batch, seed, step) for batch in batches]
        mi = self.config.mi
        if mi.share and mi.estimator != "none":
            if frozen_flags(steps[0].bare):
                raise ValueError("mi.share measures gradients inside of the model: leave out --compile, or mi.share")
            self.controller.begin()
        if not mi.accumulated or mi.estimator == "none" or len(steps) == 1:
            return [partial(self.run, one) for one in steps]
        leaves = []
        for one in steps:
            self.prepare(one)
            with borrowed(model) as module, torch.no_grad():
                leaves.append(cast(MaskedModel, module)(View(one.visible, *one.mask), decode=False).float())
        with torch.enable_grad():
            visible = [
                one.bare.visible(leaf.requires_grad_(), one.mask.keep) for one, leaf in zip(steps, leaves, strict=True)
            ]
            value = self.estimate(steps, torch.cat(visible))
        gradients, images = torch.autograd.grad(value, leaves), sum(map(len, leaves))
        for one, gradient in zip(steps, gradients, strict=True):
            one.estimate = value.detach(), gradient * (images / len(gradient))
        return [partial(self.finish, one) for one in steps]

    def saved_state(self) -> dict[str, float]:
        """What λ depends on with `mi.share`."""
        return self.controller.state_dict()

    def restore_state(self, state: dict[str, float], device: torch.device) -> None:
        """Undo `saved_state`."""
        self.controller.load_state_dict(state, device)

    def image_side(self, step: MaskedStep) -> Tensor:
        """(B, N, P), what the estimate compares: positions aligned between images, as distances demand."""
        images, p, visible = step.batch.images, step.bare.patch_size, step.visible
        inputs, attack = self.config.mi.inputs, self.config.attack
        if inputs in ("adversarial", "noisy") and step.whole is not None:
            return step.whole
        every = every_patch(images, p)
        if inputs == "noisy" and attack.random_start:
            image = step.only_noisy_patches(every, attack.eps, Stream.MASKED_NOISE)
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
