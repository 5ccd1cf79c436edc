"""The attacks of the suite `strongest`: in their ball, without a trace, repeatable, and no weaker than weaker ones."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from planted_defences import before, gradient
from small_classifier import EPS, SmallNet
from torch import Tensor, nn

from mimir_fast.attacks.apgd import apgd
from mimir_fast.attacks.decision import hop_skip_jump
from mimir_fast.attacks.losses import (
    likeliest_wrong,
    margin,
    probability_margin,
    scaled_cross_entropy,
    targeted_margin,
)
from mimir_fast.attacks.lp import size_of
from mimir_fast.attacks.momentum import momentum_ensemble
from mimir_fast.attacks.nearest import apgd_nearest
from mimir_fast.attacks.patch import patch, patch_masks
from mimir_fast.attacks.perceptual import layers_with_places, perceptual
from mimir_fast.attacks.pgd import cross_entropy, is_correct
from mimir_fast.attacks.rays import rays
from mimir_fast.attacks.recolor import recolor, recolored
from mimir_fast.attacks.square import square
from mimir_fast.attacks.until_broken import apgd_many, fab_many, pgd_many, until_broken
from mimir_fast.evaluation.attacks import make_threat
from mimir_fast.evaluation.images import EvaluationImages

RADII = {"linf": EPS, "l2": 0.6, "l1": 2.0}
Run = Callable[..., Tensor]


def in_ball(norm: Any, eps: float) -> dict[str, Run]:
    """The attacks of a norm: (model, images, labels, **samples and seed) → images."""
    threat = make_threat(norm, eps, 6)
    found: dict[str, Run] = {
        "PGD, margin": lambda m, x, y, **k: pgd_many(m, x, y, threat, loss=margin, restarts=2, **k),
        "PGD, targets": lambda m, x, y, **k: pgd_many(m, x, y, threat, num_targets=3, rows=40, **k),
        "MI-FGSM": lambda m, x, y, **k: momentum_ensemble([m], x, y, threat, **k),
        "PGN": lambda m, x, y, **k: momentum_ensemble([m, m], x, y, threat, neighbours=2, **k),
    }
    if norm != "l1":
        found |= {
            "APGD, scaled": lambda m, x, y, **k: apgd_many(m, x, y, eps, 8, loss=scaled_cross_entropy, norm=norm, **k),
            "APGD, targets": lambda m, x, y, **k: apgd_many(m, x, y, eps, 8, num_targets=3, norm=norm, rows=40, **k),
            "APGD, nearest": lambda m, x, y, **k: apgd_nearest(
                m, x, y, eps, 8, losses=[margin, cross_entropy], rounds=3, norm=norm, **k
            ),
            "FAB, targets": lambda m, x, y, **k: fab_many(m, x, y, eps, 12, num_targets=3, norm=norm, rows=40),
            "HopSkipJump": lambda m, x, y, **k: hop_skip_jump(m, x, y, eps, norm=norm, queries=300, **k),
        }
    if norm == "linf":
        found["RayS"] = lambda m, x, y, **k: rays(m, x, y, eps, queries=200)
        found["Square"] = lambda m, x, y, **k: square(m, x, y, eps, 150, rows=64, **k)
    return found


def elsewhere() -> dict[str, Run]:
    """Those of no ball."""
    return {
        "ReColor": lambda m, x, y, **k: recolor(m, x, y, change=0.2, num_steps=6, **k),
        "perceptual": lambda m, x, y, **k: perceptual(
            m, x, y, layers=layers_with_places(m, x[:2]), bound=0.5, num_steps=6, **k
        ),
        "patch": lambda m, x, y, **k: patch(m, x, y, side=3, num_steps=6, places=2, **k),
    }


@pytest.fixture(scope="module")
def digits(digits_images: EvaluationImages) -> tuple[Tensor, Tensor]:
    part = digits_images.evenly(32)
    return part.images.float() / 255, part.labels


def right(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return is_correct(model(x), labels)


CASES = [(norm, name) for norm, eps in RADII.items() for name in in_ball(norm, eps)] + [("", n) for n in elsewhere()]


@pytest.mark.parametrize(("norm", "name"), CASES)
def test_in_its_ball_without_a_trace_and_the_same_again(small_model, digits, norm: str, name: str) -> None:
    images, labels = digits
    run = in_ball(norm, RADII[norm])[name] if norm else elsewhere()[name]
    model = copy.deepcopy(small_model).train()
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.5)
    state, random_state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    attacked = run(model, images, labels, samples=torch.arange(32), seed=3)
    assert model.training and all(p.requires_grad and (p.grad == 0.5).all() for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert attacked.isfinite().all() and attacked.min() >= 0 and attacked.max() <= 1
    assert not attacked.requires_grad and attacked.shape == images.shape
    if norm:
        assert size_of((attacked - images).double(), norm).max() <= RADII[norm] * (1 + 1e-6)
    assert torch.equal(run(model, images, labels, samples=torch.arange(32), seed=3), attacked)
    # It breaks some, and one image alone is attacked as it is beside others, but for rounding.
    stands = right(small_model, attacked, labels)
    assert stands.sum() < right(small_model, images, labels).sum()
    broken = int((~stands).nonzero()[0, 0])
    alone = run(model, images[[broken]], labels[[broken]], samples=torch.tensor([broken]), seed=3)
    assert not right(small_model, alone, labels[[broken]])[0]


@pytest.mark.parametrize("name", ["NaN", pytest.param("infinite", marks=pytest.mark.slow)])
def test_nothing_that_is_not_finite_comes_out(small_model, digits, name: str) -> None:
    """Of a model whose gradient is not finite."""
    images, labels = digits[0][:4], digits[1][:4]
    value = torch.nan if name == "NaN" else torch.inf
    model = gradient(lambda g: g * value)(copy.deepcopy(small_model)).eval()
    for norm, eps in RADII.items():
        for kind, run in (in_ball(norm, eps) | elsewhere()).items():
            assert run(model, images, labels).isfinite().all(), (norm, kind)


class TestLosses:
    logits = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 6

    def test_margins_are_positive_exactly_where_the_answer_is_wrong(self) -> None:
        wrong = self.logits.argmax(1) != self.labels
        for loss in (margin, probability_margin):
            assert torch.equal(loss(self.logits, self.labels) > 0, wrong)
        one = self.logits[0].tolist()
        assert margin(self.logits, self.labels)[0] == max(one[1:]) - one[0]

    def test_scaled_cross_entropy_knows_no_scale(self) -> None:
        scaled = scaled_cross_entropy(1e4 * self.logits, self.labels)
        torch.testing.assert_close(scaled, scaled_cross_entropy(self.logits, self.labels), rtol=1e-4, atol=1e-5)
        confident = torch.tensor([[300.0, 0.0, -5.0]], requires_grad=True)
        slopes = [
            torch.autograd.grad(loss(confident, torch.tensor([0])).sum(), confident)[0]
            for loss in (cross_entropy, scaled_cross_entropy)
        ]
        assert (slopes[0] == 0).all() and slopes[1].abs().min() > 0

    def test_targets_are_the_likeliest_wrong_classes_and_no_more_than_there_are(self) -> None:
        found = likeliest_wrong(self.logits, self.labels, 9)
        assert found.shape == (40, 5) and (found != self.labels[:, None]).all()
        values = self.logits.gather(1, found)
        assert (values[:, :-1] >= values[:, 1:]).all()
        nearest = targeted_margin(self.logits, self.labels, found[:, 0])
        torch.testing.assert_close(nearest, margin(self.logits, self.labels))
        assert likeliest_wrong(self.logits[:, :2], self.labels % 2, 9).shape == (40, 1)


def test_an_image_is_no_longer_attacked_once_it_is_broken(small_model, digits) -> None:
    """The first misclassified point is kept, and fewer images are shown to the model."""
    images, labels = digits
    shown: list[int] = []

    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            shown.append(len(x))
            return small_model(x)

    model = Counting()
    first = apgd(model, images, labels, EPS, 20, keep="first")
    assert shown[0] == 32 and shown == sorted(shown, reverse=True) and shown[-1] < 32
    assert sum(shown) < 32 * 21
    last = apgd(small_model, images, labels, EPS, 20, keep="adversarial")
    stands, before = right(small_model, first, labels), right(small_model, last, labels)
    assert abs(int(stands.sum()) - int(before.sum())) <= 1
    assert shown[-1] >= int(stands.sum()), "whoever stands is attacked to the end"


def test_the_images_that_are_nearest_get_most_starts(
    small_model: nn.Module, digits: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In rounds that cost the same; and no start is given twice."""
    given: list[tuple[int, int]] = []

    def counted(*args: Any, **options: Any) -> Tensor:
        given.extend(zip(options["samples"].tolist(), options["step"].tolist(), strict=True))
        return apgd(*args, **options)

    monkeypatch.setattr("mimir_fast.attacks.nearest.apgd", counted)
    x, y = digits
    standing = right(small_model, x, y)
    left = apgd_nearest(small_model, x, y, EPS / 4, 5, losses=[margin, cross_entropy], rounds=4, rows=16)
    starts = Counter(sample for sample, _ in given)
    assert len(set(given)) == len(given) <= 4 * int(standing.sum()) + 8
    assert set(starts) == set(standing.nonzero()[:, 0].tolist()) and set(starts.values()) <= {1, 3, 7, 15}
    with torch.no_grad():
        near = margin(small_model(left), y)
        stands = is_correct(small_model(left), y)
    most = [s for s, count in starts.items() if count == 15]
    assert most and near[most].min() > near[stands].median()


