"""MIMIR: adversarial masked autoencoding that pays for I(x + δ, z) (arXiv 2312.04960).

    loss = MSE(clean masked patches, reconstruction) + λ·I(adversarial image, latent)

Two presets set everything in which paper and authors' code differ: `paper` and `official`.
Shapes: B images, N patches, K kept, P numbers a patch, T = 1 + K tokens, D width.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from mimir_fast.methods.adv_mae import Adversarial, AdvMae, AdvMaeConfig, Draws
from mimir_fast.methods.mae import autoencoder
from mimir_fast.methods.mutual_information import MutualInformationConfig, mutual_information
from mimir_fast.ops.patches import patchify_gather


@dataclass
class MimirConfig(AdvMaeConfig):
    """adv-MAE's options and the penalty."""

    mi: MutualInformationConfig = field(default_factory=MutualInformationConfig)


def apply_preset(config: MimirConfig, preset: str) -> MimirConfig:
    """`config` with the points in which paper and authors' code differ set as `paper` or `official` has them."""
    if preset == "paper":
        return replace(
            config,
            attack=replace(config.attack, mask="shared", target="clean"),
            mi=replace(config.mi, estimator="hsic", inputs="adversarial", tokens="sorted"),
        )
    if preset == "official":
        return replace(
            config,
            attack=replace(config.attack, mask="fresh", target="adversarial"),
            mi=replace(
                config.mi, estimator="nhsic", bandwidth="reference", sigma=5.0, inputs="adversarial", tokens="shuffled"
            ),
        )
    raise ValueError(f"unknown preset {preset!r}: wanted paper or official")


class Mimir(AdvMae):
    """adv-MAE with the mutual-information penalty."""

    config: MimirConfig

    def __init__(self, config: MimirConfig) -> None:
        super().__init__(config)
        self.token_order = "shuffled" if config.mi.tokens == "shuffled" else "sorted"

    def combine(
        self, model: nn.Module, images: Tensor, draws: Draws, adversarial: Adversarial, latent_BTD: Tensor,
        reconstruction: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        """{"loss": total, "reconstruction": …, "mi": the estimate before λ}."""
        if self.config.mi.estimator == "none":
            return {"loss": reconstruction}
        image = self._image(autoencoder(model).patch_size, images, draws, adversarial)
        mi = mutual_information(self.config.mi, image, latent_BTD)
        return {
            "loss": reconstruction + self.config.mi.weight * mi,
            "reconstruction": reconstruction.detach(),
            "mi": mi.detach(),
        }

    def _image(self, patch_size: int, images: Tensor, draws: Draws, adversarial: Adversarial) -> Tensor:
        """(B, N, P), the image side of the estimate: positions aligned between images, as distances demand."""
        B, N = len(images), images.shape[-1] * images.shape[-2] // patch_size**2
        if self.config.mi.inputs == "adversarial" and adversarial.patches is not None:
            return adversarial.patches
        everywhere = torch.arange(N, device=images.device).expand(B, N)
        # A fresh tensor in each case, so the visible patches may be written into it.
        image = patchify_gather(images, everywhere, patch_size)
        if self.config.mi.inputs == "clean":
            return image
        if self.config.mi.inputs == "visible":
            image.zero_()
        return image.scatter_(1, draws.mask.keep.unsqueeze(-1).expand_as(adversarial.visible), adversarial.visible)
