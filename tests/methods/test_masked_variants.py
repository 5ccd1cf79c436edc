"""SimMIM, the noise control and the single-stage experiment."""

import pytest
import torch
from small_models import masked_vit, prepared

from mimir_fast.data.batch import Batch
from mimir_fast.methods.mae import Mae, MaeConfig
from mimir_fast.methods.masks import patches_of_units
from mimir_fast.methods.noise_mae import NoiseMae, NoiseMaeConfig
from mimir_fast.methods.simmim import SimmimConfig
from mimir_fast.methods.single_stage import SingleStage, SingleStageConfig
from mimir_fast.models.masked_model import MaskedModel, ModelConfig, View, build_masked_model
from mimir_fast.ops.patches import gather_patches, patchify


@pytest.fixture
def batch() -> Batch:
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Batch(images, torch.arange(6) % 3, torch.arange(100, 106), torch.zeros(6, dtype=torch.int64))


@pytest.fixture
def simmim() -> MaskedModel:
    torch.manual_seed(0)
    return build_masked_model(ModelConfig(encoder="nano", patch_size=4, decoder="linear"), 32)


def test_patches_of_units() -> None:
    """A 4 × 4 grid in units of 2 × 2: unit 3 is the lower right quarter."""
    assert patches_of_units(torch.tensor([[3, 0]]), 2, 4).tolist() == [[10, 11, 14, 15, 0, 1, 4, 5]]


def test_a_mask_unit_hides_whole_squares(simmim: MaskedModel, batch: Batch) -> None:
    """Of 16 units of 8 × 8 pixels int(16·0.4) = 6 stay, and a unit's four patches are on the same side."""
    mask = prepared(Mae(SimmimConfig(mask_unit=8)), simmim, batch).mask
    assert mask.keep.shape == (6, 24) and mask.masked.shape == (6, 40)
    hidden = torch.zeros(6, 64).scatter(1, mask.masked, 1).view(6, 4, 2, 4, 2)
    assert torch.equal(hidden.amax(dim=(2, 4)), hidden.amin(dim=(2, 4)))
    both = torch.cat([mask.keep, mask.masked], dim=1).sort(dim=1).values
    assert torch.equal(both, torch.arange(64).expand(6, 64))


def test_simmim_is_the_formula(simmim: MaskedModel, batch: Batch) -> None:
    """Mask tokens with positions among embedded patches, all 64 through the blocks, L1 on masked raw pixels."""
    method = Mae(SimmimConfig(mask_unit=8))
    mask = prepared(method, simmim, batch).mask
    patches, encoder = patchify(batch.images, 4), simmim.encoder
    hidden = torch.zeros(6, 64, 1).scatter(1, mask.masked.unsqueeze(-1), 1)
    tokens = encoder.patch_embed(patches) * (1 - hidden) + simmim.mask_token * hidden
    x = torch.cat([encoder.cls_token.expand(6, -1, -1), tokens], dim=1) + encoder.pos_embed
    for block in encoder.blocks:
        x = block(x)
    predicted = simmim.decoder.decoder_pred(encoder.norm(x)[:, 1:])
    wanted = ((predicted - patches).abs() * hidden).sum() / (hidden.sum() * 48)
    torch.testing.assert_close(method(simmim, batch, seed=0, step=0)["loss"], wanted, rtol=1e-5, atol=1e-6)


def test_simmim_does_not_see_masked_pixels(simmim: MaskedModel, batch: Batch) -> None:
    mask = prepared(Mae(SimmimConfig(mask_unit=8)), simmim, batch).mask
    patches = patchify(batch.images, 4)
    other = patches.scatter(1, mask.masked.unsqueeze(-1).expand(-1, -1, 48), torch.rand(6, 40, 48))
    latents = [simmim(View(gather_patches(x, mask.keep), mask.keep)).latent for x in (patches, other)]
    assert latents[0].shape == (6, 65, 96) and torch.equal(*latents)


def test_noise_is_of_the_attack_s_size_and_a_function_of_the_sample(batch: Batch) -> None:
    model, method = masked_vit(img_size=32), NoiseMae(NoiseMaeConfig(eps=8 / 255))
    step = prepared(method, model, batch, 4)
    noise = step.visible - gather_patches(patchify(batch.images, 4), step.mask.keep)
    assert noise.abs().max() <= 8 / 255 + 1e-7 and noise.abs().mean() > 2 / 255
    assert torch.equal(prepared(method, model, batch.first(3), 4).visible, step.visible[:3])
    still = NoiseMae(NoiseMaeConfig(eps=0.0))(model, batch, seed=0, step=4)["loss"]
    torch.testing.assert_close(still, Mae(MaeConfig())(model, batch, seed=0, step=4)["loss"])
    with pytest.raises(ValueError, match="looks like 8/255"):
        NoiseMaeConfig(eps=8)


def test_single_stage_pays_for_both(batch: Batch) -> None:
    torch.manual_seed(0)
    model = build_masked_model(ModelConfig(encoder="nano", patch_size=8), 32, num_classes=3)
    out = SingleStage(SingleStageConfig(class_weight=2.0))(model, batch, seed=0, step=0)
    torch.testing.assert_close(out["loss"].detach(), out["reconstruction"] + 2 * out["classification"])
    out["loss"].backward()
    assert model.head.weight.grad.any() and model.encoder.blocks[0].attn.qkv.weight.grad.any()
    headless = build_masked_model(ModelConfig(encoder="nano", patch_size=8), 32)
    with pytest.raises(ValueError, match="build it with num_classes"):
        SingleStage(SingleStageConfig())(headless, batch, seed=0, step=0)
