"""The first table: accuracy without attack, under each attack, and under the worst of all.

The robust accuracy is per image: right when clean, and not broken by any attack within the ball that ran on every
image, of this topic or another. It bounds the true robust accuracy from above. Attacks that ran on a part of the images
are counted apart, on these images: mixed in, they would lower the accuracy of all by what they break of a few.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from mimir_fast.attacks.adaptive import pgd_features, pgd_mi
from mimir_fast.attacks.losses import Aimed, likeliest_wrong, targeted_margin
from mimir_fast.attacks.until_broken import first_to_fool
from mimir_fast.evaluation.attacks import (
    NamedAttack,
    attack_averaged,
    draws_said,
    make_fgsm,
    make_pgd,
    natural,
    parameters_of,
    threat_of,
)
from mimir_fast.evaluation.html import paragraph, percent, span, table
from mimir_fast.evaluation.measure import UNBROKEN, Measurement, Records
from mimir_fast.evaluation.options import NORM_WORDS, CommonOptions
from mimir_fast.evaluation.statistics import Count, binomial_tail
from mimir_fast.evaluation.topic import Column, Numbers, Setup, Topic, options_of, register
from mimir_fast.evaluation.topics import autoattack
from mimir_fast.ops.hsic import hsic
from mimir_fast.ops.nhsic import nhsic
from mimir_fast.ops.renyi_mi import renyi_mi
from mimir_fast.validation import check_number, without

NAME = "accuracy"
STEPS = {
    "quick": (20,), "paper": (20, 100), "full": (20, 100), "table": (20,), "corruptions": (), "strongest": (20,)
}  # fmt: skip
"""Of the PGD attacks, by suite; where there is none, there is no FGSM either."""
ADAPTIVE_STEPS = {"paper": 100, "full": 100}
"""Of PGD-MI and PGD-fea."""
ESTIMATORS = {"nhsic": nhsic, "hsic": hsic, "renyi": renyi_mi}


@dataclass
class AccuracyOptions:
    """Targeted and adaptive attacks."""

    targets: int = 0
    """Aim PGD at that many of the likeliest wrong classes, one after the other; 0 leaves targeted attacks out."""
    mi_estimator: Literal["nhsic", "hsic", "renyi"] = "nhsic"
    """Estimator of I(x+δ, z) in PGD-MI: nhsic as the authors' code has it (σ = 5), hsic or renyi."""
    mi_weight: float = 1e-5
    """λ of PGD-MI."""
    mi_balanced: bool = False
    """PGD-MI with λ chosen batch by batch so that both terms have gradients of one size; mi_weight is not used."""

    def __post_init__(self) -> None:
        check_number("targets", self.targets, at_least=0, hint="0 leaves targeted attacks out")

    def idle(self) -> dict[str, str]:
        """Options that do nothing as the others are."""
        options = "mi_estimator", "mi_weight", "mi_balanced"
        suite = cast(CommonOptions, self).suite  # joined with them in EvaluateConfig
        return (
            without(not self.mi_balanced, "--mi_balanced chooses it", "mi_weight")
            | without(suite in ADAPTIVE_STEPS, f"suite {suite} has no PGD-MI", *options)
            | without(STEPS[suite], f"suite {suite} attacks nothing", "targets", "restarts", "eot")
        )


