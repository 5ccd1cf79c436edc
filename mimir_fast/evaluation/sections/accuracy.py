"""The first table: accuracy without attack, under each attack, and under the worst of all.

The robust accuracy is per image: right when clean, and not broken by any perturbation within the judged ball that any
measurement tried, in this section or another. It bounds the true robust accuracy from above.
"""

from typing import Any

from mimir_fast.evaluation.attacks import (
    NamedAttack,
    make_fgsm,
    make_pgd,
    make_pgd_features,
    make_pgd_mi,
    make_targeted,
    natural,
)
from mimir_fast.evaluation.config import NORM_WORDS
from mimir_fast.evaluation.html import paragraph, percent, span, table
from mimir_fast.evaluation.measure import Count, Measurement, Records
from mimir_fast.evaluation.plan import Setup
from mimir_fast.evaluation.statistics import binomial_tail

NAME, TITLE = "accuracy", "Accuracy"
STANDS = "none"


def attacks(setup: Setup) -> list[NamedAttack]:
    """The attacks on all images, in the order of the table."""
    config, suite = setup.config, setup.config.settings
    chosen = [natural(), make_fgsm(config), *(make_pgd(config, k) for k in suite.steps)]
    if suite.adaptive_steps and setup.has_features:
        chosen += [make_pgd_mi(config, suite.adaptive_steps), make_pgd_features(config, suite.adaptive_steps)]
    if config.targets:
        chosen.append(make_targeted(config, suite.steps[0]))
    return chosen


def measurements(setup: Setup) -> list[Measurement]:
    """Every attack on every image."""
    return [attack.on(keep=setup.keep(attack.name) if attack.breaks else None) for attack in attacks(setup)]


def summarize(setup: Setup, records: Records) -> dict[str, Any]:
    """Counts of each attack, and of the worst case with the attack that broke each image first."""
    config, rows = setup.config, {}
    for item in measurements(setup):
        loss = records.tensor(item, "loss")
        rows[item.name] = {
            "label": item.label, **records.count(item).as_dict(), "mean_loss": float(loss.mean()),
            "largest": float(records.tensor(item, config.norm).max()), "parameters": item.parameters,
            "seconds": records.seconds(item),
        }  # fmt: skip
    broken = broken_by(records)
    standing = Count(sum(name == STANDS for name in broken.values()), len(broken))
    clean = Count(rows["natural"]["correct"], rows["natural"]["total"])
    return {
        "attacks": rows,
        "robust": standing.as_dict(),
        "broken_by": broken,
        "tried": sorted({item.label or item.name for item in records.plan if item.breaks}),
        "norm": config.norm,
        "eps_text": config.eps_text,
        "autoattack": config.wants_autoattack,
        "notes": near_chance(clean, setup),
    }


def broken_by(records: Records) -> dict[str, str]:
    """Sample → `clean` where the model is wrong anyway, the first measurement that broke it, or `none`."""
    first = next(item for item in records.plan if item.name == "natural")
    rows = records.rows(first)
    found = {str(s): STANDS if right else "clean" for s, right in zip(rows["sample"], rows["correct"], strict=True)}
    for item in records.plan:
        if not item.breaks:
            continue
        rows = records.rows(item)
        for sample, right in zip(rows.get("sample", ()), rows.get("correct", ()), strict=True):
            if not right and found.get(str(sample)) == STANDS:
                found[str(sample)] = item.name
    return found


def near_chance(clean: Count, setup: Setup) -> list[str]:
    """A warning where the model is hardly better than guessing: most often its input is not what it was made for."""
    chance = 1 / setup.num_classes
    hardly_more = min(1.5 * chance, chance + 0.1 * (1 - chance))
    if binomial_tail(clean.correct, clean.total, hardly_more) < 0.05:
        return []
    return [
        f"The natural accuracy is {100 * clean.accuracy:.1f} %, and guessing gives {100 * chance:.1f} %: before "
        "trusting any number below, check the weights, the order of the classes, the "
        "image size and the normalisation (--data.image_size, --mean, --std)."
    ]


def render(numbers: dict[str, Any]) -> str:
    """The table, the worst case in its last row."""
    rows = [
        [e["label"], percent(e["accuracy"]), span(e["interval"]), f"{e['correct']}/{e['total']}",
         f"{e['mean_loss']:.3f}", f"{e['seconds']:.0f} s"]
        for e in numbers["attacks"].values()
    ]  # fmt: skip
    robust = numbers["robust"]
    rows.append(
        ["all attacks together", percent(robust["accuracy"]), span(robust["interval"]),
         f"{robust['correct']}/{robust['total']}", "", ""]
    )  # fmt: skip
    ball = f"{NORM_WORDS[numbers['norm']]} ball, ε = {numbers['eps_text']}"
    head = ["attack", "accuracy", "95 % interval", "correct", "mean loss", "time"]
    more = paragraph(
        f"The last row is per image: correct without attack and under each of {len(numbers['tried'])} attacks tried in "
        f"this report within the ball ({'; '.join(numbers['tried'])}).",
        "soft",
    )
    return table(head, rows, numbers=range(1, 6), caption=f"{ball}; Wilson intervals") + more
