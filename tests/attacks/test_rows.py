"""Attacks on rows that leave when they are broken: FAB and Square against the package's, and the loop around them."""

import pytest
import torch
from small_classifier import EPS
from torch import Tensor, nn

from mimir_fast.attacks.fab import FabRows, to_plane
from mimir_fast.attacks.passes import Attempts, first_of_each
from mimir_fast.attacks.pgd import is_correct
from mimir_fast.attacks.rows import run_rows
from mimir_fast.attacks.square import HALVINGS, SquareRows
from mimir_fast.attacks.square import square as attacked_by_square
from mimir_fast.attacks.until_broken import fab_many
from mimir_fast.evaluation.images import EvaluationImages
from mimir_fast.layers.borrowing import borrowed


@pytest.fixture(scope="module")
def digits(digits_images: EvaluationImages) -> tuple[Tensor, Tensor]:
    part = digits_images.evenly(80)
    return part.images.float() / 255, part.labels


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_steps_onto_a_plane_are_the_smallest_in_the_box(norm) -> None:
    """Against the package, which sorts all pixels; planes within reach, out of reach, and through the point."""
    projections = pytest.importorskip("pyautoattack.fab_projections")
    generator = torch.Generator().manual_seed(0)
    x, w = torch.rand(64, 50, generator=generator), torch.randn(64, 50, generator=generator)
    w[:, ::7] = 0
    b = (w * x).sum(1) + torch.linspace(-6, 6, 64)
    b[0] = (w[0] * x[0]).sum()
    b[-1], b[1] = 1e3, -1e3
    found = to_plane(x, w, b, norm)
    theirs = getattr(projections, f"projection_{norm}")(x.clone(), w.clone(), b.clone())
    torch.testing.assert_close(found, theirs, rtol=1e-3, atol=2e-5)
    assert ((x + found) >= -1e-6).all() and ((x + found) <= 1 + 1e-6).all()
    near = slice(2, 63)
    reached = (w[near] * (x + found)[near]).sum(1)
    inside = (found[near] + x[near] > 1e-6) & (found[near] + x[near] < 1 - 1e-6) & (w[near] != 0)
    torch.testing.assert_close(reached[inside.any(1)], b[near][inside.any(1)], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("norm", "theirs", "eps"), [("linf", "Linf", EPS), ("l2", "L2", 0.8)])
def test_targeted_fab_breaks_the_images_that_the_package_breaks(small_model, digits, norm, theirs, eps) -> None:
    """It draws nothing at random. The nearest wrong class, 30 steps; broken points are wrong and in the ball."""
    FABAttack = pytest.importorskip("pyautoattack.fab_pt").FABAttack_PT
    images, labels = digits
    with borrowed(small_model, "eval") as module, torch.random.fork_rng([]):
        logits = module(images).detach()
        right = logits.argmax(1) == labels
        images, labels, targets = images[right], labels[right], logits[right].argsort(1)[:, -2]
        package = FABAttack(module, n_restarts=1, n_iter=30, eps=eps, seed=0, norm=theirs, targeted=True,
                            device="cpu", n_target_classes=1)  # fmt: skip
        with torch.enable_grad():
            adversarial = package.perturb(images.clone(), labels.clone())
        expected = module(adversarial).argmax(1) != labels
        rows = torch.arange(len(images))
        broken, where = run_rows(FabRows(module, images, labels, targets, eps, 30, norm), rows)
        assert (module(where).argmax(1) != labels[broken]).all()
    delta = (where - images[broken]).flatten(1)
    assert ((delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)) <= eps + 1e-6).all()
    assert 5 < int(expected.sum()) < len(images) - 5, "the test needs images of both kinds"
    differing = set(broken.tolist()) ^ set(expected.nonzero()[:, 0].tolist())
    assert len(differing) <= 1


def square(model, digits, queries: int, most: int) -> tuple[SquareRows, set[int]]:
    images, labels = digits
    with borrowed(model, "eval") as module, torch.no_grad():
        right = (module(images).argmax(1) == labels).nonzero()[:, 0]
        search = SquareRows(module, images[right], labels[right], right, EPS, queries, most=most)
        broken, where = run_rows(search, right)
        assert (module(where).argmax(1) != labels[broken]).all()
        assert ((where - images[broken]).abs() <= EPS + 1e-6).all() and where.min() >= 0 and where.max() <= 1
    return search, set(broken.tolist())


