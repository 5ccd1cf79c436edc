"""AutoAttack through our command: the package's own numbers where they are asked for, its verdicts where images leave
early; both also after a kill; nothing of the model changes."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_classifier import EPS, SmallNet
from torch import nn

from mimir_fast.evaluation.config import EvaluateConfig
from mimir_fast.evaluation.images import EvaluationImages
from mimir_fast.evaluation.topics.autoattack import Progress, attacks_of, run_autoattack, square_warning

pyautoattack = pytest.importorskip("pyautoattack")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def few(digits_images: EvaluationImages) -> EvaluationImages:
    return digits_images.evenly(12)


@pytest.mark.parametrize(
    ("names", "lives"),
    [
        (("apgd-ce", "apgd-t"), (60, 500)),
        pytest.param(("apgd-ce", "apgd-t", "fab-t", "square"), (230, 900, 1500), marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_equals_a_direct_call(
    small_model, few: EvaluationImages, tmp_path: Path, names: tuple[str, ...], lives: tuple[int, ...]
) -> None:
    """*standard* (`-m slow`) or its first two attacks, killed in different ones, against the package's own loop."""
    with torch.random.fork_rng([]):
        direct = pyautoattack.AutoAttack(small_model, eps=EPS, version="standard", seed=0)
        direct.attacks_to_run = list(names)
        x_adv, _ = direct.run_standard_evaluation(few.images.float() / 255, few.labels, batch_size=5)
    with torch.no_grad():
        stands = (small_model(x_adv).argmax(1) == few.labels).tolist()
    assert 0 < sum(stands) < 12, "the test needs a robust accuracy in between"

    state = tmp_path / "autoattack.json"
    progress = killed_and_resumed(small_model, few, lives, state, batch_size=5, attacks=names, exact=True)
    assert [name == "none" for name in progress.broken_by] == stands
    assert progress.after[names[-1]] == sum(stands)
    assert list(progress.after) == ["clean", *names]

    finished = run_autoattack(
        Mortal(small_model, 20), few, EPS, batch_size=5, device=CPU, state=state, attacks=names, exact=True
    )
    assert finished.broken_by == progress.broken_by, "a finished evaluation is read, not repeated"


class Mortal(nn.Module):
    """Dies after so many forward passes."""

    def __init__(self, net: nn.Module, lives: int) -> None:
        super().__init__()
        self.net, self.lives = net, lives

    def forward(self, x):
        self.lives -= 1
        if self.lives < 0:
            raise KeyboardInterrupt
        return self.net(x)


def killed_and_resumed(
    model: nn.Module, shard: EvaluationImages, lives: Sequence[int], state: Path, **options: Any
) -> Progress:
    """The progress of a start that goes on where others were killed, each after so many passes of the model."""
    positions = []
    for most in lives:
        with pytest.raises(KeyboardInterrupt):
            run_autoattack(Mortal(model, most), shard, EPS, device=CPU, state=state, **options)
        saved = json.loads(state.read_text())
        positions.append((saved["attack"], saved["batch"]))
    assert positions == sorted(set(positions)), "each start went further than the one before"
    return run_autoattack(model, shard, EPS, device=CPU, state=state, **options)


