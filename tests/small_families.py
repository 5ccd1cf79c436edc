"""Small masked models of the encoder families, and a batch for them."""

import torch
from torch import Tensor, nn

from mimir_fast.layers.norms import CLEAN
from mimir_fast.models.masked_model import MaskedModel, ModelConfig, View, build_masked_model
from mimir_fast.ops.patches import patchify_gather

IMAGE, PATCH, BATCH, KEPT = 32, 4, 3, 16


def moved(model: nn.Module) -> nn.Module:
    """With parameters away from zeros and ones, so that each shows in the result."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def make(family: str, decoder: str = "light", **choices: object) -> MaskedModel:
    torch.manual_seed(0)
    config = ModelConfig(family=family, encoder="nano", patch_size=PATCH, decoder=decoder, **choices)  # type: ignore[arg-type]
    model = moved(build_masked_model(config, IMAGE))
    assert isinstance(model, MaskedModel)
    return model


def draw(seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Images, kept and masked places."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(BATCH, (IMAGE // PATCH) ** 2, generator=generator).argsort(dim=1)
    return torch.rand(BATCH, 3, IMAGE, IMAGE, generator=generator), order[:, :KEPT], order[:, KEPT:]


def view(domain: int = CLEAN) -> View:
    images, keep, masked = draw()
    return View(patchify_gather(images, keep, PATCH), keep, masked, domain)
