"""MixUp and CutMix: what they promise about pixels, labels, frequencies and ranks."""

import pytest
import torch

from mimir_fast.methods.mixing import MixingConfig, beta, cut_boxes, mix, smooth_labels, warmup
from mimir_fast.philox import uniform

MIXUP, CUTMIX = MixingConfig(mixup=0.8), MixingConfig(cutmix=1.0)


def batch(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Image i is constant i, its label is class i: what came from whom can be read off."""
    images = torch.arange(count, dtype=torch.float32).view(-1, 1, 1, 1).expand(count, 3, 32, 32).contiguous()
    samples = torch.arange(count) * 7
    return images, smooth_labels(torch.arange(count), count, 0.0), samples, torch.full((count,), 20)


@pytest.mark.parametrize(
    "config", [MIXUP, CUTMIX, MixingConfig(mixup=0.8, cutmix=1.0)], ids=["mixup", "cutmix", "both"]
)
def test_labels_say_what_is_in_the_image(config: MixingConfig) -> None:
    images, targets, samples, epochs = batch(32)
    mixed, soft = mix(config, images, targets, samples, epochs, seed=0)
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(32))
    # The mean of an image is the mean of the class numbers in it, weighted by its label.
    torch.testing.assert_close(mixed.mean(dim=(1, 2, 3)), soft @ torch.arange(32.0), rtol=1e-4, atol=1e-4)


def test_cutmix_pastes_one_rectangle() -> None:
    images, targets, samples, epochs = batch(32)
    mixed, soft = mix(CUTMIX, images, targets, samples, epochs, seed=0)
    for i in range(32):
        foreign = mixed[i, 0] == (i ^ 1)
        assert (foreign | (mixed[i, 0] == i)).all()
        rows, columns = foreign.any(dim=1), foreign.any(dim=0)
        assert torch.equal(foreign, rows[:, None] & columns[None, :])
        torch.testing.assert_close(soft[i, i ^ 1], foreign.float().mean())


@pytest.mark.parametrize("config", [MIXUP, CUTMIX], ids=["mixup", "cutmix"])
def test_does_not_depend_on_how_the_batch_is_cut(config: MixingConfig) -> None:
    everything = batch(16)
    whole = mix(config, *everything, seed=5)
    second_half = mix(config, *(t[8:] for t in everything), seed=5)
    assert torch.equal(whole[0][8:], second_half[0]) and torch.equal(whole[1][8:], second_half[1])


def test_the_odd_one_is_left_alone() -> None:
    images, targets, samples, epochs = batch(5)
    mixed, soft = mix(MIXUP, images, targets, samples, epochs, seed=0)
    torch.testing.assert_close(mixed[4], images[4])
    torch.testing.assert_close(soft[4], targets[4])


def test_probability_warms_up() -> None:
    images, targets, samples, epochs = batch(2000)
    config = MixingConfig(mixup=0.8, warmup_epochs=10)
    for epoch, wanted in ((0, 0.5), (5, 0.75), (10, 1.0), (50, 1.0)):
        _, soft = mix(config, images[:, :, :1, :1], targets, samples, epochs.fill_(epoch), seed=1)
        assert abs((soft.max(dim=1).values < 1).float().mean() - wanted) < 0.04


def test_epochs_differ() -> None:
    images, targets, samples, epochs = batch(16)
    first = mix(MIXUP, images, targets, samples, epochs, seed=0)[0]
    assert not torch.equal(first, mix(MIXUP, images, targets, samples, epochs + 1, seed=0)[0])


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0])
def test_beta_draws_follow_the_distribution(alpha: float) -> None:
    values = beta(alpha, uniform(0, 0, 0, torch.arange(20000), 32))
    for quantile in (0.1, 0.3, 0.5, 0.7):
        below = (values < quantile).float().mean()
        scipy_special = pytest.importorskip("scipy.special")
        assert abs(below - scipy_special.betainc(alpha, alpha, quantile)) < 0.012


def test_boxes_have_the_wanted_area() -> None:
    lam = torch.full((1000,), 0.75)
    inner = torch.full((1000, 2), 0.5)
    box, left_over = cut_boxes(lam, inner, torch.Size((32, 32)))
    assert (box.float().mean(dim=(1, 2)) == 0.25).all() and (left_over == 0.75).all()
    corner, more = cut_boxes(lam, torch.zeros(1000, 2), torch.Size((32, 32)))
    assert (corner.float().mean(dim=(1, 2)) == 0.0625).all() and (more == 0.9375).all()


def test_smoothing() -> None:
    torch.testing.assert_close(smooth_labels(torch.tensor([1]), 4, 0.1), torch.tensor([[0.025, 0.925, 0.025, 0.025]]))


def test_warmup_is_linear_then_constant() -> None:
    torch.testing.assert_close(warmup(1, 9, torch.tensor([0, 5, 10, 90]), 10), torch.tensor([1.0, 5.0, 9.0, 9.0]))


@pytest.mark.parametrize("options", [{"mixup": -1}, {"prob": 1.5}, {"warmup_epochs": -1}])
def test_bad_options(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="wanted"):
        MixingConfig(**options)
