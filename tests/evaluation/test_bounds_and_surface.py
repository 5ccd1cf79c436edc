"""The mutual-information bounds against cases solved by hand, and the loss surface against its definition."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

from mimir_fast.attacks.pgd import cross_entropy
from mimir_fast.evaluation.images import EvaluationImages
from mimir_fast.evaluation.loss_surface import filter_normalized_direction, loss_surface
from mimir_fast.evaluation.mi_bounds import along_curve, binary_entropy, entropy, lower_bound, upper_bound


def test_entropy_in_bits() -> None:
    assert entropy(torch.arange(8), 8) == pytest.approx(3.0)
    assert entropy(torch.zeros(5, dtype=torch.long), 8) == pytest.approx(0.0)
    assert binary_entropy(0.5) == pytest.approx(1.0)
    assert binary_entropy(0.0) == binary_entropy(1.0) == 0


def test_fanos_inequality_at_its_ends() -> None:
    """No errors: all of H(F) is needed. Errors as by guessing: none of it."""
    for num_classes in (2, 10, 1000):
        h = math.log2(num_classes)
        assert lower_bound(h, 0.0, num_classes) == pytest.approx(h)
        assert lower_bound(h, 1 - 1 / num_classes, num_classes) == pytest.approx(0.0, abs=1e-6)


def test_fano_holds_for_a_known_channel() -> None:
    """A symmetric channel: I = log K − H_b(p) − p·log(K−1) exactly, so the bound is tight."""
    num_classes, p = 4, 0.3
    joint = torch.full((4, 4), p / 3 / 4, dtype=torch.float64)
    joint.fill_diagonal_((1 - p) / 4)
    information = float((joint * (joint / joint.sum(0) / joint.sum(1, keepdim=True)).log2()).sum())
    assert lower_bound(2.0, p, num_classes) == pytest.approx(information)


def test_bounds_along_a_curve() -> None:
    found = along_curve({0.1: 0.5, 0.0: 1.0}, torch.arange(10), 10, torch.zeros(10, dtype=torch.long))
    assert found.eps == [0.0, 0.1] and found.p_error == [0.0, 0.5]
    assert found.lower[0] == pytest.approx(math.log2(10)) and found.lower[1] < found.lower[0]
    assert found.upper == [pytest.approx(upper_bound(0.0, 0.0)), pytest.approx(-1.0)]
    with pytest.raises(ValueError, match="probability"):
        lower_bound(1.0, 1.5, 10)


def test_directions_have_the_norms_of_the_filters(small_model) -> None:
    weights = dict(small_model.named_parameters())
    first, second = (filter_normalized_direction(small_model, seed=3, which=k) for k in (0, 1))
    assert set(first) == {name for name, p in weights.items() if p.ndim > 1}
    for name, direction in first.items():
        torch.testing.assert_close(direction.flatten(1).norm(dim=1), weights[name].detach().flatten(1).norm(dim=1))
        cosine = nn.functional.cosine_similarity(direction.flatten(), second[name].flatten(), dim=0)
        assert cosine.abs() < 0.5
    again = filter_normalized_direction(small_model, seed=3, which=0)
    assert all(torch.equal(again[name], direction) for name, direction in first.items())


def test_surface_is_the_loss_with_moved_weights(small_model, digits_images: EvaluationImages) -> None:
    import copy

    images, labels = digits_images.images[:40].float() / 255, digits_images.labels[:40]
    before = parameters_to_vector(small_model.parameters()).clone()
    found = loss_surface(small_model, images, labels, radius=0.8, num_points=5, seed=1)
    assert torch.equal(parameters_to_vector(small_model.parameters()), before)
    with torch.no_grad():
        centre = cross_entropy(small_model(images), labels).mean()
        torch.testing.assert_close(found.loss[2, 2], centre)
        moved = copy.deepcopy(small_model)
        for which, step in ((0, found.steps[4]), (1, found.steps[1])):
            direction = filter_normalized_direction(small_model, 1, which)
            for name, p in moved.named_parameters():
                if name in direction:
                    p += step * direction[name]
        torch.testing.assert_close(found.loss[4, 1], cross_entropy(moved(images), labels).mean())
    assert found.loss[2, 2] < found.loss[0, 0]


def test_surface_needs_an_odd_grid_and_weights(small_model, digits_images: EvaluationImages) -> None:
    images, labels = digits_images.images[:4].float() / 255, digits_images.labels[:4]
    with pytest.raises(ValueError, match="odd"):
        loss_surface(small_model, images, labels, num_points=4)
    with pytest.raises(ValueError, match="no weight matrices"):
        loss_surface(nn.Flatten(), images, labels)
