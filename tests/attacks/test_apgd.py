"""APGD: the authors' algorithm to the bit, their accuracy with random starts, and its short form for training."""

import copy
from itertools import pairwise

import pytest
import torch
from small_classifier import EPS
from torch import Tensor, nn

from mimir_fast.attacks.apgd import apgd, dlr, targeted_dlr
from mimir_fast.attacks.pgd import cross_entropy
from mimir_fast.evaluation.images import EvaluationImages


@pytest.fixture(scope="module")
def digits(digits_images: EvaluationImages) -> tuple[Tensor, Tensor]:
    part = digits_images.evenly(100)
    return part.images.float() / 255, part.labels


def authors(model: nn.Module, num_steps: int, loss: str = "ce"):
    theirs = pytest.importorskip("pyautoattack.autopgd_base")
    return theirs.APGDAttack(model, n_iter=num_steps, norm="Linf", eps=EPS, loss=loss, seed=0, device="cpu")


@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 40, 100])
def test_equals_the_authors_from_the_same_start(small_model, digits, num_steps: int, loss) -> None:
    """Step sizes, momentum, checkpoints and restarts from the best point: all as in pyautoattack."""
    images, labels = digits
    attack = authors(small_model, num_steps, loss)
    attack.init_hyperparam(images)
    best, correct, best_loss, _ = attack.attack_single_run(images, labels, x_init=images)
    ours = apgd(small_model, images, labels, EPS, num_steps, loss=loss)
    assert ((ours - best).abs() > 1e-4).float().mean() < 5e-3
    value = (cross_entropy if loss == "ce" else dlr)(small_model(ours), labels)
    torch.testing.assert_close(value.mean(), best_loss.mean(), rtol=1e-3, atol=1e-4)
    fooled = apgd(small_model, images, labels, EPS, num_steps, loss=loss, keep="adversarial")
    assert abs(int((small_model(fooled).argmax(1) == labels).sum()) - int(correct.sum())) <= 1


def test_accuracy_agrees_with_the_authors_from_random_starts(small_model, digits) -> None:
    images, labels = digits
    with torch.random.fork_rng([]):
        theirs = authors(small_model, 50).perturb(images, labels)
    ours = apgd(small_model, images, labels, EPS, 50, random_start=True, keep="adversarial")
    counts = [int((small_model(x).argmax(1) == labels).sum()) for x in (ours, theirs)]
    assert 10 < counts[1] < 90, "the test needs a robust accuracy in between"
    assert abs(counts[0] - counts[1]) <= 4


def test_targeted_loss_agrees_with_the_authors(small_model, digits) -> None:
    APGDAttack_targeted = pytest.importorskip("pyautoattack.autopgd_base").APGDAttack_targeted

    images, labels = digits
    attack = APGDAttack_targeted(small_model, n_iter=20, norm="Linf", eps=EPS, seed=0, device="cpu")
    attack.init_hyperparam(images)
    logits = small_model(images).detach()
    attack.y_target = logits.argsort(1)[:, -2]
    wrong_first = logits.argmax(1) != labels
    targets = torch.where(wrong_first, logits.argmax(1), attack.y_target)
    attack.y_target = targets
    torch.testing.assert_close(targeted_dlr(logits, labels, targets), attack.dlr_loss_targeted(logits, labels))
    best, *_ = attack.attack_single_run(images, labels, x_init=images)
    ours = apgd(small_model, images, labels, EPS, 20, loss="targeted-dlr")
    assert ((ours - best).abs() > 1e-4).float().mean() < 5e-3


def test_dlr_does_not_change_with_scale_or_shift() -> None:
    logits, labels = torch.randn(20, 10, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 10
    torch.testing.assert_close(dlr(5 * logits + 3, labels), dlr(logits, labels), rtol=1e-4, atol=1e-5)
    assert ((dlr(logits, labels) > 0) == (logits.argmax(1) != labels)).all()


def test_training_form_makes_no_needless_passes(digits) -> None:
    """APGD-2: three forward passes, and a gradient for all but the last point."""
    images, labels = digits[0][:4], digits[1][:4]
    passes = []

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

        def forward(self, x: Tensor) -> Tensor:
            passes.append(x.requires_grad)
            return self.net(x)

    apgd(Counting(), images, labels, EPS, 2)
    assert passes == [True, True, False]


def test_best_loss_never_falls_with_more_steps(small_model, digits) -> None:
    images, labels = digits
    losses = [
        cross_entropy(small_model(apgd(small_model, images, labels, EPS, k)), labels).mean() for k in (0, 1, 5, 25)
    ]
    assert all(a < b for a, b in pairwise(losses))


def test_stays_in_the_ball_and_leaves_no_trace(small_model, digits) -> None:
    images, labels = digits
    model, state = copy.deepcopy(small_model).train(), torch.get_rng_state()
    model.zero_grad()
    adversarial = apgd(model, images, labels, EPS, 5, random_start=True)
    assert model.training and int(model.body[1].num_batches_tracked) == int(small_model.body[1].num_batches_tracked)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())
    assert (adversarial.double() - images.double()).abs().max() <= EPS
    assert adversarial.min() >= 0 and adversarial.max() <= 1


def test_soft_labels(small_model, digits) -> None:
    images, labels = digits[0][:6], digits[1][:6]
    soft = nn.functional.one_hot(labels, 10).float()
    torch.testing.assert_close(apgd(small_model, images, soft, EPS, 3), apgd(small_model, images, labels, EPS, 3))
    with pytest.raises(ValueError, match="hard labels"):
        apgd(small_model, images, soft, EPS, 3, keep="adversarial")


@pytest.mark.parametrize(("num_classes", "loss"), [(2, "dlr"), (3, "targeted-dlr")])
def test_says_when_there_are_too_few_classes(num_classes: int, loss) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, num_classes))
    with pytest.raises(ValueError, match=f"{num_classes} classes; use loss='ce'"):
        apgd(model, torch.rand(2, 1, 2, 2), torch.zeros(2, dtype=torch.long), EPS, 2, loss=loss)
