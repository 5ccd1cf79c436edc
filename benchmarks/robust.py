"""How long until a model is robust? Ours against a plain loop (plain_robust.py), on digits and on Fashion-MNIST.

    python -m benchmarks robust --full --output runs/robust.jsonl     goes on where the file ends, seed by seed

Both sides train the same ViT from the same weights by the same recipe. First a few steps of each are timed, in fp32 and
in bf16, the plain loop also under torch.compile: each side takes its fastest. Then, for each seed, all trainings run in
turn, a slice of steps each, forth and back, so that other work and a slowing machine hit all of them. After each slice
PGD-20 attacks images of the *training* split that nobody trains on; no test image is looked at. What is counted is the
time of training, on the clock and of the processor; judging, building and compiling are not.

The target is 95 % of the best accuracy that the plain loop reaches with this seed; the time to it is read off between
the two slices around it.
"""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from itertools import islice, pairwise
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import plain_robust as plain
from benchmarks.case import Size
from benchmarks.ceilings import Ceilings
from benchmarks.disturbance import MOST, lost, usage, words
from benchmarks.plain_robust import Recipe
from benchmarks.record import Record, finished, stamp
from benchmarks.robust_ours import finetuning, ours, pretraining, source_of
from benchmarks.robust_report import BEST, CASE, PLAIN, SPEED, draw
from benchmarks.timing import summary
from mimir_fast.attacks.pgd import is_correct, pgd
from mimir_fast.attacks.threat_model import LinfThreat
from mimir_fast.layers.borrowing import borrowed
from mimir_fast.models.file_names import to_files

OURS, TARGET = "mimir_fast", 0.95
__all__ = ["draw", "records"]  # what the command line asks a question's file for
Training = Iterator[nn.Module]
"""The model before its first step, then after each."""


@dataclass(frozen=True)
class Setting:
    """What is trained on a data set, and how often it is judged.

    Attributes:
        images, held_out: for training and for judging, both of the training split.
        slices: parts of the training, each judged.
    """

    data: str
    recipe: Recipe
    images: int
    held_out: int
    slices: int
    seeds: int


TINY = Recipe(8, 1, 4, steps=4, eps=16 / 255, width=16, depth=1, heads=1, batch_size=8, attack_steps=2)
DIGITS = Recipe(8, 1, 2, steps=400, eps=16 / 255)
FASHION = Recipe(28, 1, 7, steps=400, eps=8 / 255)
FULL = (Setting("digits", DIGITS, 1197, 200, 8, 3), Setting("fashion_mnist", FASHION, 12_800, 200, 8, 3))
SETTINGS: dict[Size, tuple[Setting, ...]] = {
    "tiny": (Setting("digits", TINY, 64, 32, 2, 2),),
    "quick": (Setting("digits", replace(DIGITS, width=64, depth=2, heads=4), 1197, 150, 8, 1),),
    "full": FULL,
    "gpu": FULL,  # is not run: these models would leave a GPU idle
}


class Variant(NamedTuple):
    """In which precision a side computes, and whether through torch.compile."""

    bf16: bool = False
    compiled: bool = False

    def __str__(self) -> str:
        return ("bf16" if self.bf16 else "fp32") + (" compiled" if self.compiled else "")


@dataclass
class Race:
    """A training under way: the time it has taken so far, and its curve.

    Attributes:
        ms, cpu_ms: of a step, one number a slice.
        lost: share of each slice that other work took.
        curve: a point after each slice.
    """

    training: Training
    steps: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    lost: list[float] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = next(self.training)

    def advance(self, steps: int) -> None:
        """So many steps, timed."""
        before, cpu = usage(), time.process_time()
        for model in islice(self.training, steps):
            self.model, self.steps = model, self.steps + 1
        cpu, after = time.process_time() - cpu, usage()
        self.wall_s, self.cpu_s = self.wall_s + after.at - before.at, self.cpu_s + cpu
        self.ms.append(1e3 * (after.at - before.at) / steps)
        self.cpu_ms.append(1e3 * cpu / steps)
        self.lost.append(lost(before, after))

    def judged(self, natural: float, pgd20: float) -> None:
        """Note the accuracies now."""
        self.curve.append(
            {"step": self.steps, "wall_s": self.wall_s, "cpu_s": self.cpu_s, "natural": natural, "pgd20": pgd20}
        )


