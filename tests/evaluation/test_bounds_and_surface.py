"""The mutual-information bounds against cases solved by hand, and the loss surface against its definition."""

import math
from dataclasses import asdict

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

from mimir_fast.attacks.pgd import cross_entropy, fgsm
from mimir_fast.evaluation.images import EvaluationImages
from mimir_fast.evaluation.topics import information
from mimir_fast.evaluation.topics.information import Bounds, binary_entropy, bounds_of, entropy, lower_bound
from mimir_fast.evaluation.topics.surface import filter_normalized_direction, input_surface, weight_surface
from mimir_fast.ops.dependence import bandwidth
from mimir_fast.ops.renyi_mi import renyi_mi


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


def test_bounds_are_those_of_the_propositions() -> None:
    """Eight images, two classes seen; three of them change class in the reconstruction."""
    attacked = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    rebuilt = torch.tensor([0, 0, 0, 1, 1, 1, 0, 0])
    found = bounds_of(attacked, rebuilt, 4)
    p = 3 / 8
    h_b = -p * math.log2(p) - (1 - p) * math.log2(1 - p)
    h_rebuilt = -(5 / 8) * math.log2(5 / 8) - (3 / 8) * math.log2(3 / 8)
    assert (found.p_error, found.entropy) == (p, pytest.approx(1.0))
    assert 1.0 - h_b - p * math.log2(3) < 0 and found.lower == 0, "information is never negative"
    assert bounds_of(attacked, rebuilt, 2).lower == pytest.approx(1.0 - h_b)
    assert found.upper == pytest.approx(h_rebuilt - 2 * p)
    assert found.upper_of_proof == pytest.approx(1.0 - 2 * p)
    with pytest.raises(ValueError, match="probability"):
        lower_bound(1.0, 1.5, 10)


def classes_of(values: torch.Tensor) -> torch.Tensor:
    """Four classes, by quarters of the normal distribution."""
    return torch.bucketize(values, torch.tensor([-0.6745, 0.0, 0.6745]))


def test_a_code_that_is_constant_carries_nothing() -> None:
    """Whatever one makes of it, by a constant or by chance."""
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    for rebuilt in (torch.zeros(4000), torch.full((4000,), 3.0)):
        assert bounds_of(classes_of(x), classes_of(rebuilt), 4).lower == 0
    by_chance = torch.randn(4000, generator=torch.Generator().manual_seed(1))
    assert bounds_of(classes_of(x), classes_of(by_chance), 4).lower < 1e-3
    assert renyi_mi(x[:256, None], torch.ones(256, 1)) == 0


def test_a_code_that_is_the_image_carries_its_class() -> None:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    found = bounds_of(classes_of(x), classes_of(x), 4)
    assert found.lower == found.entropy == found.upper == pytest.approx(2.0, abs=1e-3)


@pytest.mark.parametrize("noise", [0.1, 0.5, 1.0, 3.0])
def test_a_gaussian_channel_carries_no_less_than_the_bound(noise: float) -> None:
    """z = x + n has I(x, z) = log2(1 + 1/σ²)/2; x_re is the best estimate of x from z."""
    draws = torch.randn(2, 40000, generator=torch.Generator().manual_seed(0))
    x, z = draws[0], draws[0] + noise * draws[1]
    found = bounds_of(classes_of(x), classes_of(z / (1 + noise**2)), 4)
    information = 0.5 * math.log2(1 + noise**-2)
    assert 0 <= found.lower <= information
    if noise == 0.1:
        assert found.lower > 1.2, "of 3.3 bits, of which the class has 2"


@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
def test_the_estimate_of_a_gaussian_channel_is_its_closed_form(noise: float) -> None:
    """Means of K², L² and K²L² over pairs, K² = exp(−2γd²), are determinants of Gaussians: d = √2·(x, z)."""
    draws = torch.randn(2, 3000, 1, generator=torch.Generator().manual_seed(0))
    x, z = draws[0], draws[0] + noise * draws[1]
    gammas = torch.stack([bandwidth.gamma(v, 5.0, "median") for v in (x, z)])
    covariance = torch.tensor([[1.0, 1.0], [1.0, 1 + noise**2]], dtype=torch.float64)
    whole = torch.linalg.det(torch.eye(2) + 8 * torch.diag(gammas) @ covariance) ** -0.5
    alone = (1 + 8 * gammas * covariance.diagonal()) ** -0.5
    assert float(renyi_mi(x, z)) == pytest.approx(float((whole / alone.prod()).log2()), abs=0.03)


