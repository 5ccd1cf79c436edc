"""Masked autoencoding of clean images (He et al., arXiv 2111.06377): the plain baseline.

Shapes: B images, N patches, K kept, M masked, P numbers a patch.
"""

from dataclasses import dataclass
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from mimir_fast.attacks.no_trace import unwrap
from mimir_fast.data.batch import Batch
from mimir_fast.methods.masking import draw_mask
from mimir_fast.models.masked_autoencoder import MaskedAutoencoder
from mimir_fast.ops.patches import masked_targets, patchify_gather
from mimir_fast.philox import Stream


@dataclass
class MaeConfig:
    """What every masked-autoencoder method shares."""

    mask_ratio: float = 0.75
    """Fraction of the patches that is masked."""
    norm_pix_loss: bool = True
    """Reconstruct patches normalised to zero mean and unit variance each."""

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mask_ratio={self.mask_ratio}, wanted a fraction between 0 and 1, such as 0.75")


def autoencoder(model: nn.Module) -> MaskedAutoencoder:
    """The bare masked autoencoder inside whatever wraps it."""
    return cast(MaskedAutoencoder, unwrap(model))


def reconstruction_loss(prediction_BMP: Tensor, target_BMP: Tensor) -> Tensor:
    """Mean squared error over the masked patches, in fp32."""
    return F.mse_loss(prediction_BMP.float(), target_BMP.float())


class Mae:
    """Reconstruct the masked patches from the visible ones."""

    def __init__(self, config: MaeConfig) -> None:
        self.config = config

    def __call__(self, model: nn.Module, batch: Batch, *, seed: int, step: int) -> dict[str, Tensor]:
        """{"loss": scalar}; `model` is a MaskedAutoencoder, possibly wrapped for data parallelism."""
        bare = autoencoder(model)
        mask = draw_mask(
            batch.samples, bare.num_patches, self.config.mask_ratio,
            seed=seed, step=step, stream=Stream.MASK, order="sorted",
        )  # fmt: skip
        visible = patchify_gather(batch.images, mask.keep, bare.patch_size)
        target = masked_targets(batch.images, mask.masked, bare.patch_size, norm_pix=self.config.norm_pix_loss)
        _, prediction = model(visible, mask.keep, mask.masked)
        return {"loss": reconstruction_loss(prediction, target)}