def test_more_targets_starts_and_queries_break_no_fewer(small_model, digits) -> None:
    images, labels = digits
    threat = make_threat("linf", EPS, 10)

    def broken(x: Tensor) -> set[int]:
        return set((~right(small_model, x, labels)).nonzero()[:, 0].tolist())

    one = broken(pgd_many(small_model, images, labels, threat, num_targets=1))
    assert one < broken(pgd_many(small_model, images, labels, threat, num_targets=9))
    start = broken(apgd_many(small_model, images, labels, EPS, 5, loss=margin))
    assert start <= broken(apgd_many(small_model, images, labels, EPS, 5, loss=margin, restarts=4))
    few, many = (broken(hop_skip_jump(small_model, images, labels, EPS, queries=q)) for q in (100, 800))
    assert few < many
    few, many = (broken(rays(small_model, images, labels, EPS, queries=q)) for q in (30, 250))
    assert few < many
    assert len(many) <= len(broken(apgd_many(small_model, images, labels, EPS, 30))), "decisions tell less than slopes"


def test_attempts_in_one_pass_are_those_one_after_the_other(small_model, digits, monkeypatch) -> None:
    """As many as asked for, or, after the first call, as make a pass of small images worth its calls."""
    images, labels = digits
    threat = make_threat("linf", EPS, 10)
    numbers: list[list[int]] = []

    def attempt(module: nn.Module, at: Tensor, tries: Tensor) -> Tensor:
        numbers.append(sorted(set(tries.tolist())))
        return images[at]

    until_broken(small_model, images, labels, attempt, 20)
    assert numbers == [[0], list(range(1, 17)), [17, 18, 19]], "512 images of 8 × 8, 32 of which are attacked"
    together = pgd_many(small_model, images, labels, threat, num_targets=4)
    monkeypatch.setattr("mimir_fast.attacks.until_broken.SMALL_PASS", 0)
    alone, asked = (pgd_many(small_model, images, labels, threat, num_targets=4, rows=r) for r in (0, 200))
    stands = right(small_model, alone, labels)
    assert torch.equal(right(small_model, together, labels), stands)
    assert torch.equal(right(small_model, asked, labels), stands)
    numbers.clear()
    until_broken(small_model, images, labels, attempt, 5, rows=2 * 32)
    assert numbers == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("num_classes", [2, 3])
