"""AutoAttack's searches on rows against its authors' package: equal in law, and where nothing is random, by image.

A random search's outcome is the margin that it reaches, above 0 where the image is broken: it tells more of a search
than who is broken, and that besides. Of each image on the border the draws of both searches are ranked together. A
draw is judged by its mean rank over the images, because the package's Square draws its squares once for all images of a
call; Welch's t compares ours with the package's, in height and in distance from the middle.

False alarms: of two equal laws |t| > 4.5 has probability 1e-5 (254 degrees of freedom), in all six numbers together
6e-5. What it sees is planted below: each fault exceeds the bound.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_classifier import EPS
from torch import Tensor, nn

from mimir_fast.attacks import apgd_rows, fab, square
from mimir_fast.attacks.apgd import LinfBall, surface_start, targeted_dlr
from mimir_fast.attacks.apgd_rows import ApgdRows, Schedule
from mimir_fast.attacks.fab import FabRows
from mimir_fast.attacks.losses import Aimed, likeliest_wrong, margin
from mimir_fast.attacks.pgd import cross_entropy
from mimir_fast.attacks.square import SquareRows
from mimir_fast.evaluation.images import EvaluationImages
from mimir_fast.layers.borrowing import borrowed

pytestmark = pytest.mark.slow
BORDER, BOUND = 16, 4.5
STEPS = {"apgd-ce": 40, "apgd-t": 40, "square": 120}
DRAWS = {"apgd-ce": 192, "apgd-t": 192, "square": 128}
Digits = tuple[nn.Module, Tensor, Tensor]


@pytest.fixture(scope="module")
def digits(small_model: nn.Module, digits_images: EvaluationImages) -> Digits:
    """The model and the digits that it knows."""
    images, labels = digits_images.images.float() / 255, digits_images.labels
    with borrowed(small_model, "eval") as module, torch.no_grad():
        right = module(images).argmax(1) == labels
    return small_model, images[right], labels[right]


def ours(name: str, digits: Digits, draws: int, seed: int = 0) -> Tensor:
    """(draws, N) margins that the search reaches; 0 stands for any above it where the search ends there."""
    model, images, labels = digits[0], digits[1].repeat(draws, 1, 1, 1), digits[2].repeat(draws)
    samples = torch.arange(len(images))
    with borrowed(model, "eval") as module, torch.no_grad():
        search: Any
        if name == "square":
            search = SquareRows(module, images, labels, samples, EPS, STEPS[name], seed=seed)
        else:
            start = surface_start(images, EPS, "linf", samples=samples, seed=seed, step=0)
            targets = likeliest_wrong(module(images), labels, 1)[:, 0]
            loss = cross_entropy if name == "apgd-ce" else Aimed(targeted_dlr, targets)
            search = ApgdRows(module, labels, start, LinfBall(images, EPS), STEPS[name], loss)
        while not search.finished():
            search.step()
        reached = -search.margin.clamp(min=0) if name == "square" else margin(module(search.best), labels)
    return reached.view(draws, -1)


def theirs(name: str, digits: Digits, draws: int) -> Tensor:
    """The same of the package."""
    model, images, labels = digits
    with borrowed(model, "eval") as module, torch.random.fork_rng([]), torch.no_grad():
        torch.manual_seed(1)
        if name == "square":
            from pyautoattack.square import SquareAttack

            package = SquareAttack(module, p_init=0.8, n_queries=STEPS[name], eps=EPS, norm="Linf", device="cpu",
                                   resc_schedule=False)  # fmt: skip
            package.init_hyperparam(images)
            found = [package.attack_single_run(images.clone(), labels)[1] for _ in range(draws)]
            return torch.stack([margin(module(x), labels).clamp(max=0) for x in found])
        from pyautoattack import autopgd_base as base

        kind = base.APGDAttack if name == "apgd-ce" else base.APGDAttack_targeted
        package = kind(module, n_iter=STEPS[name], n_restarts=1, norm="Linf", eps=EPS, device="cpu")
        many, truth = images.repeat(draws, 1, 1, 1), labels.repeat(draws)
        package.init_hyperparam(many)
        if name == "apgd-t":
            package.loss, package.y_target = "dlr-targeted", module(many).sort(dim=1)[1][:, -2]
        best = package.attack_single_run(many, truth)[0]
        return margin(module(best), truth).view(draws, -1)


def t_values(one: Tensor, other: Tensor) -> tuple[float, float]:
    """Welch's t of the draws' mean ranks, and of their mean distances from the middle rank."""
    from scipy.stats import rankdata

    ranks = torch.from_numpy(rankdata(torch.cat([one, other]).numpy().round(5), axis=0))

    def t(values: Tensor) -> float:
        mine, else_ = values.mean(1).split(len(one))
        return float((mine.mean() - else_.mean()) / (mine.var() / len(mine) + else_.var() / len(else_)).sqrt())

    return t(ranks), t((ranks - ranks.mean(0)).abs())


@pytest.fixture(scope="module")
def border(digits: Digits) -> Callable[[str], tuple[Digits, Tensor]]:
    """Of an attack: the images on the border of being broken, by a pilot, and what the package reaches on them."""
    known = dict[str, tuple[Digits, Tensor]]()

    def of(name: str) -> tuple[Digits, Tensor]:
        if name not in known:
            chosen = ours(name, digits, 8, seed=1).mean(0).abs().argsort()[:BORDER]
            part = digits[0], digits[1][chosen], digits[2][chosen]
            known[name] = part, theirs(name, part, DRAWS[name])
        return known[name]

    return of


@pytest.mark.parametrize("name", list(STEPS))
def test_a_random_search_reaches_what_the_package_reaches(border, name: str) -> None:
    pytest.importorskip("pyautoattack")
    part, expected = border(name)
    share = (expected >= 0).double().mean(0)
    assert int(((share > 0) & (share < 1)).sum()) >= 3, "images are needed that only a part of the draws breaks"
    height, spread = t_values(ours(name, part, DRAWS[name]), expected)
    print(f"{name}: t = {height:+.2f} in height, {spread:+.2f} in spread")
    assert abs(height) < BOUND and abs(spread) < BOUND


def no_shortening(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Schedule, "shorten", lambda self: None)


def a_checkpoint_late(patch: pytest.MonkeyPatch) -> None:
    first = Schedule.of
    patch.setattr(Schedule, "of", lambda steps: Schedule(2 * first(steps).interval, first(steps).decrease, 1))


FAULTS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "momentum dropped": ("apgd-ce", lambda patch: patch.setattr(apgd_rows, "MOMENTUM", 1.0)),
    "the first checkpoint at twice the steps": ("apgd-ce", a_checkpoint_late),
    "intervals that do not shorten": ("apgd-t", no_shortening),
    "steps halved at half of the rises": ("apgd-t", lambda patch: patch.setattr(apgd_rows, "RHO", 0.5)),
    "p halved twice as early": ("square", lambda patch: patch.setattr(square, "HALVINGS", (5, 25, 100, 250))),
    "p halved twice as late": ("square", lambda patch: patch.setattr(square, "HALVINGS", (20, 100, 400))),
}  # fmt: skip


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_planted_fault_is_seen(border, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    pytest.importorskip("pyautoattack")
    name, plant = FAULTS[fault]
    part, expected = border(name)
    plant(monkeypatch)
    height, spread = t_values(ours(name, part, DRAWS[name]), expected)
    print(f"{fault}: t = {height:+.2f} in height, {spread:+.2f} in spread")
    assert max(abs(height), abs(spread)) > BOUND


def fab_distances(digits: Digits) -> tuple[Tensor, Tensor]:
    """(N,) smallest perturbations towards the nearest wrong class, ours and the package's; ∞ where none is found."""
    from pyautoattack.fab_pt import FABAttack_PT

    model, images, labels = digits
    with borrowed(model, "eval") as module, torch.no_grad():
        package = FABAttack_PT(module, n_restarts=1, n_iter=40, eps=EPS, norm="Linf", targeted=True, device="cpu")
        package.target_class = 2
        with torch.enable_grad():
            x = package.attack_single_run(images.clone(), labels.clone(), is_targeted=True)
        wrong = module(x).argmax(1) != labels
        far = (x - images).flatten(1).abs().amax(1).masked_fill(~wrong, torch.inf)
        targets = module(images).argsort(1)[:, -2]
        search, near = FabRows(module, images, labels, targets, 10.0, 40), torch.full_like(far, torch.inf)
        while not search.finished():
            broken, x = search.step()
            here = (x - images).flatten(1).abs().amax(1)
            near = torch.where(broken, near.minimum(here), near)
    return near, far


def differing(near: Tensor, far: Tensor) -> float:
    """Share of the images whose distances are not equal but for rounding."""
    return float((~torch.isclose(near, far, rtol=1e-3, atol=1e-5)).double().mean())


def test_targeted_fab_finds_the_packages_distances(digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    """It draws nothing: of 200 digits or more 1.5 % may differ, where rounding decides; each planted fault shows."""
    pytest.importorskip("pyautoattack")
    share = differing(*fab_distances(digits))
    print(f"fab-t: {100 * share:.1f} % of {len(digits[1])} differ")
    assert len(digits[1]) > 200 and share < 0.015
    for name, value in (("ALPHA_MAX", 0.2), ("ETA", 1.0), ("BETA", 0.8)):
        with monkeypatch.context() as patch:
            patch.setattr(fab, name, value)
            share = differing(*fab_distances(digits))
        print(f"fab-t with {name} = {value}: {100 * share:.1f} % differ")
        assert share > 0.015, name