def test_images_that_leave_early_get_the_packages_verdicts(small_model, digits_images, tmp_path: Path) -> None:
    """All gradient attacks of *standard*, killed three times, against the package's own loop on 60 digits."""
    names, some = ("apgd-ce", "apgd-t", "fab-t"), digits_images.evenly(60)
    with torch.random.fork_rng([]):
        direct = pyautoattack.AutoAttack(small_model, eps=EPS, version="standard", seed=0)
        direct.attacks_to_run = ["apgd-ce", "apgd-t"]  # FAB-T finds no more on these, which slow tests confirm
        x_adv, _ = direct.run_standard_evaluation(some.images.float() / 255, some.labels, batch_size=16)
    with torch.no_grad():
        stands = (small_model(x_adv).argmax(1) == some.labels).tolist()
    kept = list[int]()

    def keep(x, labels, samples, attack) -> None:
        with torch.no_grad():
            assert (small_model(x).argmax(1) != labels).all()
        clean = some.images[torch.isin(some.samples, samples)].float() / 255
        assert x.shape == clean.shape and x.min() >= 0 and x.max() <= 1
        kept.extend(samples.tolist())

    state = tmp_path / "s.json"
    progress = killed_and_resumed(small_model, some, (150, 700, 1500), state, batch_size=16, attacks=names, keep=keep)
    whole = run_autoattack(small_model, some, EPS, batch_size=16, device=CPU, attacks=names)
    assert progress.broken_by == whole.broken_by and progress.after == whole.after
    ours = [name == "none" for name in progress.broken_by]
    assert sum(a != b for a, b in zip(ours, stands, strict=True)) <= 1 and sum(ours) <= sum(stands)
    assert 10 < sum(stands) < 50, "the test needs a robust accuracy in between"
    broken = [int(s) for s, name in zip(some.samples, progress.broken_by, strict=True) if name not in ("none", "clean")]
    assert sorted(set(kept)) == sorted(broken), "what broke an image is kept"
    with pytest.raises(ValueError, match="--overwrite"):
        run_autoattack(small_model, some, EPS, batch_size=16, device=CPU, state=state, attacks=names, exact=True)


def test_the_share_that_is_done_follows_the_work(small_model, few: EvaluationImages) -> None:
    """Told after each wave, against images passed through the model, those with a gradient counted three times."""
    work, ticks = [0], list[tuple[float, int]]()

    class Counting(nn.Module):
        def forward(self, x):
            work[0] += len(x) * (3 if x.requires_grad else 1)
            return small_model(x)

    run_autoattack(Counting(), few, EPS / 2, batch_size=16, device=CPU, tick=lambda s: ticks.append((s, work[0])))
    shares = [share for share, _ in ticks]
    assert shares == sorted(shares) and shares[-1] == 1
    assert all(abs(share - done / work[0]) < 0.1 for share, done in ticks)