def records(
    device: torch.device, size: Size, ceilings: Ceilings, *, only: str | None = None, before: Sequence[Record] = ()
) -> Iterator[list[Record]]:
    """Of each data set the times of steps, then of each seed a record a training.

    Args:
        only: `data=digits`, or the name of a case.
        before: records of earlier calls; what is there of this commit is not run again.
    """
    missing = [f"{name} is not installed: make setup" for name in ("torchattacks", "timm") if not find_spec(name)]
    if why := [*(["its models are for CPUs: --device cpu"] if device.type != "cpu" else []), *missing]:
        yield [stamp(Record(CASE, PLAIN, {}, 0.0, status="skipped", note=why[0]), device, ceilings)]
        return
    keys = finished(before, device, timed=False)
    known = {r.key(): r for r in before if r.key() in keys}
    for setting in SETTINGS[size]:
        if only not in (None, SPEED, CASE, f"data={setting.data}"):
            continue
        speeds = [r for r in known.values() if r.case == SPEED and r.params == _params(setting)]
        if not speeds:
            speeds = [stamp(r, device, ceilings) for r in speeds_of(setting, compiled=size not in ("tiny", "quick"))]
            yield speeds
        chosen = {side: _fastest(side, speeds) for side in (PLAIN, OURS)}
        for seed in range(setting.seeds if only != SPEED else 0):
            arms = arms_of(setting, seed, chosen[PLAIN], chosen[OURS])
            params = _params(setting) | {"seed": seed}
            if not all(Record(CASE, name, params, 0.0).key() in known for name in arms):
                yield [stamp(r, device, ceilings) for r in race(setting, seed, arms, params)]


def speeds_of(setting: Setting, *, compiled: bool, rounds: int = 3) -> list[Record]:
    """Milliseconds of a step of each side in each variant: with the whole attack, and (extra) without one.

    The difference is the attack's, so this says where the time goes.
    """
    whole, none = setting.recipe, replace(setting.recipe, attack_steps=0)
    variants = [Variant(False), Variant(True)]
    also = [Variant(bf16, True) for bf16 in (False, True)] if compiled else []
    trainings: dict[str, tuple[Training, Training]] = {}
    for variant in variants:
        trainings[f"{OURS} {variant}"] = (_ours(setting, whole, 0, variant), _ours(setting, none, 0, variant))
    for variant in [*variants, *also]:
        trainings[f"{PLAIN} {variant}"] = (_plain(setting, whole, 0, variant), _plain(setting, none, 0, variant))
    races = {name: (Race(one), Race(other)) for name, (one, other) in trainings.items()}
    for number in range(1 + rounds):  # the first is not counted
        for name in races if number % 2 else reversed(races):
            for one in races[name]:
                one.advance(1)
    return [_speed(setting, name, *pair) for name, pair in races.items()]


def _speed(setting: Setting, name: str, whole: Race, none: Race) -> Record:
    """The record of a variant's step."""
    record = Record(SPEED, name, _params(setting), 0.0, baseline=f"{PLAIN} fp32")
    _times(record, whole, skip=1)
    record.items_per_s = setting.recipe.batch_size / record.ms["median"] * 1e3
    record.extra |= {"cpu_ms": median(whole.cpu_ms[1:]), "cpu_ms without attack": median(none.cpu_ms[1:])}
    return record


def _fastest(side: str, speeds: Sequence[Record]) -> Variant:
    """By processor time, which other work does not lengthen."""
    own = {r.impl.removeprefix(side).strip(): r.extra["cpu_ms"] for r in speeds if r.impl.startswith(side)}
    name = min(own, key=lambda variant: own[variant])
    return Variant("bf16" in name, "compiled" in name)


