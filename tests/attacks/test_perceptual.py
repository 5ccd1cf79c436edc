"""The perceptual attack: the distance is that of LPIPS, it is kept, and it is used."""

import pytest
import torch
from small_classifier import SmallNet, SmallTransformer, small_perceptron
from torch import Tensor, nn

from mimir_fast.attacks.perceptual import features_of, layers_with_places, perceptual
from mimir_fast.attacks.pgd import cross_entropy, is_correct
from mimir_fast.evaluation.images import EvaluationImages
from mimir_fast.layers.outputs import outputs_of


@pytest.fixture(scope="module")
def digits(digits_images: EvaluationImages) -> tuple[Tensor, Tensor]:
    part = digits_images.evenly(32)
    return part.images.float() / 255, part.labels


def look(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad(), outputs_of(layers_with_places(model, images[:2])) as seen:
        model(images)
        return features_of(seen, images)


def lpips(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """(B,) as Zhang et al., arXiv 1801.03924, equation 1, have it, with all weights 1."""
    total = torch.zeros(len(x))
    with torch.no_grad(), outputs_of(layers_with_places(model, x[:2])) as seen:
        model(x)
        first = dict(seen)
        model(y)
        for name, output in seen.items():
            one, other = (nn.functional.normalize(each, dim=1) for each in (first[name], output))
            total += (one - other).square().sum(dim=1).mean(dim=(1, 2))
    return total


def test_the_distance_is_that_of_lpips(digits: tuple[Tensor, Tensor]) -> None:
    model, images = SmallNet().eval(), digits[0]
    other = images.roll(1, dims=0)
    distance = (look(model, images) - look(model, other)).norm(dim=1)
    torch.testing.assert_close(distance.square(), lpips(model, images, other))


def test_maps_may_have_their_channels_last() -> None:
    images, maps, tokens = torch.rand(2, 3, 16, 24), torch.randn(2, 5, 4, 6), torch.randn(2, 24, 5)
    first = features_of({"map": maps}, images).view(2, 5, 24)
    last = features_of({"map": maps.permute(0, 2, 3, 1)}, images).view(2, 24, 5)
    torch.testing.assert_close(first.transpose(1, 2), last)
    torch.testing.assert_close(last.norm(dim=(1, 2)), torch.ones(2))
    torch.testing.assert_close(features_of({"tokens": tokens}, images).norm(dim=1), torch.ones(2))


def test_layers_are_those_with_places_and_at_most_five(digits: tuple[Tensor, Tensor]) -> None:
    images = digits[0]
    found = layers_with_places(SmallNet(), images[:2])
    assert list(found) == ["body.0", "body.1", "body.2", "body.4", "body.5"], "of six maps; the seventh layer flattens"
    assert list(layers_with_places(SmallTransformer(), images[:2])) == ["blocks.layers.0", "blocks.layers.1"]
    assert layers_with_places(small_perceptron(), images[:2]) == {}
    with pytest.raises(ValueError, match="needs layers"):
        perceptual(small_perceptron(), *digits, layers={}, bound=0.5, num_steps=1)


def test_timm_models_are_looked_at_through_a_wrapper() -> None:
    timm = pytest.importorskip("timm")
    model = nn.Sequential(nn.Identity(), timm.create_model("resnet10t", num_classes=4))
    found = layers_with_places(model, torch.rand(2, 3, 64, 64))
    assert list(found) == ["1.act1", "1.layer1", "1.layer2", "1.layer3", "1.layer4"]


@pytest.mark.parametrize("bound", [0.3, 0.7])
def test_the_bound_holds_and_is_used(small_model: nn.Module, digits: tuple[Tensor, Tensor], bound: float) -> None:
    images, labels = digits
    layers = layers_with_places(small_model, images[:2])
    x = perceptual(small_model, images, labels, layers=layers, bound=bound, num_steps=10)
    distance = (look(small_model, x) - look(small_model, images)).norm(dim=1)
    assert distance.max() <= bound * (1 + 1e-5) and distance.max() > 0.9 * bound
    noise = images + (x - images).flatten(1)[:, torch.randperm(64)].view_as(images)  # as large, at other pixels
    with torch.no_grad():
        found, chance = (small_model(each.clamp(0, 1)) for each in (x, noise))
    # Whether the smaller bound breaks an image depends on how the processor rounded the training; its loss does not.
    assert cross_entropy(found, labels).sum() > cross_entropy(chance, labels).sum()
    assert bound < 0.5 or is_correct(found, labels).sum() < is_correct(chance, labels).sum() - 8