def test_leaves_no_trace(few: EvaluationImages) -> None:
    model = SmallNet().train()
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.5)
    before, random_state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    run_autoattack(model, few.evenly(4), 0.3, batch_size=4, device=CPU)
    assert model.training and all(p.requires_grad and (p.grad == 0.5).all() for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_another_evaluations_state_is_refused(small_model, few: EvaluationImages, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps({"fingerprint": "of something else"}))
    with pytest.raises(ValueError, match="--overwrite"):
        run_autoattack(small_model, few, EPS, batch_size=8, device=CPU, state=tmp_path / "s.json")


@pytest.mark.parametrize(
    ("num_classes", "attacks"),
    [(2, ["apgd-ce", "fab", "square"]), (3, ["apgd-ce", "apgd-dlr", "fab", "fab-t", "square"])],
)
def test_of_two_or_three_classes_it_is_what_is_defined(
    few: EvaluationImages, num_classes: int, attacks: list[str]
) -> None:
    """Each of them runs, and together they break what APGD with cross entropy alone cannot be sure of."""
    model = SmallNet(num_classes=num_classes).eval()
    assert list(attacks_of("standard", num_classes)) == attacks
    options = EvaluateConfig("a model", autoattack="yes")
    assert options.whole(num_classes) and options.title(num_classes) == f"AutoAttack for {num_classes} classes"
    with torch.no_grad():
        guessed = replace(few, labels=model(few.images.float() / 255).argmax(1)).evenly(2)
    weak = run_autoattack(model, guessed, 1e-6, batch_size=8, device=CPU, attacks=attacks[:-1])
    assert list(weak.after) == ["clean", *attacks[:-1]] and weak.remaining(), "every one of them has run"
    assert not run_autoattack(model, guessed, 0.9, batch_size=8, device=CPU).remaining()


def test_attacks_that_compare_more_logits_than_there_are_classes_are_refused(few: EvaluationImages) -> None:
    model = SmallNet(num_classes=3).eval()
    asked = ("apgd-ce", "apgd-t", "square")
    with pytest.raises(ValueError, match=r"apgd-t compares.*3 classes.*--autoattack_attacks apgd-ce square"):
        run_autoattack(model, few, EPS, batch_size=8, device=CPU, attacks=asked)


def test_five_classes_have_four_targets(few: EvaluationImages) -> None:
    """The package would look for a ninth wrong class. Half the labels are the model's own guesses."""
    model = SmallNet(num_classes=5).eval()
    with torch.no_grad():
        guesses = model(few.images.float() / 255).argmax(1)
    right_ones = torch.arange(len(guesses)) % 2 == 0
    images = replace(few, labels=torch.where(right_ones, guesses, (guesses + 1) % 5))
    weak = run_autoattack(model, images, 0.05, batch_size=8, device=CPU)
    right = [name != "clean" for name in weak.broken_by]
    assert sum(right) == 6
    strong = run_autoattack(model, images, 0.9, batch_size=8, device=CPU)
    assert not strong.remaining() and {"apgd-ce"} <= set(strong.broken_by)
    assert next(iter(strong.after)) == "clean" and strong.after["clean"] == sum(right)


def test_the_packages_warnings_reach_the_report(few: EvaluationImages) -> None:
    class Dice(SmallNet):
        def forward(self, images):
            return super().forward(images) + torch.randn(len(images), 10)

    progress = run_autoattack(Dice().eval(), few.evenly(4), 1.0, batch_size=4, device=CPU)
    assert any("randomized" in warning for warning in progress.warnings)


def test_warnings_outlive_a_kill_in_the_first_attack(few: EvaluationImages, tmp_path: Path) -> None:
    class Mortal(SmallNet):
        """Draws noise, and dies in the first attack of its first life."""

        lives = 40

        def forward(self, images):
            self.lives -= 1
            if self.lives < 0:
                raise KeyboardInterrupt
            return super().forward(images) + 0.01 * torch.randn(len(images), 10)

    model, state = Mortal().eval(), tmp_path / "s.json"
    images = few.take(torch.arange(4))
    with torch.no_grad():  # labels the net agrees with, so that there is something to attack
        images.labels = model(images.images.float() / 255).argmax(1)
    model.lives = 40
    with pytest.raises(KeyboardInterrupt):
        run_autoattack(model, images, 0.01, batch_size=4, device=CPU, state=state)
    saved = json.loads(state.read_text())
    assert saved["attack"] == 0 and any("randomized" in warning for warning in saved["warnings"])


def test_square_that_finds_more_than_the_gradients_is_said() -> None:
    """AutoAttack's own last check, over the counts of all shards; one image, of however few, is no sign."""
    counts = {"clean": 48, "apgd-ce": 40, "apgd-t": 40, "fab-t": 40, "square": 39}
    assert not square_warning(counts, 48) and not square_warning(counts, 40)
    assert square_warning(counts | {"square": 38}, 48)
    assert not square_warning({"clean": 9000, "apgd-ce": 6000, "square": 5972}, 10_000)
    assert square_warning({"clean": 9000, "apgd-ce": 6000, "square": 5960}, 10_000)
    assert square_warning({"clean": 90, "apgd-ce": 60, "apgd-t": 60, "fab-t": 60, "square": 58}, 100)
    assert not square_warning({"clean": 90, "apgd-ce": 60, "apgd-t": 60, "fab-t": 60, "square": 60}, 100)
    assert not square_warning({"clean": 900, "apgd-ce": 600, "apgd-t": 600, "fab-t": 600, "square": 599}, 1000)


@pytest.mark.parametrize(
    ("norm", "package_norm", "eps"), [("l2", "L2", 0.8), pytest.param("l1", "L1", 1.5, marks=pytest.mark.slow)]
)
def test_other_norms_equal_a_direct_call(small_model, few: EvaluationImages, norm, package_norm, eps) -> None:
    """Two of the attacks, to be quick; the whole of L∞ is compared above."""
    names = ("apgd-ce", "apgd-t")
    with torch.random.fork_rng([]):
        direct = pyautoattack.AutoAttack(small_model, eps=eps, norm=package_norm, version="standard", seed=0)
        direct.attacks_to_run = list(names)
        x_adv, _ = direct.run_standard_evaluation(few.images.float() / 255, few.labels, batch_size=6)
    with torch.no_grad():
        stands = (small_model(x_adv).argmax(1) == few.labels).tolist()
    progress = run_autoattack(small_model, few, eps, batch_size=6, device=CPU, attacks=names, norm=norm, exact=True)
    assert [name == "none" for name in progress.broken_by] == stands and 0 < sum(stands) < 12