def test_square_asks_the_same_at_any_pace(small_model, digits, monkeypatch) -> None:
    """One query of an image after the other, or several at once: the same squares are kept."""
    one, broken = square(small_model, digits, 150, most=0)
    monkeypatch.setattr("mimir_fast.attacks.square.Pace.choose", lambda self, rows: 5)
    many, others = square(small_model, digits, 150, most=10**6)
    assert len(broken ^ others) <= 1 and 2 < len(broken) < 70
    both = torch.isin(one.samples, many.samples), torch.isin(many.samples, one.samples)
    close = (one.x[both[0]] - many.x[both[1]]).abs().flatten(1).amax(1) < 1e-3
    assert close.float().mean() > 0.9, "but for a margin that is equal up to rounding"
    assert (one.asked == 150).all() and (many.asked == 150).all()


def test_square_breaks_as_many_as_the_package(small_model, digits) -> None:
    theirs = pytest.importorskip("pyautoattack.square").SquareAttack
    images, labels = digits
    with borrowed(small_model, "eval") as module, torch.random.fork_rng([]), torch.no_grad():
        right = module(images).argmax(1) == labels
        package = theirs(module, p_init=0.8, n_queries=200, eps=EPS, norm="Linf", seed=0, device="cpu",
                         resc_schedule=False)  # fmt: skip
        adversarial = package.perturb(images[right].clone(), labels[right].clone())
        expected = int((module(adversarial).argmax(1) != labels[right]).sum())
        assert package.p_selection(HALVINGS[2]) / 2 == package.p_selection(HALVINGS[2] + 1), "where p is halved"
    _, broken = square(small_model, digits, 200, most=0)
    assert abs(len(broken) - expected) <= 5 and expected > 5


def test_square_goes_on_where_the_true_class_wins_a_tie(small_model, digits) -> None:
    """In few bits logits are often equal; an image is not broken by that, unless the other class comes first."""

    class Rounded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return small_model(x).round()

    images, labels = digits
    with borrowed(small_model, "eval"), torch.no_grad():
        model = Rounded()
        attacked = attacked_by_square(model, images, labels, EPS, 150)
        moved = (attacked != images).flatten(1).any(1)
        right = is_correct(model(attacked), labels)
        ties = (model(attacked).topk(2).values.diff() == 0)[:, 0]
    assert not (moved & right).any() and moved.sum() > 5
    assert ties.any(), "the test needs some"


def test_square_and_fab_look_at_what_they_get(small_model, digits) -> None:
    images, labels = digits
    with pytest.raises(ValueError, match=r"images span \[0, 255\]"):
        attacked_by_square(small_model, 255 * images, labels, EPS)
    with pytest.raises(ValueError, match="num_queries"):
        attacked_by_square(small_model, images, labels, EPS, 0)
    with pytest.raises(ValueError, match=r"images span \[0, 255\]"):
        fab_many(small_model, 255 * images, labels, EPS, 3)
    with pytest.raises(ValueError, match="norm='l1', wanted one of linf, l2"):
        fab_many(small_model, images, labels, EPS, 3, norm="l1")  # type: ignore[arg-type]


def test_passes_are_full_and_later_attempts_wait_for_the_first() -> None:
    """Five images, three attempts each, passes of four rows; killed anywhere, it goes on with the same rows."""
    stands, seen = torch.ones(5, dtype=torch.bool), list[tuple[list[int], list[int]]]()
    attempts = Attempts(5, 3)
    while len((rows := attempts.take(stands, 4))[0]):
        seen.append((rows[0].tolist(), rows[1].tolist()))
        stands[1] = False  # broken in the first pass
        stands[4] = len(seen) < 2
        attempts = Attempts(5, 3, attempts.done)
    assert seen == [([0, 1, 2, 3], [0] * 4), ([4, 0, 2, 3], [0, 1, 1, 1]), ([0, 2, 3], [2] * 3)]
    assert attempts.done == 15 and first_of_each(torch.tensor([7, 3, 7, 0, 3])).tolist() == [0, 1, 3]
    for empty in (Attempts(0, 3), Attempts(3, 0)):
        assert len(empty.take(torch.ones(empty.num_images, dtype=torch.bool), 4)[0]) == 0


def test_an_image_leaves_with_all_its_rows() -> None:
    class Counting:
        """Row r is broken at step r + 1."""

        def __init__(self) -> None:
            self.rows, self.taken, self.seen = torch.arange(6), 0, list[int]()

        def finished(self) -> bool:
            return self.taken == 4

        def step(self) -> tuple[Tensor, Tensor]:
            self.taken += 1
            self.seen.append(len(self.rows))
            return self.rows < self.taken, self.rows.float().view(-1, 1, 1, 1)

        def select(self, rows: Tensor) -> None:
            self.rows = self.rows[rows]

    search = Counting()
    broken, where = run_rows(search, torch.tensor([7, 8, 9, 7, 8, 5]))
    assert broken.tolist() == [7, 8, 9] and where.flatten().tolist() == [0, 1, 2]
    assert search.seen == [6, 4, 2, 1], "rows 0 and 3 leave together, then 1 and 4, then 2"