def test_two_and_three_classes_have_as_many_targets_as_there_are(digits, num_classes: int) -> None:
    """The DLR loss at a target compares four logits: the targeted margin takes its place."""
    model = SmallNet(num_classes=num_classes).eval()
    images = digits[0]
    with torch.no_grad():
        labels = model(images).argmax(1)
    for x in (apgd_many(model, images, labels, 0.9, 20), pgd_many(model, images, labels, make_threat("linf", 0.9, 20))):
        assert not right(model, x, labels).any()


def test_decisions_break_what_gradients_cannot_see(small_model, digits) -> None:
    """Behind a rounding there is no gradient: PGD stands still, an attack that sees the class only does not."""
    images, labels = digits
    model = before(lambda x: (4 * x).round() / 4)(copy.deepcopy(small_model)).eval()
    start = right(model, images, labels).sum()
    masked = pgd_many(model, images, labels, make_threat("linf", EPS, 20), loss=margin)
    assert right(model, masked, labels).sum() > 0.8 * start
    hops = hop_skip_jump(model, images, labels, EPS, queries=2000)
    corners = rays(model, images, labels, EPS, queries=500)
    for decided, part in ((hops, 0.85), (corners, 0.7)):
        assert right(model, decided, labels).sum() < part * right(model, masked, labels).sum()
        assert (decided - images).abs().max() <= EPS


