"""Masked autoencoding of clean images (He et al., arXiv 2111.06377): the plain baseline, and the frame of the others.

One step: sample mask and noise, perturb visible patches, run the model, sum weighted losses; subclasses override these.
Shapes: B images, N patches, K kept, M masked, P numbers a patch.
"""

from dataclasses import dataclass, replace
from typing import Self, cast

import torch
from torch import Tensor, nn

from mimir_fast.data.batch import Batch
from mimir_fast.layers.borrowing import borrowed, unwrap
from mimir_fast.methods.masks import MaskConfig, check_decode_ratio
from mimir_fast.methods.registry import MethodEntry, register
from mimir_fast.methods.step import Losses, MaskedStep
from mimir_fast.models.masked_model import MaskedModel, View
from mimir_fast.ops.masked_loss import Kind, masked_loss
from mimir_fast.ops.patches import patchify, patchify_gather
from mimir_fast.ops.random_masks import TokenOrder
from mimir_fast.philox import Stream
from mimir_fast.sizes import Size, height_width
from mimir_fast.validation import check_choice


@dataclass
class MaeConfig(MaskConfig):
    """Options of every masked method."""

    norm_pix_loss: bool = True
    """Reconstruct patches normalised to zero mean and unit variance each."""
    pixel_loss: Kind = "l2"
    """Error of the reconstruction: mean squared (MAE) or mean absolute (SimMIM)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("pixel_loss", self.pixel_loss, ("l2", "l1"))

    def fit(self, image_size: Size) -> Self:
        """SimMIM's unit of 32 pixels is for 224²: images that have no four of them a side are masked by the patch."""
        return (
            replace(self, mask_unit=None)
            if self.mask_unit and min(height_width(image_size)) < 4 * self.mask_unit
            else self
        )

    def check_images(self, image_size: Size, mask_unit: int) -> None:
        """Raises ValueError where the unit does not tile the image, or the ratio leaves no patch on either side."""
        self.units(mask_unit, image_size)

    def check_model(self, model: nn.Module) -> None:
        """Raises ValueError where a share of the masked patches cannot be predicted without the others."""
        check_decode_ratio(cast(MaskedModel, unwrap(model)), self.decode_ratio)


class Mae:
    """Reconstruct the masked patches from the visible ones."""

    token_order: TokenOrder = "sorted"

    change = "adversarial"
    """What its pictures call a perturbed image."""

    def __init__(self, config: MaeConfig) -> None:
        self.config = config

    def __call__(self, model: nn.Module, batch: Batch, *, seed: int, step: int) -> dict[str, Tensor]:
        """{"loss": scalar, …}; `model` is a MaskedModel, possibly wrapped for data parallelism."""
        return self.run(MaskedStep(model, batch, seed, step))

    def run(self, step: MaskedStep) -> dict[str, Tensor]:
        """Fill the record; {"loss": Σ weight·value, each value if there are several, what is logged}."""
        self.prepare(step)
        return self.finish(step)

    def finish(self, step: MaskedStep) -> dict[str, Tensor]:
        """`run` from the training pass on."""
        self.forward(step)
        losses = self.losses(step)
        first, *others = (
            weight * value if torch.is_tensor(weight) or weight != 1 else value for weight, value in losses.values()
        )
        values = {name: value for name, (_, value) in losses.items()} if others else {}
        logged = {name: value.detach() for name, value in (values | step.log).items()}
        return {"loss": sum(others, start=first)} | logged

    def prepare(self, step: MaskedStep) -> None:
        """Fill in the mask and the visible patches: all that needs no gradient to the weights."""
        self.sample(step)
        self.perturb(step)

    def sample(self, step: MaskedStep) -> None:
        """Fill in which patches are visible and which are predicted."""
        step.mask = step.draw_mask(self.config, Stream.MASK, self.token_order)

    def perturb(self, step: MaskedStep) -> None:
        """Fill in the visible patches: here the clean ones."""
        step.visible = patchify_gather(step.batch.images, step.mask.keep, step.bare.patch_size)

    def forward(self, step: MaskedStep) -> None:
        """Fill in latent, prediction and logits: the training pass."""
        step.latent, step.prediction, step.logits = step.model(View(step.visible, *step.mask))

    def losses(self, step: MaskedStep) -> Losses:
        """{name: (weight, scalar)}; logged without the weight."""
        return {"reconstruction": (1.0, self.error(step, step.prediction, step.batch.images, step.bare.patch_size))}

    def error(self, step: MaskedStep, prediction_BMP: Tensor, images: Tensor, patch_size: int) -> Tensor:
        """Of the predicted patches against the masked ones of `images`, a scalar."""
        return masked_loss(
            prediction_BMP, images, step.mask.masked, patch_size, norm_pix=self.config.norm_pix_loss,
            kind=self.config.pixel_loss,
        )  # fmt: skip

    @torch.no_grad()
    def preview(self, model: nn.Module, batch: Batch, *, seed: int, step: int) -> dict[str, Tensor]:
        """Rows (B, C, H, W) in [0, 1] of what a step sees and makes; the model is left untouched."""
        with borrowed(model) as module:
            record = MaskedStep(module, batch, seed, step)
            self.sample(record)
            self.perturb(record)
            return self.rows(record)

    def rows(self, step: MaskedStep) -> dict[str, Tensor]:
        """Input, what it was perturbed to, what the encoder sees, the reconstruction."""
        patches, view = patchify(step.batch.images, step.bare.patch_size), View(step.visible, step.mask.keep)
        norm_pix = self.config.norm_pix_loss
        return step.pictures(view, patches, norm_pix=norm_pix, perturbed_BNP=step.whole, change=self.change)


register(MethodEntry("mae", "pretrain", MaeConfig, Mae, "MAE on clean images"))
