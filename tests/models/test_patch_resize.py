"""FlexiViT's resize of the patch projection: timm's function, and exact where patches grow."""

import pytest
import torch
import torch.nn.functional as F
from file_state import file_state

from mimir_fast.models.classifier import ClassifierConfig, build_classifier
from mimir_fast.models.loading import initialize
from mimir_fast.models.patch_resize import resize_patches
from mimir_fast.models.weight_files import Weights, WeightsError


@pytest.mark.parametrize(("old", "new"), [(16, 8), (16, 14), (8, 16), (4, 2), (2, 4), (5, 5)])
def test_it_is_timms(old: int, new: int) -> None:
    layers = pytest.importorskip("timm.layers")
    weight = torch.randn(6, 3, old, old, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(resize_patches(weight, new), layers.resample_patch_embed(weight, [new, new]))
    assert resize_patches(weight.bfloat16(), new).dtype == torch.bfloat16


def test_enlarged_patches_give_the_same_tokens() -> None:
    weight, patch = torch.randn(6, 3, 4, 4), torch.rand(2, 3, 4, 4)
    enlarged = F.interpolate(patch, size=(8, 8), mode="bicubic", antialias=True)
    torch.testing.assert_close(
        F.conv2d(enlarged, resize_patches(weight, 8)), F.conv2d(patch, weight), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("family", ["vit", "convit", "cait", "swin", "convnext"])
def test_another_patch_size_is_resized_and_reported(family: str) -> None:
    """Twice the patch in twice the image: the same grid, and the same tokens of enlarged patches."""
    small = 2 if family in ("swin", "convnext") else 8
    source = build_classifier(ClassifierConfig(family, "nano", small), 32, 4)
    model = build_classifier(ClassifierConfig(family, "nano", 2 * small), 64, 4)
    report = initialize(model, Weights(file_state(source), "source"))
    name = "stem.0.weight" if family == "convnext" else "patch_embed.proj.weight"
    assert [text.split()[0] for text in report.resized] == [name]
    weight, resized = file_state(source)[name], file_state(model)[name]
    patch = torch.rand(2, 3, small, small)
    enlarged = F.interpolate(patch, size=(2 * small,) * 2, mode="bicubic", antialias=True)
    torch.testing.assert_close(F.conv2d(enlarged, resized), F.conv2d(patch, weight), rtol=1e-4, atol=1e-4)


def test_positions_follow_the_grid() -> None:
    source = build_classifier(ClassifierConfig("vit", "nano", 8), 32, 4)
    model = build_classifier(ClassifierConfig("vit", "nano", 4), 32, 4)
    report = initialize(model, Weights(file_state(source), "source"))
    assert report.resized == [
        "patch_embed.proj.weight (96, 3, 8, 8) -> (96, 3, 4, 4)",
        "pos_embed (1, 17, 96) -> (1, 65, 96)",
    ]


def test_a_stem_of_several_convolutions_is_not_resized() -> None:
    source = build_classifier(ClassifierConfig("xcit", "nano", 8), 32, 4)
    model = build_classifier(ClassifierConfig("xcit", "nano", 4), 32, 4)
    with pytest.raises(WeightsError, match=r"--model.patch_size 8"):
        initialize(model, Weights(file_state(source), "source"))
