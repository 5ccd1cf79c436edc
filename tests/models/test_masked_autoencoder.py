"""The masked autoencoder: names of the authors, patch space, and the short cut of the last decoder block."""

import json
from pathlib import Path

import pytest
import torch
from file_state import file_state
from safetensors.torch import load_file
from small_models import masked_vit

from mimir_fast.models.families.vit import SIZES
from mimir_fast.models.masked_model import MaskedModel, ModelConfig, View, build_masked_model
from mimir_fast.models.positions import sincos_positions
from mimir_fast.ops.patches import patchify, unpatchify
from mimir_fast.ops.random_masks import masks_from_noise

GOLDEN = Path(__file__).parents[1] / "golden"
AUTHORS_SIZES = {"ti": "tiny", "small": "small", "base": "base"}


@pytest.mark.parametrize("geometry", ["32p2", "64p4", "224p16"])
@pytest.mark.parametrize("size", AUTHORS_SIZES)
def test_state_dict_equals_the_authors(size: str, geometry: str) -> None:
    """Their checkpoints load strictly: same names, same shapes."""
    wanted = json.loads((GOLDEN / "state_dicts.json").read_text())[f"pre/mae_vit_{size}/{geometry}"]
    image_size, patch_size = map(int, geometry.split("p"))
    with torch.device("meta"):
        model = build_masked_model(ModelConfig(encoder=AUTHORS_SIZES[size], patch_size=patch_size), image_size)
    assert {name: list(t.shape) for name, t in file_state(model).items()} == dict(wanted)


def test_large_and_the_mae_decoder_build() -> None:
    with torch.device("meta"):
        model = build_masked_model(ModelConfig(encoder="large", decoder="mae"), 224)
    assert len(model.encoder.blocks) == SIZES["large"][1] and len(model.decoder.decoder_blocks) == 8
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(329.5e6, rel=0.01)  # MAE's ViT-L


def test_positions_equal_the_authors() -> None:
    state = load_file(GOLDEN / "mini_step.safetensors")
    torch.testing.assert_close(sincos_positions(32, 4), state["state_dict/pos_embed"], rtol=0, atol=1e-6)


def test_patch_layout_equals_the_authors() -> None:
    golden = load_file(GOLDEN / "patchify.safetensors")
    assert torch.equal(patchify(golden["imgs"], 4), golden["patches"])
    assert torch.equal(unpatchify(golden["patches"], 4), golden["imgs"])


def test_masking_equals_the_authors() -> None:
    golden = load_file(GOLDEN / "random_masking.safetensors")
    keep, masked = masks_from_noise(golden["noise"], golden["x_masked"].shape[1])
    kept = golden["x"].gather(1, keep.unsqueeze(-1).expand(-1, -1, 8))
    assert torch.equal(kept, golden["x_masked"])
    mask = torch.zeros_like(golden["mask"]).scatter(1, masked, 1)
    assert torch.equal(mask, golden["mask"])


@pytest.fixture
def tiny() -> MaskedModel:
    torch.manual_seed(0)
    return masked_vit(16, 4, 3, 32, 2, 2, 16, 2, 2)


def test_embedding_in_patch_space_is_the_convolution(tiny: MaskedModel) -> None:
    images = torch.rand(2, 3, 16, 16)
    ids = torch.arange(16).expand(2, -1)
    convolved = tiny.encoder.patch_embed.proj(images).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tiny.encoder.embed(patchify(images, 4), ids), convolved, rtol=1e-5, atol=1e-6)


def test_predicting_masked_patches_only_changes_nothing(tiny: MaskedModel) -> None:
    """Values and gradients equal those of predicting everywhere and picking afterwards."""
    keep, masked = masks_from_noise(torch.rand(2, 16), 4)
    visible = torch.rand(2, 4, 48)
    short = tiny(View(visible, keep, masked)).prediction
    long = tiny(View(visible, keep)).prediction.gather(1, masked.unsqueeze(-1).expand(-1, -1, 48))
    torch.testing.assert_close(short, long, rtol=1e-5, atol=1e-6)
    weights = [p for p in tiny.parameters() if p.requires_grad]
    for a, b in zip(torch.autograd.grad(short.square().sum(), weights, allow_unused=True),
                    torch.autograd.grad(long.square().sum(), weights, allow_unused=True), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_embedding_stays_in_fp32_under_autocast(tiny: MaskedModel) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        tokens = tiny.encoder.embed(torch.rand(1, 4, 48), torch.arange(4)[None])
        latent = tiny(View(torch.rand(1, 4, 48), torch.arange(4)[None])).latent
    assert tokens.dtype == torch.float32 and latent.isfinite().all()


def test_bad_geometry_names_what_fits() -> None:
    with pytest.raises(ValueError, match=r"224 is not divisible by patch size 15; patch sizes that fit: 2, 4, 7, 8"):
        masked_vit(224, 15)
