"""ConvNeXt: timm's values on whole images, SparK's masked dense network on masked ones."""

from collections.abc import Callable

import pytest
import torch
from family_checks import CHECKS, Case, check_equals_timm, shaken, some_places, timm_of
from file_state import file_state
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from mimir_fast.models.families import Architecture, build_encoder
from mimir_fast.models.families.convnext import ConvNextDecoder, to_timm
from mimir_fast.models.masked_model import ModelConfig, build_masked_model
from mimir_fast.ops.patches import patchify_gather, unpatchify_visible

NANO = Case("convnext", "nano", 32, 2)
TINY = Case("convnext", "tiny", 224, 4)


@pytest.mark.parametrize("case", [NANO, TINY, Case("convnext", "nano", 64, 4, channels=1)], ids=str)
def test_whole_images_equal_timm(case: Case) -> None:
    check_equals_timm(case)


@pytest.mark.parametrize("check", CHECKS)
def test_every_family(check: Callable[[Case], None]) -> None:
    check(NANO)


class Remasked(nn.Module):
    """A layer of timm's whose output is set to zero at masked places, whatever its resolution: SparK's definition."""

    def __init__(self, layer: nn.Module, mask_B1GG: Tensor) -> None:
        super().__init__()
        self.layer, self.mask_B1GG = layer, mask_B1GG

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        scale = out.shape[-1] // self.mask_B1GG.shape[-1]
        return out * self.mask_B1GG.repeat_interleave(scale, -1).repeat_interleave(scale, -2)


@pytest.mark.parametrize("case", [NANO, TINY], ids=str)
def test_masked_images_equal_a_dense_network_masked_again_after_each_convolution(case: Case) -> None:
    encoder, images = case.encoder(), case.images()
    places = some_places(encoder)
    patches = patchify_gather(images, places, encoder.mask_unit)
    dense = timm_of(encoder.state_dict(), case.architecture)
    assert isinstance(dense, ConvNeXt)
    mask = torch.zeros(2, encoder.num_patches).scatter(1, places, 1).view(2, 1, encoder.grid, encoder.grid)
    dense.stem = Remasked(dense.stem, mask)
    for stage in dense.stages:
        if isinstance(stage, nn.Identity):
            continue
        stage.downsample = Remasked(stage.downsample, mask)
        for block in stage.blocks:
            block.conv_dw = Remasked(block.conv_dw, mask)
        stage.blocks = nn.Sequential(*(Remasked(block, mask) for block in stage.blocks))
    zeroed = unpatchify_visible(patches, places, encoder.mask_unit, case.image_size, case.image_size)
    with torch.no_grad():
        wanted = dense.forward_features(zeroed).flatten(2).transpose(1, 2)
        wanted = wanted.gather(1, places.unsqueeze(-1).expand(-1, -1, encoder.width))
        latent = encoder.encode(encoder.embed(patches, places), places)
    assert latent.shape == (2, places.shape[1], encoder.width)
    torch.testing.assert_close(latent, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_gradients_equal_the_dense_network_too() -> None:
    """Through the layout and back: the whole image as one set of units, and as itself."""
    images = NANO.images()
    gradients = []
    for places in (None, torch.arange(16).expand(2, -1)):
        encoder = NANO.encoder()
        patches = patchify_gather(images, torch.arange(16).expand(2, -1), encoder.mask_unit)
        latent = encoder.encode(encoder.embed(patches, places), places)
        gradients.append(torch.autograd.grad(latent.square().mean(), list(encoder.parameters())))
    for dense, masked in zip(*gradients, strict=True):
        torch.testing.assert_close(masked, dense, rtol=1e-3, atol=1e-6)


def test_decoder_is_of_the_familys_blocks_and_spreads_what_is_visible() -> None:
    model = shaken(build_masked_model(ModelConfig("convnext", "nano", 2, "light"), 32))
    assert isinstance(model.decoder, ConvNextDecoder)
    names = set(file_state(model))
    assert "decoder_blocks.1.conv_dw.weight" in names
    assert not names & {"decoder_pos_embed", "decoder_blocks.0.gamma"}
    latent = torch.rand(1, 2, 128, requires_grad=True)
    places = torch.tensor([[0, 5]])
    everywhere = model.decoder(latent, places)
    some = model.decoder(latent, places, torch.tensor([[15, 3]]))
    torch.testing.assert_close(some, everywhere[:, [15, 3]])
    (gradient,) = torch.autograd.grad(some.square().sum(), latent)
    assert gradient.any(dim=-1).all()


def test_stem_of_two_and_three_stages_in_timm() -> None:
    """timm has four stages and merges behind a stem of 2: the printed code takes both away."""
    encoder = NANO.encoder()
    code = to_timm(encoder.state_dict(), NANO.architecture).code
    assert "stages[3] = torch.nn.Identity()" in code and "stages[0].downsample = torch.nn.Identity()" in code
    assert "Identity" not in to_timm(TINY.encoder().state_dict(), TINY.architecture).code


@pytest.mark.parametrize("size, millions", [("tiny", 27.8), ("small", 49.5), ("base", 87.6)])
def test_sizes_are_the_papers(size: str, millions: float) -> None:
    """Table 9 counts the head of 1000 classes too (28.6, 50.2, 88.6)."""
    with torch.device("meta"):
        encoder = build_encoder(Architecture("convnext", size, 224, 4))
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize(
    "image_size, patch_size, words",
    [
        (200, 4, "unit of 4 stages over a stem patch of 4 .*: use a stem patch of 1, or images of 192 or 224 pixels"),
        (32, 8, "stem patch of 1 or 2 or 4, or images of 64 pixels"),
        (224, 0, "such as 4"),
    ],
)
def test_images_that_do_not_divide(image_size: int, patch_size: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_encoder(Architecture("convnext", "tiny", image_size, patch_size))