def make_targeted(config: CommonOptions, num_steps: int, targets: int) -> NamedAttack:
    """PGD that pushes each of the likeliest wrong classes above the true one, one after the other."""
    threat = threat_of(config, num_steps)

    def run(model: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        with torch.no_grad():
            wrong = likeliest_wrong(model(x), y, targets)

        def attempt(rows: Tensor, numbers: Tensor) -> Tensor:
            return attack_averaged(
                model, x[rows], y[rows], threat, draws=config.eot or 1,
                loss=Aimed(targeted_margin, wrong[rows, numbers]), samples=samples[rows], seed=config.seed,
                step=numbers,
            )  # fmt: skip

        return first_to_fool(model, x, y, attempt, wrong.shape[1])

    parameters = {**parameters_of(threat), "loss": "logit of target − logit of label", "targets": targets,
                  "seed": config.seed, **draws_said(config.eot or 1)}  # fmt: skip
    label = f"PGD-{num_steps} at {targets} classes"
    return NamedAttack(f"pgd{num_steps}_targeted", label, run, parameters, 3.0 * num_steps * targets)


def make_pgd_mi(config: CommonOptions, num_steps: int) -> NamedAttack:
    """PGD on cross entropy plus λ·I(x+δ, z)."""
    options, threat = options_of(config, AccuracyOptions), threat_of(config, num_steps)
    estimator, weight = ESTIMATORS[options.mi_estimator], "balanced" if options.mi_balanced else options.mi_weight

    def run(model: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        return pgd_mi(model, x, y, threat, weight=weight, estimator=estimator, samples=samples, seed=config.seed)  # type: ignore[arg-type]

    parameters = {**parameters_of(threat), "weight": weight, "estimator": options.mi_estimator, "seed": config.seed,
                  "batch_size": config.batch_size}  # fmt: skip
    return NamedAttack(f"pgd_mi{num_steps}", f"PGD-MI-{num_steps}", run, parameters, 3.0 * num_steps)


def make_pgd_features(config: CommonOptions, num_steps: int) -> NamedAttack:
    """PGD on the distance of features."""
    threat = threat_of(config, num_steps)

    def run(model: nn.Module, x: Tensor, y: Tensor, samples: Tensor) -> Tensor:
        return pgd_features(model, x, threat, samples=samples, seed=config.seed)

    parameters = {**parameters_of(threat), "loss": "feature distance", "seed": config.seed}
    return NamedAttack(f"pgd_fea{num_steps}", f"PGD-fea-{num_steps}", run, parameters, 3.0 * num_steps)


def measurements(setup: Setup) -> list[Measurement]:
    """Every attack on every image, in the order of the table."""
    config, steps = setup.config, STEPS[setup.config.suite]
    attacks = [natural(), *(make_fgsm(config) for _ in steps[:1]), *(make_pgd(config, k) for k in steps)]
    if (adaptive := ADAPTIVE_STEPS.get(config.suite)) and setup.has_features:
        attacks += [make_pgd_mi(config, adaptive), make_pgd_features(config, adaptive)]
    if (targets := options_of(config, AccuracyOptions).targets) and steps:
        attacks.append(make_targeted(config, steps[0], targets))
    return [attack.on(keep=setup.keep(attack.name) if attack.in_ball else None) for attack in attacks]


def summarize(setup: Setup, items: Sequence[Measurement], records: Records) -> Numbers:
    """Counts of each attack, and of the worst case with the attack that broke each image first."""
    config, rows, broken = setup.config, dict[str, Any](), broken_by(records)
    for item in items:
        rows[item.name] = {
            "label": item.label, **records.count(item).as_dict(), "mean_loss": records.mean(item, "loss"),
            "largest": float(records.tensor(item, config.norm).max()), "parameters": item.parameters,
            "seconds": records.seconds(item),
        }  # fmt: skip
    clean = Count(rows["natural"]["correct"], rows["natural"]["total"])
    faced = dict[str, Any]()
    for item in faced_by(records)[0]:
        label = item.label or item.name
        # On few images other topics' attacks run on all of them too, under the same label with steps of their own.
        label = label if faced.get(label, item.parameters) == item.parameters else f"{label} ({item.name})"
        faced[label] = item.parameters
    return {
        "attacks": rows,
        "robust": Count(sum(name == UNBROKEN for name in broken.values()), len(broken)).as_dict(),
        "broken_by": broken,
        "faced": faced,
        "tried": list(faced),
        "partial": on_fewer(records, broken),
        "norm": config.norm,
        "eps_text": config.eps_text,
        "autoattack": autoattack.wanted(config),
        "notes": near_chance(clean, setup),
    }


def faced_by(records: Records) -> tuple[list[Measurement], list[list[Measurement]]]:
    """The attacks within the ball: those that ran on every image; and those on fewer, that ran on the same together."""
    every, few = set(records.rows(_natural(records))["sample"]), dict[frozenset[int], list[Measurement]]()
    whole = list[Measurement]()
    for item in records.items():
        if item.in_ball and (samples := frozenset(records.rows(item).get("sample", ()))):
            (whole if samples == every else few.setdefault(samples, [])).append(item)
    return whole, list(few.values())


def broken_by(records: Records) -> dict[str, str]:
    """Sample → `clean` where the model is wrong anyway, the first attack on every image that broke it, or `none`."""
    rows = records.rows(_natural(records))
    found = {str(s): UNBROKEN if right else "clean" for s, right in zip(rows["sample"], rows["correct"], strict=True)}
    return _also_broken(found, faced_by(records)[0], records)


def on_fewer(records: Records, broken: dict[str, str]) -> list[dict[str, Any]]:
    """Of each set of images that more attacks ran on: how many stand under these too, and what each broke.

    Args:
        broken: of every image; see `broken_by`.
    """
    found = []
    for items in faced_by(records)[1]:
        before = {str(sample): broken[str(sample)] for sample in records.rows(items[0])["sample"]}
        after = _also_broken(before, items, records)
        left = Count(sum(name == UNBROKEN for name in after.values()), len(after))
        found.append({
            "images": items[0].images, **left.as_dict(), "stood": sum(name == UNBROKEN for name in before.values()),
            "tried": list(dict.fromkeys(item.label or item.name for item in items)),
            "broken_by": {s: name for s, name in after.items() if name != before[s]},
        })  # fmt: skip
    return found


def _natural(records: Records) -> Measurement:
    return next(item for item in records.items(NAME) if item.name == "natural")


def _also_broken(found: dict[str, str], items: Sequence[Measurement], records: Records) -> dict[str, str]:
    """What is found of each image, after these attacks too."""
    found = dict(found)
    for item in items:
        rows = records.rows(item)
        for sample, right in zip(rows["sample"], rows["correct"], strict=True):
            if not right and found.get(str(sample)) == UNBROKEN:
                found[str(sample)] = item.name
    return found


def near_chance(clean: Count, setup: Setup) -> list[str]:
    """A warning where the model is hardly better than guessing: most often its input is not what it was made for."""
    chance = 1 / setup.num_classes
    hardly_more = min(1.5 * chance, chance + 0.1 * (1 - chance))
    if binomial_tail(clean.correct, clean.total, hardly_more) < 0.05:
        return []
    if clean.accuracy > hardly_more:
        return [
            f"{clean.correct} of {clean.total} images are right without attack: too few to tell that from guessing."
        ]
    return [
        f"The natural accuracy is {100 * clean.accuracy:.1f} %, and guessing gives {100 * chance:.1f} %: before "
        "trusting any number below, check the weights, the order of the classes, the "
        "image size and the normalisation (--data.image_size, --mean, --std)."
    ]


def render(numbers: Numbers) -> str:
    """The table, the worst case in its last row."""
    rows = [
        [e["label"], percent(e["accuracy"]), span(e["interval"]), f"{e['correct']}/{e['total']}",
         "—" if e["mean_loss"] is None else f"{e['mean_loss']:.3f}", f"{e['seconds']:.0f} s"]
        for e in numbers["attacks"].values()
    ]  # fmt: skip
    partial = numbers["partial"]
    worst = [("worst case", numbers["robust"])] if numbers["tried"] else []
    worst += [(f"worst case of {part['total']} images, more attacks", part) for part in partial]
    for label, e in worst:
        rows.append([label, percent(e["accuracy"]), span(e["interval"]), f"{e['correct']}/{e['total']}", "", ""])
    ball = f"{NORM_WORDS[numbers['norm']]} ball, ε = {numbers['eps_text']}"
    head = ["attack", "accuracy", "95 % interval", "correct", "mean loss", "time"]
    words = ["No attack ran on every image."]
    if numbers["tried"]:
        words = [
            "The worst case is per image: correct without attack and under each attack within the ball that ran on "
            f"every image of this report ({'; '.join(numbers['tried'])})."
        ]
    words += [
        f"On {part['total']} of the images more attacks ran ({'; '.join(part['tried'])}): {part['stood']} of these are "
        f"correct under the attacks on every image, {part['correct']} under all."
        for part in partial
    ]
    more = "".join(paragraph(text, "soft") for text in words)
    return table(head, rows, numbers=range(1, 6), caption=f"{ball}; Wilson intervals") + more


def columns(numbers: Numbers) -> list[Column]:
    """The accuracy under each attack."""
    return [Column(key, entry["label"], entry["accuracy"]) for key, entry in numbers["attacks"].items()]


def check(setup: Setup) -> None:
    """Refuses more targets than there are wrong classes, before anything is measured."""
    targets, wrong = options_of(setup.config, AccuracyOptions).targets, setup.num_classes - 1
    check_number("targets", targets, at_most=max(1, wrong), hint=f"of {setup.num_classes} classes {wrong} are wrong")


register(Topic(NAME, "Accuracy", measurements, summarize, render, 10, AccuracyOptions, check, columns=columns))
