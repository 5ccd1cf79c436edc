"""Attacks of other kinds: within their own limits, and harder than chance."""

import math

import pytest
import torch
from torch import Tensor

from mimir_fast.attacks.pgd import cross_entropy
from mimir_fast.attacks.unforeseen import _cosines, elastic, jpeg, turn, warp
from mimir_fast.evaluation.images import EvaluationImages


@pytest.fixture(scope="module")
def digits(digits_images: EvaluationImages) -> tuple[Tensor, Tensor]:
    part = digits_images.evenly(32)
    return part.images.float() / 255, part.labels


def loss_of(model, x: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float(cross_entropy(model(x), labels).mean())


def test_warp_by_whole_pixels_is_a_shift(digits) -> None:
    images, _ = digits
    assert torch.allclose(warp(images, torch.zeros(32, 2, 8, 8)), images, atol=1e-6)
    flow = torch.zeros(32, 2, 8, 8)
    flow[:, 0] = 1  # look one pixel to the right
    torch.testing.assert_close(warp(images, flow)[..., :-1], images[..., 1:], atol=1e-5, rtol=0)


def test_elastic_bends_more_harmfully_than_at_random(small_model, digits) -> None:
    images, labels = digits
    samples = torch.arange(32)
    at_random = elastic(small_model, images, labels, pixels=0.4, num_steps=0, samples=samples, seed=0)
    bent = elastic(small_model, images, labels, pixels=0.4, num_steps=10, samples=samples, seed=0)
    assert loss_of(small_model, bent, labels) > 2 * loss_of(small_model, at_random, labels)
    assert bent.min() >= 0 and bent.max() <= 1


def test_turn_takes_the_worst_of_a_grid_with_the_image_in_it(small_model, digits) -> None:
    images, labels = digits
    turned = turn(small_model, images, labels, degrees=30, shift=0.1)
    with torch.no_grad():
        before, after = (cross_entropy(small_model(x), labels) for x in (images, turned))
    assert (after >= before - 1e-4).all() and after.mean() > 5 * before.mean()


def test_cosine_transform_is_orthonormal() -> None:
    matrix = _cosines(torch.device("cpu"))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(8), atol=1e-6, rtol=0)
    k, n = 3, 5
    assert matrix[k, n] == pytest.approx(0.5 * math.cos(math.pi * (2 * n + 1) * k / 16))


def test_jpeg_coefficients_stay_within_their_share(small_model, digits) -> None:
    from mimir_fast.attacks.unforeseen import QUANTISATION

    images, labels = digits
    grey = 0.4 + 0.2 * images  # away from the clamp, so that the change can be transformed back
    x = jpeg(small_model, grey, labels, eps=0.3, num_steps=5, samples=torch.arange(32), seed=0)
    cosines = _cosines(torch.device("cpu"))
    coefficients = cosines @ (x - grey)[:, 0] @ cosines.T
    limit = 0.3 * torch.tensor(QUANTISATION) / 255
    inside = ((x > 0) & (x < 1)).flatten(1).all(dim=1)
    assert inside.any(), "some image must be free of the clamp for this test to say anything"
    assert (coefficients[inside].abs() <= limit + 1e-5).all()
    assert loss_of(small_model, x, labels) > loss_of(small_model, grey, labels)
