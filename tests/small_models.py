"""Masked models of any size, so that a test need not be a named one, and steps of theirs."""

from mimir_fast.data.batch import Batch
from mimir_fast.methods.mae import Mae
from mimir_fast.methods.step import MaskedStep
from mimir_fast.models.decoder import Decoder
from mimir_fast.models.families.vit import VitEncoder
from mimir_fast.models.masked_model import MaskedModel


def masked_vit(
    img_size: int = 16, patch_size: int = 4, in_chans: int = 3, embed_dim: int = 32, depth: int = 2, num_heads: int = 2,
    decoder_embed_dim: int = 16, decoder_depth: int = 2, decoder_num_heads: int = 2, mlp_ratio: float = 4.0,
) -> MaskedModel:  # fmt: skip
    """A masked autoencoder by the argument names of MAE's and the MIMIR authors' constructors."""
    encoder = VitEncoder(
        embed_dim, depth, num_heads, image_size=img_size, patch_size=patch_size, channels=in_chans, mlp_ratio=mlp_ratio
    )
    return MaskedModel(encoder, Decoder(encoder, decoder_embed_dim, decoder_depth, decoder_num_heads, mlp_ratio))


def prepared(method: Mae, model: MaskedModel, batch: Batch, number: int = 0) -> MaskedStep:
    """A step of seed 0 after its attack, before the training pass."""
    step = MaskedStep(model, batch, seed=0, number=number)
    method.prepare(step)
    return step
