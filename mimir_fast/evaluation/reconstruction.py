"""The masked autoencoder behind a classifier: loading it, and looking at what it fills in.

Shapes: B images, C channels, S × S pixels, N patches, K kept, M masked, P numbers a patch.
"""

from pathlib import Path

import torch
from torch import Tensor

from mimir_fast.models.masked_autoencoder import DECODERS, MaskedAutoencoder, ModelConfig, build_masked_autoencoder
from mimir_fast.ops.patches import gather_patches, patchify, unpatchify
from mimir_fast.ops.random_masks import random_masks

MASK_RATIO = 0.75


def load_masked_autoencoder(source: str | Path) -> tuple[MaskedAutoencoder, bool]:
    """(model, norm_pix): a pre-trained masked autoencoder in eval mode, and whether it predicts normalised patches.

    From anything `read_weights` reads; files that do not say how they were trained count as normalised, as MAE's are.

    Raises:
        WeightsError: unreadable, or of no encoder of ours.
        ValueError: there is no decoder (an exported encoder, or a classifier).
    """
    from mimir_fast.models.loading import infer_shape
    from mimir_fast.models.weight_files import read_weights

    weights = read_weights(source)
    if "decoder_embed.weight" not in weights.tensors:
        raise ValueError(
            f"--pretrained {source}: it holds no decoder, so it is no masked autoencoder; give the pre-training run, "
            "not an exported encoder or a classifier"
        )
    shape, width = infer_shape(weights), len(weights.tensors["decoder_embed.weight"])
    decoder = next((name for name, (w, _, _) in DECODERS.items() if w == width), None)
    if decoder is None:
        raise ValueError(f"--pretrained {source}: a decoder {width} wide is none of {', '.join(DECODERS)}")
    config = ModelConfig(encoder=shape.encoder, patch_size=shape.patch_size, decoder=decoder)
    with torch.random.fork_rng([]):
        model = build_masked_autoencoder(config, shape.image_size, shape.channels)
    model.load_state_dict(weights.tensors)
    norm_pix = (weights.config or {}).get("objective", {}).get("norm_pix_loss", True)
    return model.eval().requires_grad_(False), bool(norm_pix)


@torch.no_grad()
def reconstruct(model: MaskedAutoencoder, images: Tensor, samples: Tensor, seed: int, norm_pix: bool = True) -> Tensor:
    """(B, C, S, S) in [0, 1]: the visible patches and, in place of the masked ones, the prediction.

    Args:
        norm_pix: the model predicts patches normalised one by one; their true mean and deviation are put back, as MAE's
            own pictures do.
    """
    num_keep = max(1, int(model.num_patches * (1 - MASK_RATIO)))
    keep, masked = random_masks(samples, model.num_patches, num_keep, seed=seed, step=0)
    patches = patchify(images, model.patch_size)
    prediction = model(gather_patches(patches, keep), keep, masked)[1].float()
    if norm_pix:
        truth = gather_patches(patches, masked)
        prediction = prediction * (truth.var(dim=-1, keepdim=True) + 1e-6).sqrt() + truth.mean(dim=-1, keepdim=True)
    full = patches.scatter(1, masked.unsqueeze(-1).expand_as(prediction), prediction)
    return unpatchify(full, model.patch_size).clamp(0, 1)
