"""XCiT: convolutions over a grid with holes, timm's Xcit on whole images, the authors' files, stems."""

import json
from pathlib import Path

import pytest
import timm.models.xcit
import torch
import torch.nn.functional as F
from file_state import file_state
from small_families import draw, make, moved
from torch import nn

from mimir_fast.models.classifier import Classifier, ClassifierConfig
from mimir_fast.models.encoder import conv_over_grid
from mimir_fast.models.families import find_family, recognise
from mimir_fast.models.families.xcit import ConvStem, FourierPositions, LocalInteraction, XcitEncoder
from mimir_fast.models.loading import initialize
from mimir_fast.models.masked_model import ModelConfig, build_masked_model
from mimir_fast.models.weight_files import Weights
from mimir_fast.ops.patches import gather_patches, patchify, unpatchify

STATES = json.loads((Path(__file__).parents[1] / "golden" / "state_dicts.json").read_text())


def test_convolution_over_a_grid_with_holes_sees_zeros_there() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, 3, stride=2, padding=1)
    images, keep, masked = draw()
    patches = patchify(images, 4)
    holes = patches.scatter(1, masked.unsqueeze(-1).expand(-1, -1, 48), 0.0)
    expected = gather_patches(patchify(conv(unpatchify(holes, 4)), 2), keep)
    torch.testing.assert_close(conv_over_grid(conv, gather_patches(patches, keep), 4, keep, 8), expected)
    torch.testing.assert_close(conv_over_grid(conv, patches, 4, None, 8), patchify(conv(images), 2))


def test_batch_norm_counts_visible_tokens_only() -> None:
    torch.manual_seed(0)
    layer = moved(LocalInteraction(12)).train()
    assert isinstance(layer, LocalInteraction)
    _, keep, _ = draw()
    x = torch.randn(*keep.shape, 12)
    layer(x, keep, 8)
    rows = F.gelu(conv_over_grid(layer.conv1, x, 1, keep, 8)).flatten(0, 1)
    torch.testing.assert_close(layer.bn.running_mean, 0.1 * rows.mean(dim=0))
    torch.testing.assert_close(layer.bn.running_var, 0.9 + 0.1 * rows.var(dim=0))


def test_positions_are_timm_s() -> None:
    theirs = timm.models.xcit.PositionalEncodingFourier(dim=24)
    ours = FourierPositions(24, 7)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    torch.testing.assert_close(ours(), theirs(1, 7, 7)[0].flatten(1).T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(("image_size", "patch_size"), [(32, 8), (64, 16)])
def test_stem_is_timm_s_on_whole_images(image_size: int, patch_size: int, mode: str) -> None:
    torch.manual_seed(0)
    theirs = moved(timm.models.xcit.ConvPatchEmbed(image_size, patch_size, 3, 48)).train(mode == "train")
    ours = ConvStem(3, 48, patch_size).train(mode == "train")
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.rand(2, 3, image_size, image_size)
    got = ours(patchify(images, patch_size), None, image_size // patch_size)
    torch.testing.assert_close(got, theirs(images)[0], rtol=1e-4, atol=1e-5)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer, rtol=1e-4, atol=1e-5)


def test_layers_convolve_over_true_neighbours() -> None:
    """A token feels those beside it on the grid, whatever their order; far-apart ones never meet in a convolution."""
    torch.manual_seed(0)
    layer = moved(LocalInteraction(12)).eval()
    x = torch.randn(1, 16, 12)
    changed = x.clone()
    changed[:, 0] += 1
    apart, beside = (
        torch.tensor([[row * 8 + column for row in range(0, 4 * step, step) for column in range(0, 4 * step, step)]])
        for step in (2, 1)
    )
    for places, grid, reached in ((apart, 8, 1), (beside, 8, 9), (None, 4, 9)):
        difference = layer(changed, places, grid) - layer(x, places, grid)
        assert int(difference.abs().sum(dim=-1).ne(0).sum()) == reached
    shuffled = torch.randperm(16)
    torch.testing.assert_close(layer(x[:, shuffled], beside[:, shuffled], 8), layer(x, beside, 8)[:, shuffled])


@pytest.mark.parametrize("patch_size", [8, 16])
def test_export_has_timm_s_features(patch_size: int) -> None:
    torch.manual_seed(0)
    model = moved(build_masked_model(ModelConfig("xcit", "nano", patch_size), 64)).eval()
    architecture = recognise(file_state(model))
    assert architecture is not None
    exported = find_family("xcit").to_timm(file_state(model), architecture)
    theirs = timm.models.xcit.Xcit(**exported.arguments).eval()
    theirs.load_state_dict(exported.tensors, strict=True)
    images = torch.rand(2, 3, 64, 64)
    ours = model.encoder.encode(model.encoder.embed(patchify(images, patch_size), None), None)  # type: ignore[union-attr, operator]
    torch.testing.assert_close(ours, theirs.forward_features(images), rtol=1e-4, atol=1e-4)


def test_export_needs_a_stem_that_timm_has() -> None:
    state = file_state(make("xcit"))
    architecture = recognise(state)
    assert architecture is not None
    with pytest.raises(ValueError, match="timm's Xcit has stems for patches of 8 and 16 pixels, this encoder's are 4"):
        find_family("xcit").to_timm(state, architecture)


def test_classifier_from_timm() -> None:
    torch.manual_seed(1)
    theirs = moved(
        timm.models.xcit.Xcit(
            img_size=32, patch_size=8, embed_dim=96, depth=4, num_heads=4, num_classes=10, tokens_norm=True
        )
    ).eval()
    ours = Classifier(ClassifierConfig("xcit", "nano", 8, global_pool="cls"), 32, 10).eval()
    initialize(ours, Weights(dict(theirs.state_dict()), "timm:small"))
    images = draw()[0]
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-5)


def test_pretrained_names_are_the_authors() -> None:
    with torch.device("meta"):
        state = file_state(build_masked_model(ModelConfig("xcit", "small"), 224))
    assert {name: list(t.shape) for name, t in state.items()} == dict(STATES["pre/mae_xcit_small/224"])


def test_tokens_norm_off_is_timm_s() -> None:
    torch.manual_seed(1)
    theirs = moved(timm.models.xcit.ClassAttentionBlock(24, 4, qkv_bias=True, eta=0.5, tokens_norm=False)).eval()
    encoder = XcitEncoder(24, 1, 4, 0.5, image_size=16, patch_size=8, tokens_norm=False, cls_attn_layers=1)
    ours = encoder.cls_attn_blocks[0]
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ours.norm1.eps = ours.norm2.eps = 1e-5  # type: ignore[union-attr, assignment]
    x = torch.randn(2, 5, 24)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("image_size", "patch_size", "fix"), [(224, 32, "choose 2 or 4 or 8 or 16"), (49, 7, "multiple of 8")]
)
def test_patches_without_a_stem_are_refused(image_size: int, patch_size: int, fix: str) -> None:
    with pytest.raises(ValueError, match=f"cannot make patches of {patch_size} pixels.*{fix}"):
        XcitEncoder(24, 1, 4, image_size=image_size, patch_size=patch_size)