def test_answers_that_are_not_finite_are_a_class_of_their_own() -> None:
    attacked, rebuilt = torch.tensor([0, 1, -1, -1]), torch.tensor([0, 1, -1, 0])
    assert bounds_of(attacked, rebuilt, 2) == bounds_of(attacked + 1, rebuilt + 1, 3)


def test_crossed_bounds_are_said() -> None:
    """Of two classes the other one, always: the code tells all of the image, and the approximation nothing."""
    attacked = torch.arange(10) % 2
    found = bounds_of(attacked, 1 - attacked, 2)
    assert (found.lower, found.upper) == (pytest.approx(1.0), pytest.approx(-1.0)) and found.crossed
    agreed = bounds_of(attacked, attacked, 2)
    assert not agreed.crossed

    def words(bounds: Bounds) -> str:
        point = {"eps": 0.1, "label": "0.1", **asdict(bounds), "crossed": bounds.crossed}
        return information.render({"points": [point], "count": 10, "norm": "linf", "batch_size": 16})

    assert "BELOW the lower one at ε = 0.1" in words(found)
    assert "BELOW" not in words(agreed) and "above the lower one at every ε" in words(agreed)


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
    found = weight_surface(small_model, images, labels, radius=0.8, num_points=5, seed=1)
    assert found.shape == (40, 5, 5)
    assert torch.equal(parameters_to_vector(small_model.parameters()), before)
    with torch.no_grad():
        torch.testing.assert_close(found[:, 2, 2], cross_entropy(small_model(images), labels))
        moved = copy.deepcopy(small_model)
        for which, step in ((0, 0.8), (1, -0.4)):
            direction = filter_normalized_direction(small_model, 1, which)
            for name, p in moved.named_parameters():
                if name in direction:
                    p += step * direction[name]
        torch.testing.assert_close(found[:, 4, 1], cross_entropy(moved(images), labels))
    assert found[:, 2, 2].mean() < found[:, 0, 0].mean()


def test_biases_stay_or_move_along_themselves(small_model) -> None:
    """Li et al.'s two rules for parameters of one dimension."""
    still = filter_normalized_direction(small_model, 0, 0)
    copied = filter_normalized_direction(small_model, 0, 0, "copied")
    assert all(torch.equal(copied[name], direction) for name, direction in still.items())
    lines = {name: p for name, p in small_model.named_parameters() if p.ndim < 2}
    assert lines and set(copied) - set(still) == set(lines)
    assert all(torch.equal(copied[name], p) for name, p in lines.items())


def test_input_surface_rises_along_the_gradient(small_model, digits_images: EvaluationImages) -> None:
    part = digits_images.evenly(40)
    images = part.images.float() / 255
    found = input_surface(small_model, images, part.labels, part.samples, radius=40 / 255, num_points=5).mean(dim=0)
    with torch.no_grad():
        torch.testing.assert_close(found[2, 2], cross_entropy(small_model(images), part.labels).mean())
    fgsm_ = fgsm(small_model, images, part.labels, 40 / 255, mode="eval")
    with torch.no_grad():
        torch.testing.assert_close(found[4, 2], cross_entropy(small_model(fgsm_), part.labels).mean())
    assert found[4, 2] > 3 * found[2, 4] and found[4, 2] > found[3, 2] > found[2, 2]


def test_surface_needs_an_odd_grid_and_weights(small_model, digits_images: EvaluationImages) -> None:
    images, labels = digits_images.images[:4].float() / 255, digits_images.labels[:4]
    with pytest.raises(ValueError, match="odd"):
        weight_surface(small_model, images, labels, num_points=4)
    with pytest.raises(ValueError, match="no weight matrices"):
        weight_surface(nn.Flatten(), images, labels)
