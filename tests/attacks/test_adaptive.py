"""The attacks that know the defence: on mutual information, on features, on the reconstruction."""

import pytest
import torch
from small_classifier import EPS
from small_models import masked_vit
from torch import Tensor, nn

from mimir_fast.attacks.adaptive import attack_reconstruction, pgd_features, pgd_mi
from mimir_fast.attacks.pgd import pgd, random_start
from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.evaluation.images import EvaluationImages
from mimir_fast.ops.hsic import hsic
from mimir_fast.ops.nhsic import nhsic
from mimir_fast.ops.renyi_mi import renyi_mi

THREAT = LinfThreat(EPS, EPS / 4, 10)


@pytest.fixture(scope="module")
def digits(digits_images: EvaluationImages) -> tuple[Tensor, Tensor]:
    part = digits_images.evenly(32)
    return part.images.float() / 255, part.labels


def test_pgd_mi_without_weight_is_pgd(small_model, digits) -> None:
    torch.testing.assert_close(pgd_mi(small_model, *digits, THREAT, weight=0.0), pgd(small_model, *digits, THREAT))


def test_pgd_mi_raises_the_mutual_information(small_model, digits) -> None:
    images, labels = digits

    @torch.no_grad()
    def information(x: Tensor) -> float:
        return float(hsic(x, small_model.forward_features(x)))

    heavy = pgd_mi(small_model, images, labels, THREAT, weight=1e9, estimator=hsic)
    assert information(heavy) > 1.02 * information(pgd(small_model, images, labels, THREAT))
    assert information(heavy) > information(images)


def test_balanced_weight_makes_both_gradients_equal(small_model, digits) -> None:
    """At λ = 1e-5 HSIC is lost in rounding: the attack is PGD, bit for bit nearly everywhere; balanced it is not."""
    images, labels = digits
    plain = pgd(small_model, images, labels, THREAT)
    faint = pgd_mi(small_model, images, labels, THREAT, weight=1e-5, estimator=hsic)
    heard = pgd_mi(small_model, images, labels, THREAT, weight="balanced", estimator=hsic)
    assert (faint != plain).float().mean() < 0.02
    assert (heard != plain).float().mean() > 0.1


@pytest.mark.parametrize("estimator", [nhsic, hsic, renyi_mi], ids=lambda f: f.__name__)
def test_an_image_alone_in_its_batch_is_attacked_by_cross_entropy(small_model, digits, estimator) -> None:
    """129 images in batches of 128 end so."""
    images, labels = digits[0][:1], digits[1][:1]
    found = pgd_mi(small_model, images, labels, THREAT, weight=1.0, estimator=estimator)
    torch.testing.assert_close(found, pgd(small_model, images, labels, THREAT))


def test_pgd_features_moves_features_further_than_noise_or_pgd(small_model, digits) -> None:
    images, labels = digits

    @torch.no_grad()
    def distance(x: Tensor) -> float:
        return float((small_model.forward_features(x) - small_model.forward_features(images)).norm(dim=1).mean())

    ours = distance(pgd_features(small_model, images, THREAT))
    assert ours > distance(pgd(small_model, images, labels, THREAT))
    assert ours > 1.5 * distance(random_start(images, EPS))


def test_pgd_features_needs_a_random_start(small_model, digits) -> None:
    with pytest.raises(ValueError, match="random_start=True"):
        pgd_features(small_model, digits[0], LinfThreat(EPS, EPS / 4, 3, random_start=False))


def test_says_when_a_model_shows_no_features(digits) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(ValueError, match="forward_features"):
        pgd_features(model, digits[0], THREAT)


def test_reconstruction_suffers_from_the_attack_more_than_from_noise(digits) -> None:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = masked_vit(8, 2, 1, 32, 2, 4, 32, 1, 4)
    errors = attack_reconstruction(model, digits[0], THREAT, norm_pix=False)
    attacked, noise = errors.attacked - errors.clean, errors.random - errors.clean
    assert (attacked > 0).float().mean() > 0.9
    assert attacked.mean() > 3 * noise.mean().abs()
    assert all(p.grad is None for p in model.parameters())


def test_reconstruction_wants_a_masked_autoencoder(small_model, digits) -> None:
    with pytest.raises(ValueError, match="MaskedModel"):
        attack_reconstruction(small_model, digits[0], THREAT)
