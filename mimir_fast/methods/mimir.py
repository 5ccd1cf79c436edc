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
from mimir_fast.methods.mae import Draws, Shown, Step, masked_model
from mimir_fast.methods.mutual_information import MutualInformationConfig, mutual_information
from mimir_fast.methods.registry import MethodEntry, Preset, register
from mimir_fast.methods.terms import Term
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

    def terms(self, step: Step) -> list[Term]:
        """Reconstruction, and "mi": the estimate before λ."""
        if self.config.mi.estimator == "none":
            return super().terms(step)
        bare = masked_model(step.model)
        image = self._image(bare.patch_size, step.batch.images, step.draws, step.shown)
        estimate = mutual_information(self.config.mi, image, bare.visible(step.output.latent, step.view))
        return [*super().terms(step), Term("mi", estimate, self.config.mi.weight)]

    def _image(self, patch_size: int, images: Tensor, draws: Draws, shown: Shown) -> Tensor:
        """(B, N, P), the image side of the estimate: positions aligned between images, as distances demand."""
        if self.config.mi.inputs == "adversarial" and shown.patches is not None:
            return shown.patches
        # A fresh tensor in each case, so the visible patches may be written into it.
        image = patchify_gather(images, every_patch(images, patch_size), patch_size)
        if self.config.mi.inputs == "clean":
            return image
        if self.config.mi.inputs == "visible":
            image.zero_()
        return image.scatter_(1, draws.mask.keep.unsqueeze(-1).expand_as(shown.visible), shown.visible)


register(MethodEntry("mimir", "pretrain", MimirConfig, Mimir, "MIMIR"))
for name in PRESETS:
    registry.PRESETS.add(name, Preset(name, partial(apply_preset, preset=name), exact=name == "official"))
