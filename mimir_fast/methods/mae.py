"""Masked autoencoding of clean images (He et al., arXiv 2111.06377): the plain baseline and its relatives' frame.

A step of `Mae` draws (a mask, and whatever else is random), looks (which pixels the encoder is shown), runs the model,
and sums terms. A relative says what differs: what it draws, how it perturbs what is shown, which terms it pays for.
Shapes: B images, N patches, K kept, M masked, P numbers a patch, T latent tokens, D width.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Self, cast

import torch
from torch import Tensor, nn

from mimir_fast.attacks.modes import borrowed_in_mode
from mimir_fast.attacks.no_trace import unwrap
from mimir_fast.data.batch import Batch
from mimir_fast.methods.masking import SHARES, Mask, check_decode_ratio, draw_mask, draw_share, num_keep, unit_factor
from mimir_fast.methods.noise import UniformNoise
from mimir_fast.methods.registry import MethodEntry, Objective, register
from mimir_fast.methods.terms import Term, total
from mimir_fast.models.masked_model import MaskedModel, Output, View
from mimir_fast.ops.bf16_kernels import weights_stay
from mimir_fast.ops.masked_loss import Kind, masked_loss
from mimir_fast.ops.patches import patchify, patchify_gather, unpatchify
from mimir_fast.ops.random_masks import TokenOrder
from mimir_fast.philox import Stream
from mimir_fast.validation import check_number


@dataclass
class MaeConfig(Objective):
    """What every masked method shares."""

    mask_ratio: float = 0.75
    """Fraction of the patches that is masked."""
    norm_pix_loss: bool = True
    """Reconstruct patches normalised to zero mean and unit variance each."""
    mask_unit: int | None = None
    """Side in pixels of what is masked as a whole, a multiple of the patch; None: the patch. SimMIM: 32."""
    pixel_loss: Kind = "l2"
    """Error of the reconstruction: mean squared (MAE) or mean absolute (SimMIM)."""
    decode_ratio: float = 1.0
    """Share of the masked patches that is predicted and paid for, drawn anew in each step; the decoder sees no mask
    tokens in the other places, and an attack maximises the error of this share. CrossMAE: 0.25."""

    def __post_init__(self) -> None:
        check_number("decode_ratio", self.decode_ratio, above=0, at_most=1)
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio={self.mask_ratio}, wanted a fraction between 0 and 1, such as 0.75")
        if self.mask_unit is not None and self.mask_unit < 1:
            raise ValueError(f"mask_unit={self.mask_unit}, wanted a multiple of the patch in pixels, such as 32")
        if self.pixel_loss not in ("l2", "l1"):
            raise ValueError(f"pixel_loss={self.pixel_loss!r}, wanted l2 or l1")

    def fit(self, image_size: int) -> Self:
        """SimMIM's unit of 32 pixels is for 224²: images that have no four of them a side are masked by the patch."""
        return replace(self, mask_unit=None) if self.mask_unit and image_size < 4 * self.mask_unit else self

    def check_images(self, image_size: int, mask_unit: int) -> None:
        """Raises ValueError where the unit does not tile the image, or the ratio leaves no patch on either side."""
        factor = unit_factor(self.mask_unit, mask_unit, image_size)
        num_keep((image_size // mask_unit // factor) ** 2, self.mask_ratio)

    def check_model(self, model: nn.Module) -> None:
        """Raises ValueError where a share of the masked patches cannot be predicted without the others."""
        check_decode_ratio(masked_model(model), self.decode_ratio)


@dataclass
class Draws:
    """Everything random in one step."""

    mask: Mask
    """Of the training forward."""
    attack_mask: Mask | None = None
    """Of the attack, where there is one; the same object as `mask` when it is shared."""
    delta: UniformNoise | Tensor | None = None
    """Where the perturbation starts: noise, or (B, K, P) of the visible patches, (B, N, P) of all; None at the clean
    image."""
    attacks: bool = True
    """Whether this step attacks, or leaves the input where the attack would start."""
    compares: bool = False
    """Whether this step compares the attack's precision with fp32."""


@dataclass
class Shown:
    """What the encoder is shown."""

    visible: Tensor
    """(B, K, P) visible patches, perturbed or not."""
    patches: Tensor | None = None
    """(B, N, P) the whole perturbed image, where the perturbation went beyond the visible patches."""
    notes: dict[str, Tensor] = field(default_factory=dict)
    """Scalars to log of the perturbation, by name."""


@dataclass
class Step:
    """One step after the model's forward pass: what terms are made of."""

    model: nn.Module
    batch: Batch
    draws: Draws
    view: View
    shown: Shown
    output: Output


def masked_model(model: nn.Module) -> MaskedModel:
    """The bare masked model inside whatever wraps it."""
    return cast(MaskedModel, unwrap(model))


class MaskedMethod(ABC):
    """What is drawn for a step, then its losses; `preview` shows both."""

    token_order: TokenOrder = "sorted"

    def __init__(self, config: MaeConfig) -> None:
        self.config = config

    def __call__(self, model: nn.Module, batch: Batch, *, seed: int, step: int) -> dict[str, Tensor]:
        """{"loss": scalar, …}; `model` is a MaskedModel, possibly wrapped for data parallelism."""
        with weights_stay():
            return self.losses(model, batch, self.draw(masked_model(model), batch, seed=seed, step=step))

    @abstractmethod
    def draw(self, model: MaskedModel, batch: Batch, *, seed: int, step: int | Tensor) -> Draws:
        """All random numbers of the step, functions of (seed, step, sample); the step may be a scalar on the device."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """{"loss": …, terms by name where there are several} of one step with the given draws."""

    @abstractmethod
    def preview(self, model: nn.Module, batch: Batch, *, seed: int, step: int) -> dict[str, Tensor]:
        """Rows (B, C, H, W) in [0, 1] of what a step sees and makes."""

    def draw_mask(self, model: MaskedModel, batch: Batch, stream: Stream, *, seed: int, step: int | Tensor) -> Mask:
        """A mask of the configured ratio and unit, with the share of it that is predicted."""
        mask = draw_mask(
            model, batch.samples, self.config.mask_ratio, seed=seed, step=step, stream=stream, order=self.token_order,
            mask_unit=self.config.mask_unit,
        )  # fmt: skip
        return draw_share(mask, batch.samples, self.config.decode_ratio, seed=seed, step=step, stream=SHARES[stream])


class Mae(MaskedMethod):
    """Reconstruct the masked patches from the visible ones."""

    def draw(self, model: MaskedModel, batch: Batch, *, seed: int, step: int | Tensor) -> Draws:
        """The mask."""
        return Draws(self.draw_mask(model, batch, Stream.MASK, seed=seed, step=step))

    def perturb(self, model: nn.Module, images: Tensor, draws: Draws) -> Shown:
        """What the encoder is shown of the images."""
        return Shown(patchify_gather(images, draws.mask.keep, masked_model(model).patch_size))

    def terms(self, step: Step) -> list[Term]:
        """What the step pays for."""
        error = masked_loss(
            step.output.prediction, step.batch.images, step.draws.mask.masked, masked_model(step.model).patch_size,
            norm_pix=self.config.norm_pix_loss, kind=self.config.pixel_loss,
        )  # fmt: skip
        return [Term("reconstruction", error)]

    def losses(self, model: nn.Module, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """{"loss": …, terms by name where there are several} of one step with the given draws."""
        return self.sum_up(self.forward(model, batch, draws))

    def sum_up(self, step: Step) -> dict[str, Tensor]:
        """The terms and their sum, and what there is to log of the perturbation."""
        return total(self.terms(step), **step.shown.notes)

    def forward(self, model: nn.Module, batch: Batch, draws: Draws) -> Step:
        """Perturbation and the model's forward pass."""
        return self.reconstruct(model, batch, draws, self.perturb(model, batch.images, draws))

    def reconstruct(self, model: nn.Module, batch: Batch, draws: Draws, shown: Shown) -> Step:
        """The model's forward pass."""
        view = View(shown.visible, draws.mask.keep, draws.mask.masked)
        return Step(model, batch, draws, view, shown, model(view))

    @torch.no_grad()
    def preview(self, model: nn.Module, batch: Batch, *, seed: int, step: int) -> dict[str, Tensor]:
        """Rows (B, C, H, W) in [0, 1]: input, what it was perturbed to, what the encoder sees, the reconstruction."""
        bare = masked_model(model)
        draws = self.draw(bare, batch, seed=seed, step=step)
        shown = self.perturb(model, batch.images, draws)
        with borrowed_in_mode(model) as module:
            prediction = module(View(shown.visible, draws.mask.keep)).prediction.float()
        return preview_rows(batch.images, shown, draws.mask, prediction, bare.patch_size, self.config.norm_pix_loss)


def preview_rows(
    images: Tensor, shown: Shown, mask: Mask, prediction_BNP: Tensor, patch_size: int, norm_pix: bool
) -> dict[str, Tensor]:
    """The rows of a preview from predictions everywhere."""
    patches = patchify(images, patch_size)
    if norm_pix:  # the prediction is of normalised patches: give each its own contrast back
        mean, std = patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()
        prediction_BNP = prediction_BNP * std + mean
    place = mask.keep.unsqueeze(-1).expand_as(shown.visible)
    perturbed = shown.patches if shown.patches is not None else patches.scatter(1, place, shown.visible)
    seen = torch.full_like(patches, 0.5).scatter(1, place, shown.visible)
    completed = prediction_BNP.scatter(1, place, shown.visible)
    rows = {"input": patches, "perturbed": perturbed, "masked": seen, "reconstruction": completed}
    if torch.equal(perturbed, patches):
        del rows["perturbed"]
    return {name: unpatchify(x, patch_size) for name, x in rows.items()}


register(MethodEntry("mae", "pretrain", MaeConfig, Mae, "MAE on clean images"))
