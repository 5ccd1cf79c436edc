"""The record of one step of a masked method: what is given, and what the method fills in from top to bottom.

Shapes: B images, N patches, K kept, M masked, P numbers a patch, T latent tokens, D width.
"""

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from mimir_fast.data.batch import Batch
from mimir_fast.layers.borrowing import unwrap
from mimir_fast.methods.masks import Mask, MaskConfig
from mimir_fast.models.masked_model import MaskedModel, View
from mimir_fast.ops.noisy_patches import noisy_patches, only_noisy_patches
from mimir_fast.ops.patches import NORM_EPS, patchify_gather, unpatchify
from mimir_fast.ops.random_masks import TokenOrder
from mimir_fast.philox import Stream

Losses = dict[str, tuple[float | Tensor, Tensor]]
"""{name: (weight, scalar)} of a step."""


@dataclass
class MaskedStep:
    """One step. Reading a field that is not filled in yet is an AttributeError."""

    model: nn.Module
    """A MaskedModel, possibly wrapped for data parallelism."""
    batch: Batch
    """uint8 or float images (B, C, H, W), labels and sample numbers."""
    seed: int
    """Seed of the run."""
    number: int | Tensor
    """Number of the step; a scalar on the device while the step is recorded as a CUDA graph."""

    mask: Mask = field(init=False)
    """What the encoder sees, and what is predicted."""
    visible: Tensor = field(init=False)
    """(B, K, P) visible patches, perturbed or not."""
    whole: Tensor | None = None
    """(B, N, P) the whole perturbed image, where the perturbation went beyond the visible patches."""
    clean: tuple[View, Tensor] = field(init=False)
    """The clean view and its latent, where the step has a second, clean stream (AEMIM)."""
    estimate: tuple[Tensor, Tensor] | None = None
    """Where the penalty is estimated before the training pass (MIMIR): the estimate, and its gradient to the latent."""
    log: dict[str, Tensor] = field(default_factory=dict)
    """Scalars to log beside the losses."""
    latent: Tensor = field(init=False)
    """(B, T, D) of the visible patches; of all at full length."""
    prediction: Tensor = field(init=False)
    """(B, M, P) predicted patches, (2B, M, P) with a clean stream in front."""
    logits: Tensor | None = None
    """(B, classes) of the model's head, where it has one."""

    @property
    def bare(self) -> MaskedModel:
        """The MaskedModel inside its wrapper."""
        return cast(MaskedModel, unwrap(self.model))

    def draw_mask(self, config: MaskConfig, stream: Stream, order: TokenOrder = "sorted") -> Mask:
        """The mask of this step in this stream of random numbers."""
        return config.draw(self.bare, self.batch.samples, seed=self.seed, step=self.number, stream=stream, order=order)

    def noisy_patches(
        self, ids_BK: Tensor, eps: float | None, stream: Stream = Stream.ATTACK_START
    ) -> tuple[Tensor, Tensor]:
        """(B, K, P) each: the clean patches, and with noise uniform in [-eps, eps], cut to [0, 1]; None is no noise."""
        images, p = self.batch.images, self.bare.patch_size
        if eps is None:
            return (clean := patchify_gather(images, ids_BK, p)), clean
        return noisy_patches(
            images, ids_BK, p, self.batch.samples, seed=self.seed, step=self.number, eps=eps, stream=stream
        )

    def only_noisy_patches(self, ids_BK: Tensor, eps: float, stream: Stream = Stream.ATTACK_START) -> Tensor:
        """The noisy ones of `noisy_patches`, (B, K, P), without memory for the clean ones."""
        return only_noisy_patches(
            self.batch.images, ids_BK, self.bare.patch_size, self.batch.samples, seed=self.seed, step=self.number,
            eps=eps, stream=stream,
        )  # fmt: skip

    def pictures(
        self,
        view: View,
        patches_BNP: Tensor,
        *,
        norm_pix: bool,
        perturbed_BNP: Tensor | None = None,
        change: str = "adversarial",
    ) -> dict[str, Tensor]:
        """{"input", `change` and "difference" where they differ, "visible", "reconstruction"}: (B, C, H, W), in [0, 1].

        The difference is magnified to full range, grey where there is none; of what is visible, the rest is grey.

        Args:
            view: of the image, perturbed or not.
            patches_BNP: the image itself; a normalised prediction gets mean and deviation of its patches back.
            perturbed_BNP: the whole perturbed image; None where only visible patches were perturbed.
            change: what a perturbed image is called.
        """
        prediction = self.model(view._replace(masked=None)).prediction.float()
        if norm_pix:
            mean, variance = patches_BNP.mean(-1, keepdim=True), patches_BNP.var(-1, keepdim=True)
            prediction = prediction * (variance + NORM_EPS).sqrt() + mean

        def completed(patches: Tensor) -> Tensor:
            return patches.scatter(1, view.keep.unsqueeze(-1).expand_as(view.patches), view.patches)

        perturbed = completed(patches_BNP) if perturbed_BNP is None else perturbed_BNP
        rows, difference = {"input": patches_BNP}, perturbed - patches_BNP
        if difference.any():
            rows |= {change: perturbed, "difference": 0.5 + 0.5 * difference / difference.abs().max()}
        rows |= {"visible": completed(torch.full_like(patches_BNP, 0.5)), "reconstruction": completed(prediction)}
        height = self.batch.images.shape[2]
        return {name: unpatchify(row, self.bare.patch_size, height) for name, row in rows.items()}