def arms_of(setting: Setting, seed: int, theirs: Variant, own: Variant) -> dict[str, Callable[[], Training]]:
    """Name → training. Only the plain loop and `mimir_fast pgd` compute the same; the others are options of ours."""
    recipe = setting.recipe

    def mine(**options: Any) -> Callable[[], Training]:
        return partial(_ours, setting, recipe, seed, own, **options)

    few = max(2, recipe.attack_steps // 3)
    larger = recipe.alpha * recipe.attack_steps / few
    return {
        PLAIN: partial(_plain, setting, recipe, seed, theirs),
        f"{PLAIN} FFGSM": partial(_plain, setting, recipe, seed, theirs, attack="FFGSM"),
        f"{OURS} pgd": mine(),
        f"{OURS} pgd, {few} larger steps": mine(num_steps=few, alpha=larger),
        f"{OURS} pgd, ramp_steps": mine(ramp_steps=recipe.steps),
        f"{OURS} pgd, visible 0.5": mine(visible=0.5),
        f"{OURS} pgd, every 2": mine(every=2),
        f"{OURS} fast": mine(method="fast"),
        f"{OURS} free": mine(method="free"),
        f"{OURS} fast, after MIMIR": mine(method="fast", warm=True),
    }


def _ours(
    setting: Setting, recipe: Recipe, seed: int, variant: Variant, *, warm: bool = False, **options: Any
) -> Training:
    """Ours, after as many steps of pre-training where it starts `warm`."""
    first = pretraining(recipe, setting.data, setting.images, seed, bf16=variant.bf16) if warm else None
    return ours(finetuning(recipe, setting.data, setting.images, seed, bf16=variant.bf16, **options), first)


def _plain(setting: Setting, recipe: Recipe, seed: int, variant: Variant, attack: str = "PGD") -> Training:
    """The plain loop, from the weights that ours starts from."""
    start = next(_ours(setting, recipe, seed, Variant()))
    model = plain.build_model(recipe)
    model.load_state_dict(to_files(start, start.state_dict()))
    images, labels = (torch.from_numpy(a) for a in source_of(setting.data, recipe, setting.images, "train"))
    train = partial(
        plain.train, images=images, labels=labels, recipe=recipe, attack=attack, bf16=variant.bf16,
        compiled=variant.compiled, seed=seed,
    )  # fmt: skip
    if variant.compiled:  # the graphs are made by a copy, before the clock runs
        list(islice(train(copy.deepcopy(model)), 2))
    yield model
    for _ in train(model):
        yield model


def race(setting: Setting, seed: int, arms: dict[str, Callable[[], Training]], params: dict[str, Any]) -> list[Record]:
    """Run all trainings of a seed in turn, and say what came of each."""
    races = {name: Race(start()) for name, start in arms.items()}
    images, labels = source_of(setting.data, setting.recipe, setting.held_out, "test")
    held = torch.from_numpy(images).float() / 255, torch.from_numpy(labels)
    bounds = [setting.recipe.steps * k // setting.slices for k in range(setting.slices + 1)]
    for number, (start, end) in enumerate(pairwise(bounds)):
        for name in races if number % 2 == 0 else reversed(races):
            races[name].advance(end - start)
            races[name].judged(*judge(races[name].model, *held, setting.recipe.eps))
    target = TARGET * max(point["pgd20"] for point in races[PLAIN].curve)
    return [_outcome(name, one, target, params) for name, one in races.items()]


def judge(model: nn.Module, images: Tensor, labels: Tensor, eps: float) -> tuple[float, float]:
    """Natural accuracy, and that under PGD-20 (steps of ε/4, random start), of images in [0, 1]; in fp32, eval mode."""
    threat = LinfThreat(eps=eps, alpha=eps / 4, num_steps=20)
    with borrowed(model, "eval") as module, torch.no_grad():
        right = is_correct(module(images), labels).nonzero()[:, 0]
        if not len(right):
            return 0.0, 0.0
        stood = is_correct(module(pgd(module, images[right], labels[right], threat, samples=right)), labels[right])
    return len(right) / len(labels), int(stood.sum()) / len(labels)


def time_to(curve: Sequence[dict[str, float]], target: float, clock: str) -> float | None:
    """Seconds on a clock (`wall_s`, `cpu_s`) until the accuracy was first there, between the points around it."""
    previous = {"pgd20": 0.0, clock: 0.0}
    for point in curve:
        if point["pgd20"] >= target:
            part = (target - previous["pgd20"]) / max(point["pgd20"] - previous["pgd20"], 1e-9)
            return previous[clock] + min(1.0, part) * (point[clock] - previous[clock])
        previous = point
    return None


def _outcome(name: str, one: Race, target: float, params: dict[str, Any]) -> Record:
    record = Record(CASE, name, params, 0.0, baseline=PLAIN, curve=one.curve)
    _times(record, one)
    record.extra = {"target": target, BEST: max(point["pgd20"] for point in one.curve)}
    for clock in ("wall_s", "cpu_s"):
        if (seconds := time_to(one.curve, target, clock)) is not None:
            record.extra[f"{clock} to target"] = seconds
    return record


def _times(record: Record, one: Race, skip: int = 0) -> None:
    """Of a step: the median over slices, and the noise between the earlier and the later ones."""
    ms, share = one.ms[skip:], median(one.lost[skip:])
    half = (len(ms) + 1) // 2
    record.ms = summary(ms[:half], ms[half:]) | {"disturbed": share if share > MOST else 0.0}
    if record.disturbed:
        record.note = words(share)


def _params(setting: Setting) -> dict[str, Any]:
    """What tells a setting from others."""
    r = setting.recipe
    return {
        "data": setting.data, "model": f"ViT {r.width}x{r.depth}/{r.patch_size}", "image": r.image_size,
        "images": setting.images, "batch": r.batch_size, "steps": r.steps,
        "attack": f"PGD-{r.attack_steps}, eps {255 * r.eps:.3g}/255",
    }  # fmt: skip