def test_momentum_transfers_to_a_model_it_has_not_seen(small_model, digits) -> None:
    images, labels = digits
    other = copy.deepcopy(small_model)
    with torch.no_grad():
        for number, p in enumerate(other.parameters()):
            p += 0.1 * p.std(unbiased=False) * torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
    for neighbours in (0, 3):
        x = momentum_ensemble([other], images, labels, make_threat("linf", EPS, 10), neighbours=neighbours)
        assert right(small_model, x, labels).sum() < 0.7 * right(small_model, images, labels).sum()
    with pytest.raises(ValueError, match="needs a model"):
        momentum_ensemble([], images, labels, make_threat("linf", EPS, 10))


class TestRecolor:
    @pytest.mark.parametrize("channels", [1, 3])
    def test_equal_colours_stay_equal_and_move_no_further(self, channels: int) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(channels * 64, 4)).eval()
        colours = torch.rand(6, channels)
        places = torch.randint(6, (2, 8, 8))
        images = colours[places].permute(0, 3, 1, 2).contiguous()
        with torch.no_grad():
            labels = model(images).argmax(1)
        x = recolor(model, images, labels, change=0.1, num_steps=5)
        assert (x - images).abs().max() <= 0.1 + 1e-6 and (x != images).any()
        for image, of in zip(x, places, strict=True):
            for colour in range(6):
                same = image[:, of == colour]
                assert (same - same[:, :1]).abs().max() < 1e-6

    def test_a_lattice_that_only_knows_red_moves_red(self) -> None:
        lattice = torch.zeros(1, 3, 4, 4, 4)
        lattice[:, 0, -1] = 0.3  # where red is full, it becomes more, whatever green and blue are
        image = torch.tensor([[1 / 3, 0.2, 0.9], [2 / 3, 0.4, 0.1], [0.5, 1.0, 0.0]]).T.reshape(1, 3, 1, 3)
        wanted = image.clone()
        wanted[:, 0] -= 0.0
        torch.testing.assert_close(recolored(image, lattice), wanted, atol=1e-6, rtol=0)
        full = torch.tensor([5 / 6, 0.4, 0.6]).reshape(1, 3, 1, 1)
        assert recolored(full, lattice)[0, 0, 0, 0] == pytest.approx(5 / 6 + 0.15, abs=1e-5)
        assert torch.equal(recolored(full, lattice)[0, 1:], full[0, 1:])


def test_a_patch_is_one_square_somewhere(small_model, digits) -> None:
    images, labels = digits
    x = patch(small_model, images, labels, side=3, num_steps=4)
    masks = patch_masks(images, 3, torch.arange(32), 0, torch.zeros(32, dtype=torch.long))
    assert masks.flatten(1).sum(1).eq(9).all() and (x == images)[~masks.expand_as(x)].all()
    corners = {tuple(mask[0].nonzero()[0].tolist()) for mask in masks}
    assert len(corners) > 8 and max(max(corner) for corner in corners) <= 5
    with pytest.raises(ValueError, match="patch of 9 pixels"):
        patch(small_model, images, labels, side=9, num_steps=1)
