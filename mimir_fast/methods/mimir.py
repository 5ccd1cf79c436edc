"""MIMIR: adversarial masked autoencoding that pays for I(x + δ, z) (arXiv 2312.04960).

    loss = MSE(clean masked patches, reconstruction) + λ·I(adversarial image, latent)

Two presets set everything in which paper and authors' code differ: `paper` and `official`.
Shapes: B images, N patches, K kept, P numbers a patch, T = 1 + K tokens, D width.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor

from mimir_fast.methods import registry
from mimir_fast.methods.adv_mae import AdvMae, AdvMaeConfig
from mimir_fast.methods.mutual_information import MutualInformationConfig, mutual_information
from mimir_fast.methods.registry import MethodEntry, Preset, register
from mimir_fast.methods.step import MaskedStep
from mimir_fast.ops.patches import every_patch, patchify_gather


@dataclass
class MimirConfig(AdvMaeConfig):
    """adv-MAE's options and the penalty."""

    mi: MutualInformationConfig = field(default_factory=MutualInformationConfig)

    @property
    def needs_even_ranks(self) -> str:
        """The global estimate gathers the batches of all ranks."""
        return "mi.scope=global" if self.mi.scope == "global" else ""


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
        {"estimator": "hsic", "inputs": "adversarial", "tokens": "sorted"},
    ),
    "official": (
        {"mask": "fresh", "target": "adversarial"},
        {"estimator": "nhsic", "bandwidth": "reference", "sigma": 5.0, "inputs": "adversarial", "tokens": "shuffled"},
    ),
}


class Mimir(AdvMae):
    """adv-MAE with the mutual-information penalty."""

    config: MimirConfig

    def __init__(self, config: MimirConfig) -> None:
        super().__init__(config)
        self.token_order = "shuffled" if config.mi.tokens == "shuffled" else "sorted"

    def losses(self, step: MaskedStep) -> dict[str, tuple[float, Tensor]]:
        """Reconstruction, and "mi": the estimate before λ."""
        mi = self.config.mi
        if mi.estimator == "none":
            return super().losses(step)
        latent = step.bare.visible(step.latent, step.mask.keep)
        estimate = mutual_information(mi, self.image_side(step), latent, step.bare.encoder.num_prefix)
        return super().losses(step) | {"mi": (mi.weight, estimate)}

    def image_side(self, step: MaskedStep) -> Tensor:
        """(B, N, P), what the estimate compares: positions aligned between images, as distances demand."""
        images, p, visible = step.batch.images, step.bare.patch_size, step.visible
        if self.config.mi.inputs == "adversarial" and step.whole is not None:
            return step.whole
        image = patchify_gather(images, every_patch(images, p), p)  # fresh memory, so it may be written into
        if self.config.mi.inputs == "clean":
            return image
        if self.config.mi.inputs == "visible":
            image.zero_()
        return image.scatter_(1, step.mask.keep.unsqueeze(-1).expand_as(visible), visible)


register(MethodEntry("mimir", "pretrain", MimirConfig, Mimir, "MIMIR"))
for name in PRESETS:
    registry.PRESETS.add(name, Preset(name, partial(apply_preset, preset=name), exact=name == "official"))
