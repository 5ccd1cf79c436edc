"""The masked autoencoder behind a classifier: loading it, and looking at what it fills in.

Shapes: B images, C channels, S × S pixels, N patches, K kept, M masked, P numbers a patch.
"""

from pathlib import Path

import torch
from torch import Tensor

from mimir_fast.models.masked_loading import load_masked_model
from mimir_fast.models.masked_model import MaskedModel, View
from mimir_fast.models.weight_files import WeightsError
from mimir_fast.ops.patches import gather_patches, patchify, unpatchify
from mimir_fast.ops.random_masks import random_masks

MASK_RATIO = 0.75


def load_masked_autoencoder(source: str | Path) -> tuple[MaskedModel, bool]:
    """(model, norm_pix): a pre-trained masked autoencoder in eval mode, and whether it predicts normalised patches.

    From anything `read_weights` reads; files that do not say how they were trained count as normalised, as MAE's are.

    Raises:
        ValueError: unreadable, of no encoder of ours, or without a decoder (an exported encoder, or a classifier).
    """
    try:
        model, objective = load_masked_model(source)
    except WeightsError as error:
        raise ValueError(f"--pretrained {source}: {error}") from error
    return model, bool(objective.get("norm_pix_loss", True))


@torch.no_grad()
def reconstruct(model: MaskedModel, images: Tensor, samples: Tensor, seed: int, norm_pix: bool = True) -> Tensor:
    """(B, C, S, S) in [0, 1]: the visible patches and, in place of the masked ones, the prediction.

    Args:
        norm_pix: the model predicts patches normalised one by one; their true mean and deviation are put back, as MAE's
            own pictures do.
    """
    num_keep = max(1, int(model.num_patches * (1 - MASK_RATIO)))
    keep, masked = random_masks(samples, model.num_patches, num_keep, seed=seed, step=0)
    patches = patchify(images, model.patch_size)
    prediction = model(View(gather_patches(patches, keep), keep, masked)).prediction.float()
    if norm_pix:
        truth = gather_patches(patches, masked)
        prediction = prediction * (truth.var(dim=-1, keepdim=True) + 1e-6).sqrt() + truth.mean(dim=-1, keepdim=True)
    full = patches.scatter(1, masked.unsqueeze(-1).expand_as(prediction), prediction)
    return unpatchify(full, model.patch_size).clamp(0, 1)
